"""Damping of secant pairs: pure functions (s, y, Hy) -> (s, y) that keep a BFGS update of H positive definite.

Notation: s = ``step``, y = ``change`` of the gradient, H = inverse approximation, mu2 = ``damping`` of the output side
(sqrt(lambda)). What the rules guarantee is stated and proved in PAPERS 1.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, require_interval

__all__ = ["DampedPair", "DoubleDamping", "NoDamping", "PairDamping", "PowellThenLM", "powell_on_inverse"]


@dataclass(frozen=True)
class DampedPair:
    """A pair after damping, and which of the two stages changed it (0-dimensional bool tensors)."""

    step: Tensor
    change: Tensor
    first: Tensor
    second: Tensor


class PairDamping(Protocol):
    """A rule that modifies a secant pair before it updates H."""

    def validate(self, damping: float) -> None:
        """Raise ``ArgumentError`` if the rule is not defined for this mu2."""

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """Damp one pair.

        Args:
            step: (d,) s.
            change: (d,) y.
            product: (d,) H y with the H that the pair will update.
            damping: mu2.
        """


def powell_on_inverse(step: Tensor, change: Tensor, product: Tensor, mu1: float) -> tuple[Tensor, Tensor]:
    """Powell's damping of s against H: afterwards s'y >= mu1 y'Hy (PAPERS 1.3 step 1).

    Returns:
        The damped step and whether it was changed.
    """
    curvature, quadratic = torch.dot(step, change), torch.dot(change, product)
    changed = ~(curvature > mu1 * quadratic)
    theta = torch.where(changed, (1.0 - mu1) * quadratic / (quadratic - curvature), torch.ones_like(curvature))
    theta = torch.where(torch.isfinite(theta), theta, torch.ones_like(theta))
    return theta * step + (1.0 - theta) * product, changed


@dataclass(frozen=True)
class NoDamping:
    """The pair as it is."""

    def validate(self, damping: float) -> None:
        """Any damping."""

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """Unchanged."""
        never = torch.zeros((), dtype=torch.bool, device=step.device)
        return DampedPair(step, change, never, never)


@dataclass(frozen=True)
class DoubleDamping:
    """Powell on H, then Powell with B = I (K-BFGS, PAPERS 1.3): s'y >= mu2 s's afterwards.

    Args:
        mu1: in (0, 1), threshold of the first stage.
    """

    mu1: float = 0.2

    def __post_init__(self) -> None:
        require_interval("mu1", self.mu1, 0.0, 1.0, closed="()")

    def validate(self, damping: float) -> None:
        """The second stage interpolates between y and s only for mu2 < 1."""
        if not 0.0 < damping < 1.0:
            raise ArgumentError(
                f"double damping needs 0 < sqrt(damping) < 1 at the output side, got {damping:g}: outside, "
                "the second stage no longer interpolates; use a positive damping below 1, or pairs='powell-then-lm' "
                "(the part PowellThenLM()), which takes any damping > 0"
            )

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """Both stages."""
        step, first = powell_on_inverse(step, change, product, self.mu1)
        curvature, square = torch.dot(step, change), torch.dot(step, step)
        second = ~(curvature > damping * square)
        theta = torch.where(second, (1.0 - damping) * square / (square - curvature), torch.ones_like(curvature))
        theta = torch.where(torch.isfinite(theta), theta, torch.ones_like(theta))
        return DampedPair(step, theta * change + (1.0 - theta) * step, first, second)


@dataclass(frozen=True)
class PowellThenLM:
    """Powell on H, then y + mu2 s (A', PAPERS 1.3 "DDv2"): any mu2 > 0.

    Args:
        mu1: in (0, 1), threshold of the first stage.
    """

    mu1: float = 0.2

    def __post_init__(self) -> None:
        require_interval("mu1", self.mu1, 0.0, 1.0, closed="()")

    def validate(self, damping: float) -> None:
        """Any positive damping."""
        if not damping > 0.0:
            raise ArgumentError(f"Powell-then-LM damping must be > 0, got {damping:g}")

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """Powell's stage, then the Levenberg-Marquardt shift, which always applies."""
        step, first = powell_on_inverse(step, change, product, self.mu1)
        always = torch.ones((), dtype=torch.bool, device=step.device)
        return DampedPair(step, change + damping * step, first, always)
