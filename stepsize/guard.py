"""Guards: accept or shorten a step after looking back at the same mini-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ..errors import require_interval, require_positive_integer

__all__ = ["Backtrack", "Guard", "NoGuard"]


class Guard(Protocol):
    """Decides from the mini-batch loss before and after the step."""

    @property
    def attempts(self) -> int:
        """How often a step may be shortened; 0 switches the look-back for the guard off."""

    @property
    def shrink(self) -> float:
        """Factor on the step per attempt."""

    def accepts(self, before: float, after: float) -> bool:
        """Whether the step stays."""


@dataclass(frozen=True)
class NoGuard:
    """Every step stays."""

    attempts = 0
    shrink = 1.0

    def accepts(self, before: float, after: float) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class Backtrack:
    """Shorten the step while the loss of its own mini-batch rises beyond a factor.

    Quasi-Newton pairs of one layer say nothing about the other layers, so layers that move together can overshoot
    together although every single H is tame; the mini-batch loss, which the look-back measures anyway, is the first
    quantity that shows it. One comparison per step, which synchronises with the device; one lean pass per shortening.

    Args:
        growth: > 1; a step is shortened when loss after > growth * loss before, or when the loss is not finite.
        shrink: in (0, 1), factor on the step per attempt.
        attempts: >= 1; after that many the step is taken back whole.
    """

    growth: float = 1.1
    shrink: float = 0.5
    attempts: int = 8

    def __post_init__(self) -> None:
        require_interval("growth", self.growth, 1.0, math.inf, closed="(]")
        require_interval("shrink", self.shrink, 0.0, 1.0, closed="()")
        require_positive_integer("attempts", self.attempts)

    def accepts(self, before: float, after: float) -> bool:
        """Finite and not above the factor; a loss <= 0 has no meaningful ratio and only needs to be finite."""
        return math.isfinite(after) and (before <= 0.0 or after <= self.growth * before)
