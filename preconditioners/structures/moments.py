"""What an eigenbasis is made of: two rules for the matrices whose eigenvectors it is, and for the squares in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics
from ..factors.factor import accumulate_gradient_products, accumulate_second_moment
from ..operations import Eigenvectors, Operation, PowerIteration

__all__ = ["GradientMoments", "LayerMoments", "Moments", "turned"]

_CHUNK = 2**24
"""Numbers of per-sample gradients that are held at a time, where a layer has several positions per sample."""


class Moments(Protocol):
    """A rule for the two matrices of an eigenbasis and for the second moments of gradients in it.

    ``sides_first``: whether the matrices take in a step's statistics before the basis is renewed at that step, or
    after. ``first``: how the first basis is computed; ``renewal``: one that continues an older one.
    """

    @property
    def needs(self) -> Needs:
        """What it asks of the estimator."""

    @property
    def sides_first(self) -> bool:
        """Before the renewal or after."""

    @property
    def first(self) -> Operation:
        """Of the first basis."""

    @property
    def renewal(self) -> Operation:
        """Of every basis but the first."""

    def accumulate(self, inputs: Tensor, outputs: Tensor, statistics: LayerStatistics, keep: float, add: float) -> None:
        """Add a step's statistics to the matrices of both sides, in place; an empty one is of a side not turned."""

    def squares(self, statistics: LayerStatistics, inputs_basis: Tensor, outputs_basis: Tensor) -> Tensor:
        """(d_out, d_in [+1]) mean squares of the gradients in the basis; an empty basis leaves its side as it is."""

    def initial(self, squares: Tensor, inputs: Tensor, outputs: Tensor, first: bool) -> tuple[Tensor, float] | None:
        """Squares and their weight right after a renewal, from the spectra; ``None``: they go on, carried over."""


@dataclass(frozen=True)
class LayerMoments:
    """EKFAC: the basis of K-FAC's factors, and per-sample gradients squared in it.

    Implements: arXiv:1806.03884v2, Algorithm 1, with averages over steps. After a renewal the squares are K-FAC's, the
    products of the factors' eigenvalues, as in the authors' code; averaging goes on from there. ``ZeroStartAverage(0)``
    in the structure gives the paper's squares of the current mini-batch alone.
    """

    needs = Needs.INPUTS | Needs.ROOTS | Needs.VECTORS  # whole gradients where groups or several roots need them
    sides_first = True
    first = Eigenvectors()
    renewal = Eigenvectors()

    def accumulate(self, inputs: Tensor, outputs: Tensor, statistics: LayerStatistics, keep: float, add: float) -> None:
        """Second moments of the layer's inputs and of the gradients at its outputs."""
        if inputs.numel():
            accumulate_second_moment(inputs, statistics, "inputs", keep, add)
        if outputs.numel():
            accumulate_second_moment(outputs, statistics, "outputs", keep, add)

    def squares(self, statistics: LayerStatistics, inputs_basis: Tensor, outputs_basis: Tensor) -> Tensor:
        """Mean over samples of (U_g' G_n U_a)^2, G_n the sum over positions of g a'; never all G_n at a time."""
        assert statistics.roots is not None
        rows, factor = statistics.roots
        uneven = statistics.ragged or rows.shape[0] != statistics.samples * statistics.positions
        if statistics.layer.groups > 1 or uneven:
            return self._squares_of_vectors(statistics, inputs_basis, outputs_basis)
        left, right = rows.to(outputs_basis.dtype), statistics.input_rows().to(inputs_basis.dtype)
        if outputs_basis.numel():
            left = left @ outputs_basis
        if inputs_basis.numel():
            right = right @ inputs_basis[: right.shape[1]]
            if statistics.layer.has_bias:
                right += inputs_basis[-1]
        elif statistics.layer.has_bias:
            right = torch.cat([right, right.new_ones(right.shape[0], 1)], 1)
        scale = factor**2 / statistics.samples
        if left.shape[0] == statistics.samples:
            flat: Tensor = (left.square().T @ right.square()).mul_(scale)
            return flat
        left, right = (value.unflatten(0, (statistics.samples, -1)) for value in (left, right))
        count = max(1, _CHUNK // (left.shape[2] * right.shape[2]))
        total: Tensor = right.new_zeros(left.shape[2], right.shape[2])
        for some, others in zip(left.split(count), right.split(count), strict=True):
            total += torch.bmm(some.mT, others).square_().sum(0)
        return total * scale

    def _squares_of_vectors(self, statistics: LayerStatistics, inputs_basis: Tensor, outputs_basis: Tensor) -> Tensor:
        """The same from whole gradients: groups see different inputs, or there are several roots per sample."""
        assert statistics.vectors is not None
        gradients = statistics.layer.joint_matrix(statistics.vectors()).to(inputs_basis.dtype)
        total = torch.zeros_like(gradients[0])
        for some in gradients.split(max(1, _CHUNK // total.numel())):
            total += turned(some, inputs_basis, outputs_basis).square().sum(0)
        return total / gradients.shape[0]

    def initial(self, squares: Tensor, inputs: Tensor, outputs: Tensor, first: bool) -> tuple[Tensor, float]:
        """K-FAC's eigenvalues, as a full average."""
        return torch.outer(outputs.clamp(min=0.0), inputs.clamp(min=0.0)), 1.0


@dataclass(frozen=True)
class GradientMoments:
    """SOAP: the basis of Shampoo's matrices G' G and G G', and the mini-batch gradient squared in it.

    Implements: arXiv:2409.11321v2, Algorithms 3 and 4. The gradient of a step is squared in the basis of the steps
    before it, and enters the two matrices afterwards.

    Args:
        first: of the first basis. A few gradients leave most of it undecided: a ramp decides, not rounding (ours).
        renewal: of every other basis.
    """

    first: Operation = field(default_factory=lambda: Eigenvectors(ramp=1.0))
    renewal: Operation = field(default_factory=PowerIteration)
    needs = Needs.VECTORS
    sides_first = False

    def __post_init__(self) -> None:
        require_fields(self)

    def accumulate(self, inputs: Tensor, outputs: Tensor, statistics: LayerStatistics, keep: float, add: float) -> None:
        """G' G and G G'."""
        if inputs.numel():
            accumulate_gradient_products(inputs, statistics, "inputs", keep, add)
        if outputs.numel():
            accumulate_gradient_products(outputs, statistics, "outputs", keep, add)

    def squares(self, statistics: LayerStatistics, inputs_basis: Tensor, outputs_basis: Tensor) -> Tensor:
        """(Q_L' G Q_R)^2; its mean where the estimator has several gradients."""
        assert statistics.vectors is not None
        gradients = statistics.layer.joint_matrix(statistics.vectors()).to(inputs_basis.dtype)
        return turned(gradients, inputs_basis, outputs_basis).square().mean(0)

    def initial(self, squares: Tensor, inputs: Tensor, outputs: Tensor, first: bool) -> tuple[Tensor, float] | None:
        """The average goes on, as momentum does."""
        return None


def turned(matrix: Tensor, inputs_basis: Tensor, outputs_basis: Tensor) -> Tensor:
    """U_g' M U_a of (..., d_out, d_in) matrices; an empty U leaves its side in the coordinates that it has."""
    if outputs_basis.numel():
        matrix = outputs_basis.T @ matrix
    return matrix @ inputs_basis if inputs_basis.numel() else matrix
