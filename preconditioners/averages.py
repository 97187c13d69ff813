"""Averages over steps. An average carries its own weight, so that start-up bias is handled by the rule it names.

Every rule answers one question: with which coefficients do the old average and the new value combine? The average of a
quantity x after a step is ``keep * average + add * x``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..checking import require_fields
from ..curvature.declarations import AverageDeclarations
from ..errors import require_interval

__all__ = ["Average", "MovingAverage", "PlainAverage", "RunningSum", "ZeroStartAverage"]


class Average(Protocol):
    """A rule for combining an average with a new value. May declare more: :class:`.AverageDeclarations`."""

    def coefficients(self, weight: float) -> tuple[float, float, float]:
        """(keep, add, new weight) for an average that has gathered ``weight`` so far (0: nothing yet)."""


@dataclass(frozen=True)
class MovingAverage(AverageDeclarations):
    """Exponential moving average without start-up bias: the first value enters whole.

    Equal to the bias-corrected average of Adam; after a warm start (weight 1) equal to the plain 0.9 / 0.1 rule.

    Args:
        decay: in [0, 1).
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("decay", self.decay, 0.0, 1.0)

    def coefficients(self, weight: float) -> tuple[float, float, float]:
        """The two factors sum to one. A warm start's weight (a count) is as good as a full one."""
        old = self.decay * min(weight, 1.0)
        total = old + 1.0 - self.decay
        return old / total, (1.0 - self.decay) / total, total


@dataclass(frozen=True)
class ZeroStartAverage(AverageDeclarations):
    """Exponential moving average from zero, no bias correction: ``x <- decay x + (1 - decay) new``.

    Args:
        decay: in [0, 1); 0 keeps the newest value only.
    """

    decay: float = 0.9
    unbiased = False

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("decay", self.decay, 0.0, 1.0)

    def coefficients(self, weight: float) -> tuple[float, float, float]:
        """Always (decay, 1 - decay)."""
        return self.decay, 1.0 - self.decay, 1.0


@dataclass(frozen=True)
class PlainAverage(AverageDeclarations):
    """Mean of all values so far; the weight counts them. Used by warm starts."""

    def coefficients(self, weight: float) -> tuple[float, float, float]:
        """1/(k+1) for the new value after k values."""
        return weight / (weight + 1.0), 1.0 / (weight + 1.0), weight + 1.0


@dataclass(frozen=True)
class RunningSum(AverageDeclarations):
    """Sum of all values so far (AdaGrad)."""

    normalised = False
    unbiased = False

    def coefficients(self, weight: float) -> tuple[float, float, float]:
        """Keep everything, add everything."""
        return 1.0, 1.0, 1.0
