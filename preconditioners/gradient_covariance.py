"""Covariances of the gradient as a random matrix: the factor of Tensor Normal Training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.records.needs import Needs
from ..curvature.records.statistics import LayerStatistics
from .averages import Average, MovingAverage
from .factors.factor import AveragedMatrix, CovarianceState, Side, accumulate_gradient_products

__all__ = ["GradientCovariance"]


@dataclass(frozen=True)
class GradientCovariance(AveragedMatrix):
    """Covariance of one side of a matrix-normal gradient, with a damped inverse (Tensor Normal Training).

    If vec(G) has covariance V (x) U, then E[G G'] = tr(V) U and E[G' G] = tr(U) V: the two second moments give the
    covariances up to one common scale, which is fixed by giving both sides the same mean eigenvalue c. For a layer of
    n_1 x n_2 numbers, c^2 = tr E[G G'] / (n_1 n_2), and this side is ``E[G G'] / (c n_2) + damping I``.

    Implements: arXiv:2106.02925v3, Algorithm 2 with equal traces as the authors run it; damping is the same epsilon on
    both sides (``ConstantDamping``), and pseudo-gradients come from ``SampledBatchMean`` (labels drawn from the model).

    Departs from the paper: kernels are flattened to matrices (the authors' reshaping as for K-FAC), and the bias is
    the last column instead of a parameter of order 1 with its own full matrix.

    Args:
        average: rule over steps for E[G G'], started from a warm start's plain average where there is one.

    Memory: 2 d^2 numbers.
    """

    average: Average = field(default_factory=lambda: MovingAverage(0.9))
    additive = False

    def __post_init__(self) -> None:
        require_fields(self)

    def scaling(self, side: Side) -> tuple[float, float]:
        """Squared gradients, shared between the sides in equal parts."""
        return 1.0, 1.0

    def needs(self, side: Side) -> Needs:
        """Gradients of the whole layer, on both sides."""
        return Needs.VECTORS

    def update(self, state: CovarianceState, statistics: LayerStatistics, side: Side, average: Average | None) -> None:
        """Average this side's products, divided by the other side's dimension."""
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        rows, columns = statistics.layer.matrix_shape
        other = rows if side == "inputs" else columns
        accumulate_gradient_products(state.second_moment, statistics, side, keep, add / other)

    def matrices(self, state: CovarianceState) -> Sequence[Tensor]:
        """The covariance, with the mean eigenvalue c that it shares with the other side; zero stays zero."""
        mean = state.second_moment.diagonal().mean()
        tiny = torch.finfo(mean.dtype).tiny
        return (state.second_moment / mean.clamp(min=tiny).sqrt(),)
