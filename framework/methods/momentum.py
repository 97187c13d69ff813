"""Momentum before preconditioning, and weight decay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import MomentumDeclarations
from ...errors import require_finite_nonnegative, require_interval

__all__ = [
    "EMA",
    "CorrectedEMA",
    "Coupled",
    "Decoupled",
    "HeavyBall",
    "Momentum",
    "Nesterov",
    "NoMomentum",
    "WeightDecay",
]


class Momentum(Protocol):
    """A linear recurrence M <- keep M + add g, and the vector a M + b g that is preconditioned, up to a factor.

    It may declare more: :class:`.MomentumDeclarations`.
    """

    def coefficients(self) -> tuple[float, float]:
        """(keep, add)."""

    def blend(self) -> tuple[float, float]:
        """(a, b): the vector to precondition is a M + b g, with M after the recurrence. (1, 0): M itself."""

    def correction(self, updates: int) -> float:
        """Factor on that vector after ``updates`` >= 1 recurrences."""


class _Plain(MomentumDeclarations):
    """What is preconditioned is M itself, uncorrected."""

    def blend(self) -> tuple[float, float]:
        """(1, 0)."""
        return 1.0, 0.0

    def correction(self, updates: int) -> float:
        """None."""
        return 1.0


@dataclass(frozen=True)
class _Decaying(_Plain):
    """M keeps a share of itself at every step."""

    decay: float = 0.9

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("momentum decay", self.decay, 0.0, 1.0)


@dataclass(frozen=True)
class EMA(_Decaying):
    """M <- decay M + (1 - decay) g from 0, no bias correction (K-BFGS and K-FAC, PAPERS 1.2 item 2).

    Args:
        decay: in [0, 1).
    """

    def coefficients(self) -> tuple[float, float]:
        """(decay, 1 - decay)."""
        return self.decay, 1.0 - self.decay


@dataclass(frozen=True)
class CorrectedEMA(EMA):
    """The same with Adam's bias correction: M / (1 - decay^t)."""

    unbiased = True

    def correction(self, updates: int) -> float:
        """1 / (1 - decay^t)."""
        return 1.0 / (1.0 - self.decay**updates)


@dataclass(frozen=True)
class HeavyBall(_Decaying):
    """M <- decay M + g (MBF, and torch.optim.SGD).

    Args:
        decay: in [0, 1).
    """

    def coefficients(self) -> tuple[float, float]:
        """(decay, 1)."""
        return self.decay, 1.0


@dataclass(frozen=True)
class NoMomentum(_Plain):
    """The gradient itself."""

    unbiased = True

    def coefficients(self) -> tuple[float, float]:
        """(0, 1)."""
        return 0.0, 1.0


@dataclass(frozen=True)
class Nesterov(MomentumDeclarations):
    """One recurrence ahead: the vector keep M + add g, with M <- keep M + add g as another momentum has it.

    ``Nesterov(HeavyBall(mu))`` is ``torch.optim.SGD(nesterov=True)``; ``Nesterov(EMA(mu))`` is what
    ``torch.optim.Muon`` hands to its iteration, the same up to the factor 1 - mu.

    Args:
        momentum: the recurrence, and its bias correction.
    """

    momentum: Momentum = field(default_factory=HeavyBall)

    def __post_init__(self) -> None:
        require_fields(self)

    def coefficients(self) -> tuple[float, float]:
        """Those of the recurrence."""
        return self.momentum.coefficients()

    def blend(self) -> tuple[float, float]:
        """(keep, add)."""
        return self.momentum.coefficients()

    def correction(self, updates: int) -> float:
        """That of the recurrence."""
        return self.momentum.correction(updates)


class WeightDecay(Protocol):
    """Where the decay ``tau`` of the parameter group acts."""

    def gradient_factor(self, value: float) -> float:
        """Factor on the parameter that is added to the gradient."""

    def shrinkage(self, value: float, step_size: float | Tensor) -> float | Tensor:
        """Fraction of the parameter removed before the step."""


@dataclass(frozen=True)
class Coupled:
    """g + tau theta, biases included: the gradient of (tau/2) |theta|^2. Curvature never sees it."""

    def gradient_factor(self, value: float) -> float:
        """tau."""
        require_finite_nonnegative("weight_decay", value)
        return value

    def shrinkage(self, value: float, step_size: float | Tensor) -> float | Tensor:
        """None."""
        return 0.0


@dataclass(frozen=True)
class Decoupled:
    """theta <- (1 - alpha gamma) theta before the step, every parameter (AdamW, MBF)."""

    def gradient_factor(self, value: float) -> float:
        """None."""
        require_finite_nonnegative("weight_decay", value)
        return 0.0

    def shrinkage(self, value: float, step_size: float | Tensor) -> float | Tensor:
        """alpha gamma."""
        return step_size * value
