"""Damping of secant pairs: pure functions (s, y, Hy) -> (s, y) that keep a BFGS update of H positive definite.

Notation: s = ``step``, y = ``change`` of the gradient, H = inverse approximation, mu2 = ``damping`` of the output side
(sqrt(lambda)). What the rules guarantee is stated and proved in PAPERS 1.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import PairDampingDeclarations
from ...errors import ArgumentError, require_interval

__all__ = [
    "DampedPair",
    "DoubleDamping",
    "MergedDoubleDamping",
    "NoDamping",
    "PairBounds",
    "PairDamping",
    "PowellB0",
    "PowellH",
    "PowellThenLM",
    "dots",
    "powell_on_inverse",
]


@dataclass(frozen=True)
class DampedPair:
    """A pair after damping, and which of the two stages changed it (bool tensors, one per pair)."""

    step: Tensor
    change: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class PairBounds:
    """What a rule promises of every damped pair (PAPERS 1.4), for many H at once, (n,) each; ``None``: no promise.

        s'y >= floor |s|^2,    y'Hy <= weighted s'y,    |y|^2 <= growth s'y

    The bounds on an update of H by the pair are made of these three: c, a and g of PAPERS 1.4.
    """

    floor: Tensor | None = None
    weighted: Tensor | None = None
    growth: Tensor | None = None


class PairDamping(Protocol):
    """A rule that modifies a secant pair before it updates H.

    It takes one pair or many, with batch axes in front, and must not look at the values of tensors in Python. Vectors
    may end in zeros that only pad them. What it may promise besides: :class:`.PairDampingDeclarations`.
    """

    def validate(self, damping: float) -> None:
        """Raise ``ArgumentError`` if the rule is not defined for this mu2."""

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """Damp one pair, or each of many.

        Args:
            step: (..., d) s.
            change: (..., d) y.
            product: (..., d) H y with the H that the pair will update.
            damping: mu2.
        """


def dots(one: Tensor, other: Tensor) -> Tensor:
    """Dot products along the last axis."""
    products: Tensor = torch.linalg.vecdot(one, other)
    return products


def powell_on_inverse(step: Tensor, change: Tensor, product: Tensor, mu1: float) -> tuple[Tensor, Tensor]:
    """Powell's damping of s against H: afterwards s'y >= mu1 y'Hy (PAPERS 1.3 step 1).

    Returns:
        The damped step and whether it was changed.
    """
    curvature, quadratic = dots(step, change), dots(change, product)
    kept = curvature > mu1 * quadratic
    theta = _weight(curvature, quadratic, mu1, kept)
    return torch.lerp(product, step, theta), ~kept


def _weight(curvature: Tensor, target: Tensor, mu: float, kept: Tensor) -> Tensor:
    """The theta of Powell's interpolation: theta s'y + (1 - theta) target = mu target; 1 where the pair is kept.

    One per pair, with an axis for its entries: ``lerp`` to a vector is that vector, bit for bit, where theta is 1.
    """
    theta = (1.0 - mu) * target / (target - curvature)
    return theta.masked_fill_(kept, 1.0).nan_to_num_(1.0, 1.0, 1.0).unsqueeze(-1)


@dataclass(frozen=True)
class NoDamping(PairDampingDeclarations):
    """The pair as it is."""

    def validate(self, damping: float) -> None:
        """Any damping."""

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """Unchanged."""
        never = torch.zeros(step.shape[:-1], dtype=torch.bool, device=step.device)
        return DampedPair(step, change, never, never)


@dataclass(frozen=True)
class _Powell(PairDampingDeclarations):
    """What the rules after Powell share: a threshold mu1, any mu2, and curvature that is positive afterwards."""

    mu1: float = 0.2
    keeps_positive = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("mu1", self.mu1, 0.0, 1.0, closed="()")

    def validate(self, damping: float) -> None:
        """Any damping."""


@dataclass(frozen=True)
class DoubleDamping(_Powell):
    """Powell on H, then Powell with B = I (K-BFGS, PAPERS 1.3): s'y >= mu2 s's afterwards.

    Args:
        mu1: in (0, 1), threshold of the first stage.
    """

    def curvature_floor(self, damping: float) -> float:
        """mu2."""
        return damping

    def bounds(self, damping: float, low: Tensor, high: Tensor) -> PairBounds:
        """D2 to D4 of PAPERS 1.4."""
        growth = (1 / (self.mu1 * low)).clamp(min=1.0)
        return PairBounds(torch.full_like(high, damping), high.clamp(min=1 / self.mu1), growth)

    def validate(self, damping: float) -> None:
        """The second stage interpolates between y and s only for mu2 < 1."""
        if not 0.0 < damping < 1.0:
            raise ArgumentError(
                f"double damping needs a damping of pairs in (0, 1), got {damping:g} (mu2: sqrt(damping) on the output "
                "side of Kronecker structures, the whole damping elsewhere): outside, the second stage no longer "
                "interpolates; use a positive damping below 1 (a composed Method names its own with "
                "defaults={'damping': 0.1}), or pairs='powell-then-lm' (the part PowellThenLM()), which takes any > 0"
            )

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """Both stages."""
        step, first = powell_on_inverse(step, change, product, self.mu1)
        curvature, square = dots(step, change), dots(step, step)
        kept = curvature > damping * square
        change = torch.lerp(step, change, _weight(curvature, square, damping, kept))
        return DampedPair(step, change, first, ~kept)


@dataclass(frozen=True)
class PowellThenLM(_Powell):
    """Powell on H, then y + mu2 s (A', PAPERS 1.3 "DDv2"): any mu2 > 0.

    Args:
        mu1: in (0, 1), threshold of the first stage.
    """

    def curvature_floor(self, damping: float) -> float:
        """mu2: the first stage leaves s'y >= mu1 y'Hy >= 0."""
        return damping

    def bounds(self, damping: float, low: Tensor, high: Tensor) -> PairBounds:
        """The analogues of D2 to D4 for the Levenberg-Marquardt shift, PAPERS 1.4."""
        weighted, growth = 1 / self.mu1 + damping * high, 1 / (self.mu1 * low) + damping
        return PairBounds(torch.full_like(high, damping), weighted, growth)

    def validate(self, damping: float) -> None:
        """Any positive damping."""
        if not damping > 0.0:
            raise ArgumentError(f"Powell-then-LM damping must be > 0, got {damping:g}")

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """Powell's stage, then the Levenberg-Marquardt shift, which always applies."""
        step, first = powell_on_inverse(step, change, product, self.mu1)
        always = torch.ones(step.shape[:-1], dtype=torch.bool, device=step.device)
        return DampedPair(step, change + damping * step, first, always)


@dataclass(frozen=True)
class PowellH(_Powell):
    """Powell on H alone (PAPERS 1.3, "Powell-H only"): s'y >= mu1 y'Hy afterwards, y as it is.

    Keeps H positive definite, H+ >= mu1 H / (1 + mu1), but puts no bound on |H+| (PAPERS 1.4, U4): a small y that
    points along s is a good pair here, and teaches an H as large as |s| / |y|. The damping mu2 does not enter.

    Args:
        mu1: in (0, 1), threshold.
    """

    def bounds(self, damping: float, low: Tensor, high: Tensor) -> PairBounds:
        """Of y alone: what U4 of PAPERS 1.4 is made of."""
        return PairBounds(None, torch.full_like(high, 1 / self.mu1), 1 / (self.mu1 * low))

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """The first stage of double damping."""
        step, first = powell_on_inverse(step, change, product, self.mu1)
        return DampedPair(step, change, first, torch.zeros_like(first))


@dataclass(frozen=True)
class MergedDoubleDamping(_Powell):
    """One of the two stages, whichever has the larger target (PAPERS 1.3, "merged DD").

    With sigma = max(y'Hy, s's) and s'y > mu1 sigma the pair stays. Otherwise s is damped with H where y'Hy >= s's, else
    y with B = I, both to mu1. Afterwards, with M and mu the largest and smallest eigenvalue of H:

        s'y >= mu1 / max(1, M) |s|^2,   y'Hy <= max(1, M) / mu1 s'y,   |y|^2 <= max(1, 1 / mu) / mu1 s'y

    (ours, proved as D2-D4 in PAPERS 1.4). The bounds contain M where double damping has mu2: D2 with mu2 does *not*
    hold, and the damping mu2 does not enter.

    Args:
        mu1: in (0, 1), threshold of both.
    """

    def bounds(self, damping: float, low: Tensor, high: Tensor) -> PairBounds:
        """The three above."""
        most = high.clamp(min=1.0) / self.mu1
        return PairBounds(1 / most, most, (1 / low).clamp(min=1.0) / self.mu1)

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """At most one of the stages."""
        curvature, quadratic = dots(step, change), dots(change, product)
        square = dots(step, step)
        low = ~(curvature > self.mu1 * torch.maximum(quadratic, square))
        first, second = low & (quadratic >= square), low & (quadratic < square)
        damped = torch.lerp(product, step, _weight(curvature, quadratic, self.mu1, ~first))
        change = torch.lerp(step, change, _weight(curvature, square, self.mu1, ~second))
        return DampedPair(damped, change, first, second)


@dataclass(frozen=True)
class PowellB0(_Powell):
    """Powell's damping of y with a multiple of the identity, B0 = gamma I, gamma = max(y'y / s'y, floor).

    The damping of SdLBFGS (Wang, Ma, Goldfarb, Liu, SIAM J. Opt. 27 (2017), section 3, with H0 = I / gamma). PAPERS 1.3
    writes B0 = I / gamma; we follow the SIAM paper, where gamma has the units of curvature, as B0 must. For s'y <= 0
    gamma is the floor. Afterwards s'y >= mu1 gamma |s|^2 >= mu1 floor |s|^2. What it does not bound:
    |y|^2 / s'y, so H+ may become nearly singular. H and the damping mu2 do not enter.

    Args:
        mu1: in (0, 1), threshold; 0.25 in the paper.
        floor: > 0 and finite, smallest curvature that gamma may claim.
    """

    mu1: float = 0.25
    floor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_interval("floor", self.floor, 0.0, float("inf"), closed="()")

    def curvature_floor(self, damping: float) -> float:
        """mu1 times the smallest gamma."""
        return self.mu1 * self.floor

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """One stage, on y."""
        curvature, square = dots(step, change), dots(step, step)
        gamma = (dots(change, change) / curvature).clamp(min=self.floor)
        gamma = torch.where((curvature > 0) & torch.isfinite(gamma), gamma, torch.full_like(gamma, self.floor))
        kept = curvature > self.mu1 * gamma * square
        theta = _weight(curvature, gamma * square, self.mu1, kept)
        damped = torch.lerp(gamma.unsqueeze(-1) * step, change, theta)
        return DampedPair(step, damped, torch.zeros_like(kept), ~kept)
