"""Initial matrices of limited-memory quasi-Newton structures: H_0 = gamma I, and where gamma comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...errors import ArgumentError, require_interval

__all__ = ["ConstantScale", "InitialScale", "NewestPair"]


class InitialScale(Protocol):
    """A rule for gamma > 0 in H_0 = gamma I."""

    @property
    def initial(self) -> float:
        """Gamma before the first pair, > 0."""

    def scale(self, step: Tensor, change: Tensor) -> Tensor:
        """gamma once a pair is stored, 0-dimensional, finite and > 0.

        Args:
            step: (d,) s of the pair, after damping.
            change: (d,) y, with s'y > 0.
        """


@dataclass(frozen=True)
class ConstantScale:
    """The same gamma at every step, as K-BFGS(L) has it (PAPERS 1.2).

    Args:
        initial: finite, > 0; default 1.
    """

    initial: float = 1.0

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("initial", self.initial, 0.0, float("inf"), closed="()")

    def scale(self, step: Tensor, change: Tensor) -> Tensor:
        """As before the first pair."""
        return step.new_full((), self.initial)


@dataclass(frozen=True)
class NewestPair:
    """gamma = s'y / y'y of the newest pair (Nocedal and Wright, Numerical Optimization, 2nd ed., equation 7.20).

    The inverse of the curvature along y, so that a direction has the right length where no pair has been seen. A pair
    of curvature s'y >= c s's has gamma <= 1 / c.

    Args:
        initial: before the first pair; finite, > 0. The default 1 makes the first direction the momentum itself.
        smallest: > 0, lower bound.
        largest: upper bound, finite, >= smallest.
    """

    initial: float = 1.0
    smallest: float = 1e-8
    largest: float = 1e3

    def __post_init__(self) -> None:
        require_fields(self)
        for name in ("initial", "smallest", "largest"):
            require_interval(name, getattr(self, name), 0.0, float("inf"), closed="()")
        if self.smallest > self.largest:
            raise ArgumentError(f"smallest must be <= largest, got {self.smallest!r} and {self.largest!r}")

    def scale(self, step: Tensor, change: Tensor) -> Tensor:
        """The quotient between its bounds; the lower one where it is no number."""
        quotient = torch.dot(step, change) / torch.dot(change, change)
        return quotient.nan_to_num(nan=self.smallest).clamp(self.smallest, self.largest)
