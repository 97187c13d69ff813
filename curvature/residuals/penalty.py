"""What a residual costs: half its square, or less where it is large."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...errors import require_interval

__all__ = ["Cauchy", "HalfSquare", "Huber", "Penalty", "PseudoHuber"]


class Penalty(Protocol):
    """A function rho of one residual, convex near zero with rho''(0) = 1, elementwise on tensors of any shape."""

    def value(self, residual: Tensor) -> Tensor:
        """rho(r) >= 0."""

    def slope(self, residual: Tensor) -> Tensor:
        """rho'(r)."""

    def curvature(self, residual: Tensor) -> Tensor:
        """rho''(r), or 0 where that is negative: a Gauss-Newton matrix has no negative eigenvalue."""


@dataclass(frozen=True)
class HalfSquare:
    """r^2 / 2: least squares."""

    def value(self, residual: Tensor) -> Tensor:
        """r^2 / 2."""
        return 0.5 * residual * residual

    def slope(self, residual: Tensor) -> Tensor:
        """r."""
        return residual

    def curvature(self, residual: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(residual)


@dataclass(frozen=True)
class _Scaled:
    """A penalty that knows from where on a residual is large.

    Args:
        scale: > 0, in the units of the residual.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("scale", self.scale, 0.0, math.inf, closed="()")


@dataclass(frozen=True)
class Huber(_Scaled):
    """r^2 / 2 up to ``scale``, and the tangent from there (Huber, Ann. Math. Statist. 35 (1964)).

    A residual beyond it has a slope and no curvature: damping alone bounds a step that only such residuals ask for.
    """

    def value(self, residual: Tensor) -> Tensor:
        """r^2 / 2, or scale (|r| - scale / 2)."""
        size = residual.abs()
        return torch.where(size <= self.scale, 0.5 * residual * residual, self.scale * (size - 0.5 * self.scale))

    def slope(self, residual: Tensor) -> Tensor:
        """r cut at +-scale."""
        return residual.clamp(-self.scale, self.scale)

    def curvature(self, residual: Tensor) -> Tensor:
        """1 up to the scale, else 0."""
        return (residual.abs() <= self.scale).to(residual.dtype)


@dataclass(frozen=True)
class PseudoHuber(_Scaled):
    """scale^2 (sqrt(1 + (r / scale)^2) - 1): Huber's with every derivative, and some curvature everywhere."""

    def _root(self, residual: Tensor) -> Tensor:
        return (1.0 + (residual / self.scale) ** 2).sqrt()

    def value(self, residual: Tensor) -> Tensor:
        """See above; without cancellation for small r."""
        return residual * residual / (1.0 + self._root(residual))

    def slope(self, residual: Tensor) -> Tensor:
        """r / sqrt(1 + (r / scale)^2)."""
        return residual / self._root(residual)

    def curvature(self, residual: Tensor) -> Tensor:
        """(1 + (r / scale)^2)^(-3/2)."""
        return self._root(residual) ** -3


@dataclass(frozen=True)
class Cauchy(_Scaled):
    """scale^2 / 2 log(1 + (r / scale)^2): not convex, an outlier pulls the less the farther it is."""

    def value(self, residual: Tensor) -> Tensor:
        """See above."""
        return 0.5 * self.scale**2 * torch.log1p((residual / self.scale) ** 2)

    def slope(self, residual: Tensor) -> Tensor:
        """r / (1 + (r / scale)^2)."""
        return residual / (1.0 + (residual / self.scale) ** 2)

    def curvature(self, residual: Tensor) -> Tensor:
        """(1 - (r / scale)^2) / (1 + (r / scale)^2)^2, 0 from |r| = scale on."""
        ratio = (residual / self.scale) ** 2
        return ((1.0 - ratio) / (1.0 + ratio) ** 2).clamp(min=0.0)
