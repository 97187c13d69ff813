"""Diagonal curvature in a Kronecker-factored eigenbasis: EKFAC and SOAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import derived
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import Tensors
from ...errors import ArgumentError, require_positive_integer
from ..averages import Average, MovingAverage
from ..damping.split import SideDamping
from ..linalg import Computed
from ..protocol import Observation, Request, ScalingLaw, Schedule
from ..state import State
from .identity import Stateless
from .kronecker import in_layer_order, too_long
from .moments import LayerMoments, Moments, turned

__all__ = ["Eigenbasis", "EigenbasisState"]


@dataclass
class EigenbasisState(State):
    """Averaged matrices of both sides, their last good bases, and the squares of gradients in them.

    ``weight`` and ``squares_weight`` belong to the averages; ``renewals`` counts bases; ``damping`` is that of the
    last refresh.
    """

    inputs: Tensor
    outputs: Tensor
    inputs_basis: Tensor
    outputs_basis: Tensor
    squares: Tensor
    weight: float
    squares_weight: float
    renewals: int
    damping: float

    @property
    def has_gathered(self) -> bool:
        """Bases of nothing are not installed."""
        return self.weight != 0.0


@dataclass(frozen=True)
class Eigenbasis(Stateless):
    """direction = U_g [ (U_g' M U_a) / (S^power + damping) ] U_a', S second moments of gradients in the basis.

    - EKFAC (arXiv:1806.03884v2, Algorithm 1): the default ``LayerMoments``, power 1. Among all matrices that are
      diagonal in the basis of K-FAC's factors it is the closest to the Fisher block.
    - SOAP (arXiv:2409.11321v2, Algorithm 3): ``GradientMoments``, power 1/2, with ``BatchMean`` statistics and
      ``CorrectedEMA`` momentum, which stays in the original space; the damping is Adam's epsilon.

    Departs from SOAP's published code: its first step only fills the matrices, to keep the current gradient out of the
    basis. Here that gradient is kept out as well, but the step is taken, in the original coordinates (as Adam's), and
    the next refresh computes the first basis. Momentum remembers what squares must remember too, or a direction that
    has gone out of the gradients is divided by nearly nothing; so squares are carried over into each new basis as
    variances of independent entries, S <- (U_g' V_g)^2' S (U_a' V_a)^2 with V the new bases. The published code leaves
    them where they are and relies on its first step, whose gradient never enters the momentum. The bias is the last
    column of the matrix.

    Args:
        moments: rule for the matrices whose eigenvectors are the basis, and for S.
        power: 1 or 1/2.
        average: rule over steps for S.
        sides: rule over steps for the matrices.
        schedule: when statistics and basis are renewed.
        limit: layers with a side of more than this order are declined (the method's fallback takes them, visibly).
            Default 5120: 100 MiB a matrix in float32. >= 1.
        turned: a side of more than this order keeps its original coordinates, as in SOAP's code (its 10000), visibly in
            the layer table: no matrix of it is kept. Default 5120: the limit's. >= 1.

    Memory: 2 (d_in^2 + d_out^2) + d_in d_out numbers, without the squares of sides that are not turned.
    """

    moments: Moments = field(default_factory=LayerMoments)
    power: float = 1.0
    average: Average = field(default_factory=lambda: MovingAverage(0.9))
    sides: Average = field(default_factory=lambda: MovingAverage(0.9))
    schedule: Schedule = field(default_factory=Schedule)
    limit: int = 5120
    turned: int = 5120
    joint = True

    def __post_init__(self) -> None:
        require_fields(self)
        if self.power not in (0.5, 1.0):
            raise ArgumentError(f"power must be 0.5 or 1, got {self.power!r}")
        require_positive_integer("limit", self.limit)
        require_positive_integer("turned", self.turned)

    @property
    def needs(self) -> Needs:
        """As the moments say."""
        return self.moments.needs

    @derived
    def scaling(self) -> ScalingLaw:
        """Squares to the power, damped like them."""
        return ScalingLaw(2.0 * self.power, whole=2.0 * self.power)

    def numbers(self, layer: Layer) -> int:
        """Matrices and bases of both sides, and the squares."""
        rows, columns = layer.matrix_shape
        return 2 * sum(size**2 for size in (rows, columns) if size <= self.turned) + rows * columns

    def work(self, layer: Layer) -> float:
        """Into the basis and back."""
        rows, columns = layer.matrix_shape
        return 4.0 * rows * columns * sum(size for size in (rows, columns) if size <= self.turned)

    def bounds(self, state: EigenbasisState, layer: Layer, damping: SideDamping) -> tuple[float, float]:
        """(lambda, infinity)."""
        return damping.whole, float("inf")

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Weight and bias of layers that are matrices within the limit."""
        return tuple(layer.parameters) if layer.is_matrix and max(layer.matrix_shape) <= self.limit else ()

    def declines(self, layer: Layer) -> str:
        """A side beyond the limit."""
        return too_long(layer, self.limit, self.numbers(layer)) if layer.is_matrix else ""

    def init(self, layer: Layer, parameters: Tensors) -> EigenbasisState:
        """Nothing gathered: the original coordinates, every square 1."""
        rows, columns = layer.matrix_shape
        like = parameters[0]
        orders = [size if size <= self.turned else 0 for size in (columns, rows)]
        inner, outer = (torch.eye(order, dtype=like.dtype, device=like.device) for order in orders)
        zeros = torch.zeros_like(inner), torch.zeros_like(outer)
        return EigenbasisState(*zeros, inner, outer, like.new_ones(rows, columns), 0.0, 0.0, 0, 0.0)

    def update(self, state: EigenbasisState, observation: Observation, average: Average | None = None) -> None:
        """The matrices of both sides, where the moments want them before the basis; always in a warm start."""
        if self.moments.sides_first or average is not None:
            self._accumulate(state, observation, average or self.sides)

    def refine(self, state: EigenbasisState, observation: Observation) -> None:
        """Squares in the basis of this step; then the matrices, where the moments want them after it."""
        assert observation.statistics is not None
        keep, add, state.squares_weight = self.average.coefficients(state.squares_weight)
        new = self.moments.squares(observation.statistics, state.inputs_basis, state.outputs_basis)
        state.squares.mul_(keep).add_(new, alpha=add)
        if not self.moments.sides_first:
            self._accumulate(state, observation, self.sides)

    def matrices(self, state: EigenbasisState, damping: SideDamping) -> Sequence[Request]:
        """Inputs first; none of a side that is not turned."""
        operation = self.moments.renewal if state.renewals else self.moments.first
        sides = (state.inputs, state.inputs_basis), (state.outputs, state.outputs_basis)
        asked = [Request(matrix, damping.whole, operation, basis) for matrix, basis in sides if matrix.numel()]
        if not asked:
            state.damping = damping.whole  # else when the bases of this damping are installed
        return asked

    def install(self, state: EigenbasisState, results: Sequence[Computed]) -> None:
        """Both bases or, if one failed or nothing was gathered yet, neither."""
        for found in results[:1]:
            state.damping = found.damping
        if state.weight == 0.0 or any(found.value is None for found in results):
            return
        given = iter(results)
        sides = state.inputs_basis, state.outputs_basis
        inner, outer = (next(given) if basis.numel() else Computed(basis, 0) for basis in sides)
        assert inner.value is not None and outer.value is not None
        initial = None
        if inner.spectrum is not None and outer.spectrum is not None:
            initial = self.moments.initial(state.squares, inner.spectrum, outer.spectrum, state.renewals == 0)
        if initial is not None:
            state.squares, state.squares_weight = initial
        else:
            state.squares = _carried(state, inner.value, outer.value)
        state.inputs_basis, state.outputs_basis = inner.value, outer.value
        state.renewals += 1

    def precondition(self, state: EigenbasisState, momentum: Tensors) -> Tensors:
        """Into the basis, divide, and back."""
        (matrix,) = momentum
        inside = turned(matrix, state.inputs_basis, state.outputs_basis)
        inside = inside / self._scale(state.squares, state.damping)
        return (turned(inside, state.inputs_basis.T, state.outputs_basis.T),)

    def to_dense(self, state: EigenbasisState, layer: Layer, damping: SideDamping) -> Tensor:
        """U diag(S^power + damping) U' with U the Kronecker product of the bases."""
        sides = zip((state.outputs_basis, state.inputs_basis), state.squares.shape, strict=True)
        basis = torch.kron(*(side if side.numel() else torch.eye(size).to(state.squares) for side, size in sides))
        scale = self._scale(state.squares, damping.whole).flatten()
        return in_layer_order(layer, (basis * scale) @ basis.T)

    def _accumulate(self, state: EigenbasisState, observation: Observation, average: Average) -> None:
        assert observation.statistics is not None
        keep, add, state.weight = average.coefficients(state.weight)
        self.moments.accumulate(state.inputs, state.outputs, observation.statistics, keep, add)

    def _scale(self, squares: Tensor, damping: float) -> Tensor:
        return (squares.sqrt() if self.power == 0.5 else squares.clone()).add_(damping)


def _carried(state: EigenbasisState, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Squares in other bases than the state's: those of independent entries with these variances, in its bases."""
    left = (state.outputs_basis.T @ outputs).square_()
    right = (state.inputs_basis.T @ inputs).square_()
    return turned(state.squares, right, left)
