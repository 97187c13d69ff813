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
from ..linalg import pack, triangular_inverse, unpack
from ..pairs.damping import DoubleDamping, PairDamping
from ..pairs.pipeline import AveragedPair, average_pairs_, copy_all_, damped_pairs
from ..pairs.skipping import CurvatureTest, SkipRule
from ..protocol import Events
from ..state import State
from .factor import Side, WithoutMatrices

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

    def __post_init__(self) -> None:
        """Steps and changes become views of one memory, and so do the small matrices: one operation serves all."""
        self.stores = torch.stack([self.steps, self.changes])  # (2, p, d)
        self.both = self.stores.view(-1, self.steps.shape[1])  # (2 p, d)
        self.small = torch.stack([self.cross, self.gram, self.solver])  # (3, p, p)
        self.steps, self.changes = self.stores.unbind(0)
        self.cross, self.gram, self.solver = self.small.unbind(0)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a pickle would not keep the shared memory."""
        return {name: value for name, value in self.__dict__.items() if name not in ("stores", "both", "small")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: views of its own memory."""
        self.__dict__.update(state)
        self.__post_init__()


def append_pairs_(states: Sequence[LBFGSState], steps: Tensor, changes: Tensor, accept: Tensor) -> None:
    """Drop the oldest pair and append a new one where ``accept`` (L,) is true; borders the small matrices.

    L states of one memory, with padded rows (L, d). No synchronisation: the decision is arithmetic.
    """
    memory, sizes = states[0].steps.shape[0], [state.steps.shape[1] for state in states]
    vectors = [row[:, :size] for row, size in zip(torch.stack([steps, changes], 1).unbind(0), sizes, strict=True)]
    products: list[Tensor] = []
    chosen: list[Tensor] = []
    rows = torch.arange(memory, device=steps.device) + accept.unsqueeze(-1)
    for longer, pair, kept in zip(_longer(states, vectors), vectors, rows.unbind(0), strict=True):
        chosen.append(longer.index_select(1, kept))
        products.append(chosen[-1].flatten(0, 1) @ pair.T)
    borders = torch.stack(products).unflatten(1, (2, memory))  # of s (over steps, over changes) and y, (L, 2, p, 2)
    small = torch.stack([state.small for state in states])
    inner = torch.cat([small[:, :2, 1:, 1:], borders[:, :, :-1, 1:]], -1)
    new = torch.cat([inner, borders[:, 1].mT.unsqueeze(2)], 2)
    new = torch.where(accept.view(-1, 1, 1, 1), new, small[:, :2])
    upper = new[:, 0].triu()
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    diagonal.masked_fill_(diagonal == 0, 1.0)
    targets = [matrix for state in states for matrix in (state.cross, state.gram)]
    targets += [state.solver for state in states] + [state.stores for state in states]
    values = [*new.flatten(0, 1).unbind(0), *triangular_inverse(upper).unbind(0), *chosen]
    copy_all_(targets, values)


def _longer(states: Sequence[LBFGSState], pairs: Sequence[Tensor]) -> list[Tensor]:
    """The stores (2, p, d) of many states with one more pair (2, d) behind theirs, all written by one operation."""
    memory = states[0].steps.shape[0]
    rows = [
        piece.reshape(-1)
        for state, pair in zip(states, pairs, strict=True)
        for kind, vector in enumerate(pair.unbind(0))
        for piece in (state.stores[kind], vector)
    ]
    sizes = [2 * (memory + 1) * pair.shape[1] for pair in pairs]
    return [piece.view(2, memory + 1, -1) for piece in torch.cat(rows).split(sizes)]


@dataclass(frozen=True)
class LBFGS(WithoutMatrices):
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
    waits = True

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

    def left(self, state: LBFGSState, value: Tensor) -> Tensor:
        """H @ value with four products of p x d matrices."""
        gamma, memory, both = self.initial, state.steps.shape[0], state.both
        along, changed = (both @ value).split(memory)
        inner = state.solver @ along
        scaled = torch.addmm(changed, state.gram, inner, beta=-gamma, alpha=gamma)
        outer = state.solver.T @ scaled.addcmul_(state.cross.diagonal().unsqueeze(1), inner)
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
        products = torch.stack([state.both @ v for state, v in zip(states, vectors, strict=True)])
        along, changed = products.unflatten(1, (2, -1)).unsqueeze(-1).unbind(1)
        cross, gram, solver = torch.stack([state.small for state in states]).unbind(1)
        inner = solver @ along
        scaled = torch.baddbmm(changed, gram, inner, beta=-gamma, alpha=gamma)
        outer = solver.mT @ torch.addcmul(scaled, cross.diagonal(dim1=1, dim2=2).unsqueeze(-1), inner)
        weights = torch.cat([outer, -gamma * inner], 1).squeeze(-1).unbind(0)
        found = [
            torch.addmv(v, state.both.T, weight, beta=gamma)
            for state, v, weight in zip(states, vectors, weights, strict=True)
        ]
        return pack(found)

    def to_dense(self, state: LBFGSState, damping: float) -> Tensor:
        """H as a matrix."""
        size = state.steps.shape[1]
        return self.left(state, torch.eye(size, dtype=state.steps.dtype, device=state.steps.device))
