"""Inverse roots of sums of gradient products: the factor of Shampoo."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from ...checking import require_fields
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics
from ...errors import require_interval
from ..averages import Average, RunningSum
from ..operations import InverseRoot
from .factor import AveragedMatrix, CovarianceState, Side, accumulate_gradient_products

__all__ = ["Root"]


@dataclass(frozen=True)
class Root(AveragedMatrix):
    """H = (epsilon I + sum over steps of the gradient's products)^{-1/p}; epsilon is the damping of this side.

    On both sides of a Kronecker structure with p = 4 and ``BatchMean`` statistics the direction is
    ``L^{-1/4} G R^{-1/4}``, L = epsilon I + sum G G', R = epsilon I + sum G' G.

    Implements: arXiv:1802.09568v2, Algorithm 1 (matrices).

    Departs from the paper: a tensor of order k has k sides with exponent 1 / (2k) there (Algorithm 2); here a
    convolution's kernel is flattened to a matrix, so that k = 2 everywhere, and the bias is its last column instead of
    a parameter of order 1.

    Args:
        p: > 0; 4 for Shampoo; 2 is the variant with a full inverse square root per side.
        average: rule over steps; the paper sums. A moving average does not decay the damping with it.

    Memory: 2 d^2 numbers.
    """

    p: float = 4.0
    average: Average = field(default_factory=RunningSum)

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("p", self.p, 0.0, float("inf"), closed="()")

    @property  # not cached itself: pyright takes no cached property for what a protocol declares
    def operation(self) -> InverseRoot:  # type: ignore[override]
        """The inverse p-th root."""
        return self._root

    @cached_property
    def _root(self) -> InverseRoot:
        return InverseRoot(self.p)

    def scaling(self, side: Side) -> tuple[float, float]:
        """The p-th root of squared gradients, on both sides."""
        return 2.0 / self.p, 2.0

    def needs(self, side: Side) -> Needs:
        """Gradients of the whole layer, on both sides."""
        return Needs.VECTORS

    def update(self, state: CovarianceState, statistics: LayerStatistics, side: Side, average: Average | None) -> None:
        """Add this side's products."""
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        accumulate_gradient_products(state.second_moment, statistics, side, keep, add)
