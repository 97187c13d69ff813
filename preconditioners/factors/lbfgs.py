"""Limited-memory BFGS as a factor, in compact form: the output side of K-BFGS(L)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics
from ...errors import require_interval, require_positive_integer
from ..averages import Average, ZeroStartAverage
from ..linalg import Computed, triangular_inverse
from ..operations import Inverse
from ..pairs.damping import DoubleDamping, PairDamping
from ..pairs.skipping import CurvatureTest, SkipRule
from ..protocol import Events
from ..state import State
from .bfgs import AveragedPair, average_pair_, pair_events
from .factor import Side

__all__ = ["LBFGS", "LBFGSState", "append_pair_"]


@dataclass
class LBFGSState(State):
    """The last p accepted damped pairs, oldest first; unused slots in front are zero.

    Attributes:
        steps: (p, d) rows s_i.
        changes: (p, d) rows y_i.
        cross: (p, p) s_i'y_j.
        gram: (p, p) y_i'y_j.
        solver: (p, p) inverse of R, the upper triangle of ``cross`` (with ones on the diagonal of unused slots).
        pair: averaged pair, undamped.
    """

    steps: Tensor
    changes: Tensor
    cross: Tensor
    gram: Tensor
    solver: Tensor
    pair: AveragedPair


def append_pair_(state: LBFGSState, step: Tensor, change: Tensor, accept: Tensor) -> None:
    """Drop the oldest pair and append a new one where ``accept`` is true; borders the small matrices.

    No synchronisation: the decision is arithmetic.
    """
    steps = torch.cat([state.steps[1:], step.unsqueeze(0)])
    changes = torch.cat([state.changes[1:], change.unsqueeze(0)])
    cross, gram = _shifted(state.cross), _shifted(state.gram)
    cross[-1, :], cross[:, -1] = changes @ step, steps @ change
    gram[-1, :] = gram[:, -1] = changes @ change
    for old, new in (
        (state.steps, steps),
        (state.changes, changes),
        (state.cross, cross),
        (state.gram, gram),
    ):
        old.copy_(torch.where(accept, new, old))
    upper = state.cross.triu()
    empty = upper.diagonal() == 0
    upper.diagonal().add_(empty.to(upper.dtype))
    state.solver.copy_(triangular_inverse(upper))


def _shifted(matrix: Tensor) -> Tensor:
    result = torch.zeros_like(matrix)
    result[:-1, :-1] = matrix[1:, 1:]
    return result


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS(p) on damped, averaged secant pairs (arXiv:2006.08877; PAPERS 1.2, compact form).

    ``H = gamma I + Q'[(D + gamma Y Y')Q - gamma Y] - gamma Y'Q`` with rows s_i of S, y_i of Y, R_ij = s_i'y_j for
    i <= j, D = diag R, Q = R^{-1} S. The initial matrix stays gamma I.

    Args:
        memory: p >= 1 pairs.
        pairs: how a pair is damped before it is stored.
        average: rule over steps for the undamped pair; decay 0 in full-batch mode.
        initial: gamma > 0.
        skip: which damped pairs are stored.

    Memory: 2 p d + 3 p^2 + 2 d numbers. Cost: products with H cost 8 p d flops per column, so a layer with
    d < 4 p outputs is served cheaper by the dense ``BFGS``.
    """

    memory: int = 100
    pairs: PairDamping = field(default_factory=DoubleDamping)
    average: Average = field(default_factory=lambda: ZeroStartAverage(0.9))
    initial: float = 1.0
    skip: SkipRule = field(default_factory=CurvatureTest)
    sides = frozenset[Side](("outputs",))
    operation = Inverse()

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("memory", self.memory)
        require_interval("initial", self.initial, 0.0, float("inf"), closed="()")

    def needs(self, side: Side) -> Needs:
        """Secant pairs."""
        return Needs.PAIRS

    def numbers(self, size: int) -> int:
        """Pairs, three small matrices and the averaged pair."""
        return 2 * self.memory * size + 3 * self.memory**2 + 2 * size

    def init(self, size: int, like: Tensor) -> LBFGSState:
        """An empty store: H = gamma I."""
        p = self.memory
        pair = AveragedPair(like.new_zeros(size), like.new_zeros(size), 0.0)
        stores = (like.new_zeros(p, size), like.new_zeros(p, size), like.new_zeros(p, p), like.new_zeros(p, p))
        return LBFGSState(*stores, torch.eye(p, dtype=like.dtype, device=like.device), pair)

    def update(self, state: LBFGSState, statistics: LayerStatistics, side: Side, average: Average | None) -> None:
        """Nothing before the step."""

    def matrices(self, state: LBFGSState) -> Sequence[Tensor]:
        """Never inverts."""
        return ()

    def install(self, state: LBFGSState, results: Sequence[Computed]) -> None:
        """Nothing."""

    def left(self, state: LBFGSState, value: Tensor) -> Tensor:
        """H @ value with four products of p x d matrices."""
        gamma = self.initial
        inner = state.solver @ (state.steps @ value)
        changed = gamma * (state.changes @ value)
        scaled = state.cross.diagonal().unsqueeze(1) * inner + gamma * (state.gram @ inner)
        outer = state.solver.T @ (scaled - changed)
        result = torch.addmm(value, state.steps.T, outer, beta=gamma)
        return result.addmm_(state.changes.T, inner, alpha=-gamma)

    def right(self, state: LBFGSState, value: Tensor) -> Tensor:
        """value @ H by symmetry."""
        return self.left(state, value.T).T

    def observe_step(
        self, state: LBFGSState, before: LayerStatistics, after: LayerStatistics | None, side: Side, damping: float
    ) -> Events:
        """Average, damp, test and store one pair."""
        assert after is not None and before.mean_gradient is not None
        finite = average_pair_(state.pair, before, after, self.average)
        product = self.left(state, state.pair.change.unsqueeze(1)).squeeze(1)
        pair = self.pairs.damp(state.pair.step, state.pair.change, product, damping)
        accepted = finite & self.skip.accepts(pair.step, pair.change, before.mean_gradient)
        append_pair_(state, pair.step, pair.change, accepted)
        return pair_events(pair, accepted)

    def to_dense(self, state: LBFGSState, damping: float) -> Tensor:
        """H as a matrix."""
        size = state.steps.shape[1]
        return self.left(state, torch.eye(size, dtype=state.steps.dtype, device=state.steps.device))
