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
from ..linalg import Computed, bfgs_inverse_update_
from ..operations import Inverse
from ..pairs.damping import DampedPair, DoubleDamping, PairDamping
from ..pairs.skipping import CurvatureTest, SkipRule
from ..protocol import Events
from ..state import State
from .factor import Side, accumulate_second_moment

__all__ = ["BFGS", "AveragedPair", "BFGSState", "HessianActionBFGS", "HessianActionState", "average_pair_"]


@dataclass
class AveragedPair(State):
    """Moving averages of s and y, before damping (PAPERS 1.2 item 7)."""

    step: Tensor
    change: Tensor
    weight: float


def average_pair_(pair: AveragedPair, before: LayerStatistics, after: LayerStatistics, average: Average) -> Tensor:
    """Take the pair of one step into its averages: s = mean(h+ - h), y = mean(g+ - g).

    A non-finite pair never enters the averages.

    Returns:
        0-dimensional bool: whether the pair was finite.
    """
    assert before.mean_preactivation is not None and after.mean_preactivation is not None
    assert before.mean_gradient is not None and after.mean_gradient is not None
    step = after.mean_preactivation - before.mean_preactivation
    change = after.mean_gradient - before.mean_gradient
    finite = torch.isfinite(step).all() & torch.isfinite(change).all()
    keep, add, pair.weight = average.coefficients(pair.weight)
    for value, new in ((pair.step, step), (pair.change, change)):
        value.copy_(torch.where(finite, keep * value + add * new, value))
    return finite


def pair_events(pair: DampedPair, accepted: Tensor) -> Events:
    """Counts for the step report."""
    return {"damped_first": pair.first, "damped_second": pair.second, "rejected_pairs": ~accepted}


class _DenseInverse:
    """Products with a dense H."""

    def left(self, state: Any, value: Tensor) -> Tensor:
        """H @ value."""
        result: Tensor = state.inverse @ value
        return result

    def right(self, state: Any, value: Tensor) -> Tensor:
        """value @ H."""
        result: Tensor = value @ state.inverse
        return result

    def to_dense(self, state: Any, damping: float) -> Tensor:
        """H itself."""
        inverse: Tensor = state.inverse
        return inverse


@dataclass
class BFGSState(State):
    """Computed approximation H_g and the averaged pair."""

    inverse: Tensor
    pair: AveragedPair


@dataclass(frozen=True)
class BFGS(_DenseInverse):
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
    operation = Inverse()

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

    def update(self, state: BFGSState, statistics: LayerStatistics, side: Side, average: Average | None) -> None:
        """Nothing before the step."""

    def matrices(self, state: BFGSState) -> Sequence[Tensor]:
        """Never inverts."""
        return ()

    def install(self, state: BFGSState, results: Sequence[Computed]) -> None:
        """Nothing."""

    def observe_step(
        self, state: BFGSState, before: LayerStatistics, after: LayerStatistics | None, side: Side, damping: float
    ) -> Events:
        """Average, damp, test and apply one pair."""
        assert after is not None and before.mean_gradient is not None
        finite = average_pair_(state.pair, before, after, self.average)
        product = state.inverse @ state.pair.change
        pair = self.pairs.damp(state.pair.step, state.pair.change, product, damping)
        accepted = finite & self.skip.accepts(pair.step, pair.change, before.mean_gradient)
        bfgs_inverse_update_(state.inverse, pair.step, pair.change, state.inverse @ pair.change, accepted)
        return pair_events(pair, accepted)


@dataclass
class HessianActionState(State):
    """Second moment A of the inputs, undamped, and the inverse approximation H_a."""

    second_moment: Tensor
    inverse: Tensor
    weight: float


@dataclass(frozen=True)
class HessianActionBFGS(_DenseInverse):
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
    operation = Inverse()

    def __post_init__(self) -> None:
        require_fields(self)

    def needs(self, side: Side) -> Needs:
        """Layer inputs, and to be called after every step: it learns there."""
        return Needs.INPUTS | Needs.PAIRS

    def scaling(self, side: Side) -> tuple[float, float]:
        """Inputs do not grow with the loss."""
        return 0.0, 0.0

    def numbers(self, size: int) -> int:
        """A and H."""
        return 2 * size**2

    def init(self, size: int, like: Tensor) -> HessianActionState:
        """Nothing gathered."""
        identity = torch.eye(size, dtype=like.dtype, device=like.device)
        return HessianActionState(like.new_zeros(size, size), identity, 0.0)

    def update(
        self, state: HessianActionState, statistics: LayerStatistics, side: Side, average: Average | None
    ) -> None:
        """Average A."""
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        accumulate_second_moment(state.second_moment, statistics, side, keep, add)

    def matrices(self, state: HessianActionState) -> Sequence[Tensor]:
        """A, for the exact inverse at the first step."""
        return (state.second_moment,)

    def install(self, state: HessianActionState, results: Sequence[Computed]) -> None:
        """The exact inverse."""
        if results[0].value is not None:
            state.inverse = results[0].value

    def mean_eigenvalue(self, state: HessianActionState) -> Tensor:
        """Of the undamped matrix that is inverted, 0-dimensional: what ``Factored`` damping balances."""
        return self.matrices(state)[0].diagonal().mean()

    def observe_step(
        self,
        state: HessianActionState,
        before: LayerStatistics,
        after: LayerStatistics | None,
        side: Side,
        damping: float,
    ) -> Events:
        """One Hessian-action update with the inputs from before the step."""
        mean = before.mean_input().to(state.inverse.dtype)
        step = state.inverse @ mean
        change = torch.addmv(damping * step, state.second_moment, step)
        accepted = self.skip.accepts(step, change, mean)
        bfgs_inverse_update_(state.inverse, step, change, state.inverse @ change, accepted)
        return {"rejected_pairs": ~accepted}
