"""Limited-memory BFGS as a factor, in compact form: the output side of K-BFGS(L)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
from ..pairs.pipeline import AveragedPair, average_pairs_, copy_all_, damped_pairs, pack, unpack
from ..pairs.skipping import CurvatureTest, SkipRule
from ..protocol import Events
from ..state import State
from .factor import Side

__all__ = ["LBFGS", "LBFGSState", "append_pairs_"]


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


def append_pairs_(states: Sequence[LBFGSState], steps: Tensor, changes: Tensor, accept: Tensor) -> None:
    """Drop the oldest pair and append a new one where ``accept`` (L,) is true; borders the small matrices.

    L states of one memory, with padded rows (L, d). No synchronisation: the decision is arithmetic.
    """
    memory, sizes = states[0].steps.shape[0], [state.steps.shape[1] for state in states]
    chosen = torch.arange(memory, device=steps.device) + accept.unsqueeze(-1)
    crosses: list[Tensor] = []
    rows = zip(states, unpack(steps, sizes), unpack(changes, sizes), chosen.unbind(0), strict=True)
    for state, step, change, kept in rows:
        for store, vector in ((state.steps, step), (state.changes, change)):
            store.copy_(torch.cat([store, vector.unsqueeze(0)]).index_select(0, kept))
        crosses += [state.changes @ step, state.steps @ change, state.changes @ change]
    row, column, square = torch.stack(crosses).view(-1, 3, memory).unbind(1)
    small = torch.stack([matrix for state in states for matrix in (state.cross, state.gram)])
    small = small.view(-1, 2, memory, memory)
    new = torch.zeros_like(small)
    new[..., :-1, :-1] = small[..., 1:, 1:]
    new[:, 0, -1, :], new[:, 0, :, -1] = row, column
    new[:, 1, -1, :] = new[:, 1, :, -1] = square
    small = torch.where(accept.view(-1, 1, 1, 1), new, small)
    upper = small[:, 0].triu()
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    diagonal.add_((diagonal == 0).to(upper.dtype))
    targets = [matrix for state in states for matrix in (state.cross, state.gram)]
    copy_all_(targets, list(small.flatten(0, 1).unbind(0)))
    copy_all_([state.solver for state in states], list(triangular_inverse(upper).unbind(0)))


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
        return self.observe_many([state], [before], [after], side, damping)

    def kind(self, state: LBFGSState, before: LayerStatistics) -> tuple[Any, ...]:
        """What states must share to be looked back at together."""
        gradient = before.mean_gradient
        assert gradient is not None
        return state.steps.dtype, state.steps.device, state.pair.weight, gradient.dtype

    def observe_many(
        self,
        states: Sequence[LBFGSState],
        befores: Sequence[LayerStatistics],
        afters: Sequence[LayerStatistics | None],
        side: Side,
        damping: float,
    ) -> Events:
        """Average, damp, test and store one pair per state; states of one :meth:`kind`."""
        averages, finite, reference = average_pairs_([state.pair for state in states], befores, afters, self.average)
        pair, accepted, events = damped_pairs(
            averages, finite, reference, lambda rows: self._products(states, rows), self.pairs, self.skip, damping
        )
        append_pairs_(states, pair.step, pair.change, accepted)
        return events

    def _products(self, states: Sequence[LBFGSState], rows: Tensor) -> Tensor:
        """:meth:`left` of one vector per state, padded rows (L, d); the p x p work of all states is done together."""
        gamma, vectors = self.initial, unpack(rows, [state.steps.shape[1] for state in states])
        both = [store @ v for state, v in zip(states, vectors, strict=True) for store in (state.steps, state.changes)]
        along, changed = torch.stack(both).view(len(states), 2, -1, 1).unbind(1)
        solver = torch.stack([state.solver for state in states])
        inner = solver @ along
        cross = torch.stack([state.cross.diagonal() for state in states]).unsqueeze(-1)
        gram = torch.stack([state.gram for state in states])
        outer = solver.mT @ (cross * inner + gamma * (gram @ inner) - gamma * changed)
        found = []
        for state, v, left, right in zip(states, vectors, outer.squeeze(-1), inner.squeeze(-1), strict=True):
            result = torch.addmv(v, state.steps.T, left, beta=gamma)
            found.append(result.addmv_(state.changes.T, right, alpha=-gamma))
        return pack(found)[0]

    def to_dense(self, state: LBFGSState, damping: float) -> Tensor:
        """H as a matrix."""
        size = state.steps.shape[1]
        return self.left(state, torch.eye(size, dtype=state.steps.dtype, device=state.steps.device))
