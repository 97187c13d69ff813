"""Dense quasi-Newton factors: BFGS on secant pairs, and the Hessian-action BFGS of K-BFGS's input side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics
from ..averages import Average, MovingAverage, ZeroStartAverage
from ..linalg import bfgs_inverse_updates_, pack_homogeneous
from ..pairs.damping import DoubleDamping, PairDamping
from ..pairs.pipeline import AveragedPair, average_pairs_, damped_pairs
from ..pairs.skipping import CurvatureTest, SkipRule
from ..protocol import Events
from ..state import State
from .factor import AveragedMatrix, CovarianceState, Side, WithoutMatrices, accumulate_second_moment
from .sharing import Expand, Sharing

__all__ = ["BFGS", "AveragedPair", "BFGSState", "HessianActionBFGS", "HessianActionState"]


def products(inverses: Sequence[Tensor], rows: Tensor) -> Tensor:
    """H v for many H, with the vectors as padded rows (L, d)."""
    width = rows.shape[1]
    pieces: list[Tensor] = []
    for inverse, row in zip(inverses, rows.unbind(0), strict=True):
        size = inverse.shape[0]
        if size == width:
            pieces.append(torch.mv(inverse, row))
        else:
            pieces += (torch.mv(inverse, row[:size]), row[size:])  # the padding, as it was given
    return torch.cat(pieces).view(rows.shape)


@dataclass
class BFGSState(State):
    """Inverse approximation H_g and the averaged pair."""

    inverse: Tensor
    pair: AveragedPair


@dataclass(frozen=True)
class BFGS(WithoutMatrices):
    """Dense BFGS on damped, averaged secant pairs at the pre-activations: the output side of K-BFGS.

    Implements: arXiv:2006.08877 as read in the authors' code (PAPERS 1.2 item 7); H starts as the identity.

    Args:
        pairs: how a pair is damped before the update.
        average: rule over steps for the undamped pair; decay 0 in full-batch mode.
        skip: which damped pairs are used.

    Memory: d^2 + 2 d numbers.
    """

    pairs: PairDamping = field(default_factory=DoubleDamping)
    average: Average = field(default_factory=lambda: ZeroStartAverage(0.9))
    skip: SkipRule = field(default_factory=CurvatureTest)
    sides = frozenset[Side](("outputs",))
    waits = True

    def __post_init__(self) -> None:
        require_fields(self)

    def needs(self, side: Side) -> Needs:
        """Secant pairs."""
        return Needs.PAIRS

    def numbers(self, size: int) -> int:
        """H and the averaged pair."""
        return size**2 + 2 * size

    def init(self, size: int, like: Tensor) -> BFGSState:
        """H = I."""
        pair = AveragedPair(like.new_zeros(size), like.new_zeros(size), 0.0)
        return BFGSState(torch.eye(size, dtype=like.dtype, device=like.device), pair)

    def left(self, state: BFGSState, value: Tensor) -> Tensor:
        """H @ value."""
        return state.inverse @ value

    def right(self, state: BFGSState, value: Tensor) -> Tensor:
        """value @ H."""
        return value @ state.inverse

    def to_dense(self, state: BFGSState, damping: float) -> Tensor:
        """H itself."""
        return state.inverse

    def observe_step(
        self, state: BFGSState, before: LayerStatistics, after: LayerStatistics | None, side: Side, damping: float
    ) -> Events:
        """Average, damp, test and apply one pair."""
        return self.observe_many([state], [before], [after], side, damping)

    def kind(self, state: BFGSState, before: LayerStatistics) -> tuple[Any, ...]:
        """What states must share to be looked back at together."""
        gradient = before.mean_gradient
        assert gradient is not None
        return state.inverse.dtype, state.inverse.device, state.pair.weight, gradient.dtype

    def observe_many(
        self,
        states: Sequence[BFGSState],
        befores: Sequence[LayerStatistics],
        afters: Sequence[LayerStatistics | None],
        side: Side,
        damping: float,
    ) -> Events:
        """Average, damp, test and apply one pair per state; states of one :meth:`kind`."""
        inverses = [state.inverse for state in states]
        averages, finite, reference = average_pairs_([state.pair for state in states], befores, afters, self.average)
        pair, accepted, events = damped_pairs(
            averages, finite, reference, lambda rows: products(inverses, rows), self.pairs, self.skip, damping
        )
        bfgs_inverse_updates_(inverses, pair.step, pair.change, products(inverses, pair.change), accepted)
        return events


@dataclass
class HessianActionState(CovarianceState):
    """Second moment A of the inputs, undamped, and, as ``inverse``, the inverse approximation H_a."""

    replaced = frozenset()  # H_a is updated in place


@dataclass(frozen=True)
class HessianActionBFGS(AveragedMatrix):
    """BFGS with the exact action of the damped second moment: the input side of K-BFGS.

    ``s = H_a abar``, ``y = (A + damping I) s``, abar = mean input (PAPERS 1.2 item 8). H_a starts as the exact
    inverse; with a fixed A the update never moves it away from that inverse (PAPERS 1.4).

    Args:
        average: rule over steps for A.
        skip: which pairs (s, y) are used.

    Memory: 2 d^2 numbers.
    """

    average: Average = field(default_factory=lambda: MovingAverage(0.9))
    skip: SkipRule = field(default_factory=CurvatureTest)
    sides = frozenset[Side](("inputs",))
    waits = True

    def __post_init__(self) -> None:
        require_fields(self)

    def needs(self, side: Side) -> Needs:
        """Layer inputs, and to be called after every step: it learns there."""
        return Needs.INPUTS | Needs.PAIRS

    def scaling(self, side: Side) -> tuple[float, float]:
        """Inputs do not grow with the loss."""
        return 0.0, 0.0

    def takes_moment(self, side: Side) -> Sharing:
        """Of all rows; beside it the mean row."""
        return Expand()

    def init(self, size: int, like: Tensor) -> HessianActionState:
        """Nothing gathered."""
        identity = torch.eye(size, dtype=like.dtype, device=like.device)
        return HessianActionState(like.new_zeros(size, size), identity, 0.0)

    def update(self, state: CovarianceState, statistics: LayerStatistics, side: Side, average: Average | None) -> None:
        """Average A."""
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        accumulate_second_moment(state.second_moment, statistics, side, keep, add)

    def to_dense(self, state: CovarianceState, damping: float) -> Tensor:
        """H itself: A gave it the exact inverse at the first step only."""
        return state.inverse

    def observe_step(
        self,
        state: HessianActionState,
        before: LayerStatistics,
        after: LayerStatistics | None,
        side: Side,
        damping: float,
    ) -> Events:
        """One Hessian-action update with the inputs from before the step."""
        return self.observe_many([state], [before], [after], side, damping)

    def kind(self, state: HessianActionState, before: LayerStatistics) -> tuple[Any, ...]:
        """What states must share to be looked back at together."""
        return state.inverse.dtype, state.inverse.device

    def observe_many(
        self,
        states: Sequence[HessianActionState],
        befores: Sequence[LayerStatistics],
        afters: Sequence[LayerStatistics | None],
        side: Side,
        damping: float,
    ) -> Events:
        """One update per state; states of one :meth:`kind`."""
        inverses = [state.inverse for state in states]
        found = [before.mean_row().to(state.inverse.dtype) for state, before in zip(states, befores, strict=True)]
        means = pack_homogeneous(found, [before.layer.has_bias for before in befores])
        steps = products(inverses, means)
        changes = torch.add(products([state.second_moment for state in states], steps), steps, alpha=damping)
        accepted = self.skip.accepts(steps, changes, means)
        bfgs_inverse_updates_(inverses, steps, changes, products(inverses, changes), accepted)
        return {"rejected_pairs": (~accepted).sum()}
