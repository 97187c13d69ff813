"""Skip rules: which damped secant pairs reach a quasi-Newton matrix at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...errors import require_finite_nonnegative, require_interval
from .damping import dots

__all__ = ["AngleTest", "CurvatureTest", "SkipRule", "TwoSidedCurvatureTest"]


class SkipRule(Protocol):
    """Decides whether a damped pair is used. Batch axes as for pair dampings."""

    def accepts(self, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
        """Whether to use the pair, a bool per pair; no synchronisation.

        Args:
            step: (..., d) s after damping.
            change: (..., d) y after damping.
            reference: (..., d) v, the mean gradient at the outputs or the mean input: the scale of the layer.
        """


@dataclass(frozen=True)
class CurvatureTest:
    """s'y > 0 and s'y > tolerance |s|^2 |v| (the released K-BFGS code, PAPERS 1.2 "skip rules").

    Args:
        tolerance: finite, >= 0; 0 keeps every pair of positive curvature.
    """

    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        require_fields(self)
        require_finite_nonnegative("tolerance", self.tolerance)

    def accepts(self, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
        """The test; no number is greater than a bound that is not finite, and none is negative."""
        bound: Tensor = self.tolerance * dots(step, step) * torch.linalg.vector_norm(reference, dim=-1)
        return dots(step, change) > bound


@dataclass(frozen=True)
class TwoSidedCurvatureTest:
    """The curvature test, and |y|^2 <= s'y / mu3: the skip of "DD + skip" (PAPERS 1.3, 1.4).

    With double damping, whose pairs have s'y >= mu2 |s|^2, it bounds the eigenvalues of L-BFGS(p) uniformly:
    1 / (1 / gamma + p / mu3) <= lambda(H) <= c^p gamma + (c^p - 1) / (mu2 (c - 1)) with c = 1 / (mu2 mu3). The exact
    test of the code is known by name only; this is the one that its theorem needs (PAPERS 1.5).

    Args:
        mu3: > 0 and finite; pairs of curvature above 1 / mu3 are skipped.
        tolerance: of the lower test, finite, >= 0.
    """

    mu3: float = 1e-3
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("mu3", self.mu3, 0.0, float("inf"), closed="()")
        require_finite_nonnegative("tolerance", self.tolerance)

    def accepts(self, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
        """Both tests."""
        upper: Tensor = self.mu3 * dots(change, change) <= dots(step, change)
        return CurvatureTest(self.tolerance).accepts(step, change, reference) & upper


@dataclass(frozen=True)
class AngleTest:
    """s'y > cosine |s| |y|: pairs whose step and change point apart are skipped. Ours.

    On mini-blocks y also holds what the steps of all other blocks did to this block's gradient, and may have little to
    do with the block's own step. The test knows no units: one tolerance fits every block. An L-BFGS update with a pair
    that passes multiplies with I - s y' / s'y, whose norm is |s| |y| / s'y < 1 / cosine, so that p stored pairs with
    |s|^2 / s'y <= 1 / mu2 give

        lambda(H) <= c^p gamma + (c^p - 1) / (mu2 (c - 1)),  c = cosine^-2

    by the proof of PAPERS 1.4; the mean gradient does not enter.

    Args:
        cosine: in [0, 1); 0 keeps every pair of positive curvature. The default trains small autoencoders as fast as
            0.1 does, and needs fewer shortened steps where lr is too large.
    """

    cosine: float = 0.3

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("cosine", self.cosine, 0.0, 1.0)

    def accepts(self, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
        """The test; no number is greater than a bound that is not finite, and none is negative."""
        bound: Tensor = self.cosine * torch.linalg.vector_norm(step, dim=-1) * torch.linalg.vector_norm(change, dim=-1)
        return dots(step, change) > bound
