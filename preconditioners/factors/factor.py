"""Factors: one side of a Kronecker product, an inverse approximation H of a d x d matrix.

The layer's curvature is approximated by A (x) G with A over the inputs (d = d_in + 1 with a bias) and G over the
outputs (d = d_out); the preconditioned momentum is H_g M H_a. Each side is one factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import FactorDeclarations
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics
from ..averages import Average, MovingAverage
from ..linalg import Computed, accumulate_gram_, accumulate_homogeneous_gram_
from ..operations import Inverse, Operation, Request
from ..protocol import Events
from ..state import NoState, State
from .sharing import Expand, Sharing

__all__ = [
    "AveragedMatrix",
    "Covariance",
    "CovarianceState",
    "Factor",
    "IdentityFactor",
    "Side",
    "WithoutMatrices",
    "accumulate_gradient_products",
    "accumulate_second_moment",
]

Side = Literal["inputs", "outputs"]
_EXPAND = Expand()


class Factor(Protocol):
    """One side of a Kronecker product.

    ``sides`` says on which sides it makes sense, ``operation`` what is computed of its matrices. What it may declare
    besides: :class:`.FactorDeclarations`.
    """

    @property
    def sides(self) -> frozenset[Side]:
        """Where it makes sense."""

    @property
    def operation(self) -> Operation:
        """What is computed of :meth:`matrices`."""

    def needs(self, side: Side) -> Needs:
        """What it asks of the estimator on this side."""

    def init(self, size: int, like: Tensor) -> State:
        """Fresh state of order ``size`` with the dtype and device of ``like``."""

    def update(self, state: Any, statistics: LayerStatistics, side: Side, average: Average | None) -> None:
        """Take in new statistics.

        Args:
            state: of the factor, written in place.
            statistics: of the layer.
            side: on which the factor stands.
            average: how the new ones are put together with the old; ``None``, as at every step of training: by the
                factor's own rule. A warm start gives a plain average, which takes the place of that rule.
        """

    def matrices(self, state: Any) -> Sequence[Tensor]:
        """Matrices of which it wants ``operation`` (none or one)."""

    def install(self, state: Any, results: Sequence[Computed]) -> None:
        """Store them."""

    def left(self, state: Any, value: Tensor) -> Tensor:
        """H @ value for ``value`` (d, columns)."""

    def right(self, state: Any, value: Tensor) -> Tensor:
        """value @ H for ``value`` (rows, d)."""

    def observe_step(
        self, state: Any, before: LayerStatistics, after: LayerStatistics | None, side: Side, damping: float
    ) -> Events:
        """Look back at the step."""

    def to_dense(self, state: Any, damping: float) -> Tensor:
        """The inverse approximation H, (d, d), as ``left`` and ``right`` apply it."""


def accumulate_second_moment(
    moment: Tensor, statistics: LayerStatistics, side: Side, keep: float, add: float, sharing: Sharing = _EXPAND
) -> None:
    """``moment <- keep * moment + add * new`` with the second moment of one side, as the sharing rule wants its rows.

    By default, inputs: mean over samples of the *sum* over positions of a a' (a with its trailing 1); outputs: mean
    over samples and positions of g g' (PAPERS 1.6; one position: the plain mean). A grouped layer's inputs are averaged
    over groups: all groups share one matrix. What several processes have added up already is taken as it is.
    """
    known = statistics.moments.get(side) if statistics.moments else None
    if known is not None:
        moment.mul_(keep).add_(known.to(moment.dtype), alpha=add)
        return
    if side == "outputs":
        rows, scale = sharing.outputs(statistics)
        accumulate_gram_(moment, rows.to(moment.dtype), keep, add * scale)
        return
    rows, scale = sharing.inputs(statistics)
    rows = rows.to(moment.dtype)
    if statistics.layer.has_bias:
        accumulate_homogeneous_gram_(moment, rows, keep, add * scale)
    else:
        accumulate_gram_(moment, rows, keep, add * scale)


def accumulate_gradient_products(
    moment: Tensor, statistics: LayerStatistics, side: Side, keep: float, add: float
) -> None:
    """``moment <- keep * moment + add * new`` with the gradients' products of one side.

    For gradient vectors G_v of the layer as matrices [W | b]: the mean over v of G_v' G_v (inputs) or G_v G_v'
    (outputs). A batch-mean estimator has one vector, the mini-batch gradient.
    """
    assert statistics.vectors is not None
    matrices = statistics.layer.joint_matrix(statistics.vectors()).to(moment.dtype)
    rows = (matrices if side == "inputs" else matrices.mT).reshape(-1, moment.shape[0])
    accumulate_gram_(moment, rows, keep, add / matrices.shape[0])


class WithoutMatrices(FactorDeclarations):
    """Verbs of a factor that learns nothing before the step and never inverts."""

    operation: Operation = Inverse()

    def update(self, state: Any, statistics: LayerStatistics, side: Side, average: Average | None) -> None:
        """Nothing before the step."""

    def matrices(self, state: Any) -> Sequence[Tensor]:
        """Never inverts."""
        return ()

    def install(self, state: Any, results: Sequence[Computed]) -> None:
        """Nothing."""


@dataclass
class CovarianceState(State):
    """Averaged second moment, undamped, and the last good inverse of its damped version."""

    second_moment: Tensor
    inverse: Tensor
    weight: float
    replaced = frozenset(("inverse",))


class AveragedMatrix(FactorDeclarations):
    """Verbs of a factor that averages a matrix and multiplies by what was computed of it, kept as ``inverse``."""

    sides = frozenset[Side](("inputs", "outputs"))
    operation: Operation = Inverse()

    def numbers(self, size: int) -> int:
        """Moment and inverse."""
        return 2 * size**2

    def init(self, size: int, like: Tensor) -> CovarianceState:
        """Nothing gathered; the identity as inverse."""
        return CovarianceState(like.new_zeros(size, size), torch.eye(size, dtype=like.dtype, device=like.device), 0.0)

    def matrices(self, state: CovarianceState) -> Sequence[Tensor]:
        """The second moment."""
        return (state.second_moment,)

    def install(self, state: CovarianceState, results: Sequence[Computed]) -> None:
        """Keep the last good inverse if the factorisation failed."""
        if results[0].value is not None:
            state.inverse = results[0].value

    def mean_eigenvalue(self, state: CovarianceState) -> Tensor:
        """Of the undamped matrix that is inverted, 0-dimensional: what ``Factored`` damping balances."""
        return self.matrices(state)[0].diagonal().mean()

    def left(self, state: CovarianceState, value: Tensor) -> Tensor:
        """Dense product."""
        return state.inverse @ value

    def right(self, state: CovarianceState, value: Tensor) -> Tensor:
        """Dense product."""
        return value @ state.inverse

    def observe_step(
        self, state: Any, before: LayerStatistics, after: LayerStatistics | None, side: Side, damping: float
    ) -> Events:
        """Nothing."""
        return {}

    def to_dense(self, state: CovarianceState, damping: float) -> Tensor:
        """What a refresh with this damping would install; equals ``left`` right after one."""
        (matrix,) = self.matrices(state)
        (found,) = self.operation.compute([Request(matrix, damping)])
        return state.inverse if found.value is None else found.value


@dataclass(frozen=True)
class Covariance(AveragedMatrix):
    """Averaged second moment with a damped inverse: both sides of K-FAC (arXiv:1503.05671v7, section 3).

    Args:
        average: rule over steps; K-FAC in the K-BFGS code uses 0.9 (PAPERS 1.7).
        sharing: what is made of positions and of several calls of one module. Give both sides the same rule.

    Memory: 2 d^2 numbers.
    """

    average: Average = field(default_factory=lambda: MovingAverage(0.9))
    sharing: Sharing = field(default_factory=Expand)

    def __post_init__(self) -> None:
        require_fields(self)

    def scaling(self, side: Side) -> tuple[float, float]:
        """Squared gradients at the outputs, nothing at the inputs."""
        return (0.0, 0.0) if side == "inputs" else (2.0, 2.0)

    def needs(self, side: Side) -> Needs:
        """Layer inputs, or curvature-bearing gradient rows."""
        return Needs.INPUTS if side == "inputs" else Needs.ROOTS

    def takes_moment(self, side: Side) -> Sharing:
        """The second moment under its sharing rule is all that it takes of the rows."""
        return self.sharing

    def update(self, state: CovarianceState, statistics: LayerStatistics, side: Side, average: Average | None) -> None:
        """Average the second moment of this side."""
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        accumulate_second_moment(state.second_moment, statistics, side, keep, add, self.sharing)


@dataclass(frozen=True)
class IdentityFactor(WithoutMatrices):
    """No curvature on this side: H = I. Memory: none."""

    sides = frozenset[Side](("inputs", "outputs"))
    waits = True

    def needs(self, side: Side) -> Needs:
        """Nothing."""
        return Needs.NOTHING

    def scaling(self, side: Side) -> tuple[float, float]:
        """None."""
        return 0.0, 0.0

    def numbers(self, size: int) -> int:
        """None."""
        return 0

    def init(self, size: int, like: Tensor) -> NoState:
        """Nothing."""
        return NoState()

    def left(self, state: NoState, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def right(self, state: NoState, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def observe_step(
        self, state: Any, before: LayerStatistics, after: LayerStatistics | None, side: Side, damping: float
    ) -> Events:
        """Nothing."""
        return {}

    def to_dense(self, state: NoState, damping: float) -> Tensor:
        """A 1 x 1 identity that broadcasts in a Kronecker product of the right size; see ``Kronecker.to_dense``."""
        return torch.ones(1, 1)
