"""Secant pairs on mini-blocks: every mini-block of a layer keeps the L-BFGS inverse of its own parameters. Ours.

Mini-Block Fisher (arXiv:2202.04124) gives each block a small dense matrix; here each block learns from its own secant
pairs, s = change of its parameters in the step, y = change of its gradient on the same mini-batch. Nobody has published
this. Because all blocks move at once, y = (H s)_b also holds what the other blocks' steps did to this block's gradient:
the pair damping has to take care of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import StructureDeclarations
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import require_positive_integer
from ..averages import Average, ZeroStartAverage
from ..damping.split import SideDamping
from ..linalg import Computed
from ..pairs.damping import DampedPair, DoubleDamping, PairDamping, dots
from ..pairs.initial_scale import InitialScale, NewestPair
from ..pairs.pipeline import AveragedPair, averaged, copy_all_, damped_pairs
from ..pairs.skipping import AngleTest, SkipRule
from ..protocol import Events, Observation, Request, Schedule
from ..state import State
from .partitions import Partition, PerOutput, block_diagonal

__all__ = ["SecantBlocks", "SecantBlocksState", "two_loop"]


@dataclass
class SecantBlocksState(State):
    """The last m accepted damped pairs of each of B blocks, oldest first; unused slots in front are zero.

    Attributes:
        steps: (m, B, d) s.
        changes: (m, B, d) y.
        curvatures: (m, B) s'y, zero in unused slots.
        scales: (B,) gamma of H_0 = gamma I.
        pair: averaged pairs, (B, d) each, undamped.
    """

    steps: Tensor
    changes: Tensor
    curvatures: Tensor
    scales: Tensor
    pair: AveragedPair


def two_loop(state: SecantBlocksState, vectors: Tensor) -> Tensor:
    """H v for every block by the two-loop recursion (Nocedal, Mathematics of Computation 35:773).

    Args:
        state: pairs and scales.
        vectors: (B, d) v.

    Returns:
        (B, d). Cost: 8 m B d flops; the loops run over the memory only.
    """
    weights = state.curvatures.reciprocal().masked_fill_(state.curvatures == 0, 0.0)
    pairs = list(zip(state.steps.unbind(0), state.changes.unbind(0), weights.unbind(0), strict=True))
    coefficients: list[Tensor] = []
    result = vectors
    for step, change, weight in reversed(pairs):
        coefficients.append((weight * (step * result).sum(-1)).unsqueeze(-1))
        result = torch.addcmul(result, coefficients[-1], change, value=-1.0)
    result = state.scales.unsqueeze(-1) * result
    for step, change, weight in pairs:
        back = (weight * (change * result).sum(-1)).unsqueeze(-1)
        result = torch.addcmul(result, coefficients.pop() - back, step)
    return result


@dataclass(frozen=True)
class SecantBlocks(StructureDeclarations):
    """direction = H_b M_b for every block b of a partition, H_b the L-BFGS inverse of the block's own secant pairs.

    Ours, unpublished. s = change of the block's parameters by the step that stayed, y = change of the gradient of the
    mean mini-batch loss, without weight decay; both are averaged over steps, damped with the whole lambda as mu2, and
    tested, as K-BFGS does it at the pre-activations (PAPERS 1.2 item 7), but with another test: without a bound on the
    angle between s and y, blocks in the middle of the small autoencoders reached |H_b| > 10^6 within twenty steps. H_b
    is positive definite: gamma > 0, and only pairs with s'y > 0 are stored. A pair whose squares are not finite is
    never stored nor averaged.

    Memory is linear in the parameters, so a partition that shares one matrix among its vectors to save memory
    (``PerOutputAveraged``, ``FlatChunk``) keeps an inverse for each of them here.

    Args:
        partition: which entries share a block.
        memory: m >= 1 pairs per block.
        pairs: how a pair is damped before it is stored.
        average: rule over steps for the undamped pair; decay 0 takes every step's own pair.
        skip: which damped pairs are stored; its reference is the block's mean gradient before the step.
        scale: gamma of H_0 = gamma I, for each block by itself; mapped by ``torch.func.vmap``.

    Memory: (2 m + 2) P + (m + 1) B numbers for the P parameters of B blocks. Cost: 8 m P flops per direction, and a
    second whole gradient per step.
    """

    partition: Partition = field(default_factory=PerOutput)
    memory: int = 4
    pairs: PairDamping = field(default_factory=DoubleDamping)
    average: Average = field(default_factory=lambda: ZeroStartAverage(0.9))
    skip: SkipRule = field(default_factory=AngleTest)
    scale: InitialScale = field(default_factory=NewestPair)
    needs = Needs.CHANGES
    waits = True
    schedule = Schedule(inverses=None)

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("memory", self.memory)

    @property
    def joint(self) -> bool:
        """As the partition wants it."""
        return self.partition.joint

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """What the partition covers."""
        return self.partition.serves(layer)

    def numbers(self, layer: Layer) -> int:
        """Pairs, averaged pairs, and small ones."""
        count, order = self.partition.shape(layer)
        return (2 * self.memory + 2) * count * order + (self.memory + 1) * count

    def init(self, layer: Layer, parameters: Tensors) -> SecantBlocksState:
        """Empty stores: H = gamma I."""
        (count, order), like = self.partition.shape(layer), parameters[0]
        pair = AveragedPair(like.new_zeros(count, order), like.new_zeros(count, order), 0.0)
        stores = (like.new_zeros(self.memory, count, order), like.new_zeros(self.memory, count, order))
        scales = like.new_full((count,), self.scale.initial)
        return SecantBlocksState(*stores, like.new_zeros(self.memory, count), scales, pair)

    def update(self, state: SecantBlocksState, observation: Observation, average: Average | None = None) -> None:
        """Nothing before the step."""

    def matrices(self, state: SecantBlocksState, damping: SideDamping) -> Sequence[Request]:
        """Never inverts."""
        return ()

    def install(self, state: SecantBlocksState, results: Sequence[Computed]) -> None:
        """Nothing."""

    def precondition(self, state: SecantBlocksState, momentum: Tensors) -> Tensors:
        """Blockwise product."""
        return self.partition.join(two_loop(state, self.partition.split(momentum)), momentum)

    def observe_step(
        self, state: SecantBlocksState, before: LayerStatistics, after: LayerStatistics | None, damping: SideDamping
    ) -> Events:
        """Average, damp, test and store one pair per block; events count blocks."""
        assert after is not None
        old, new = _point(self, before), _point(self, after)
        moved, kept = new - old, [state.pair.step, state.pair.change]
        finite = _finite(moved).all(0)
        averages, state.pair.weight = averaged(torch.stack(kept), moved, finite, state.pair.weight, self.average)
        copy_all_(kept, averages.unbind(0))
        pair, accepted, events = damped_pairs(
            averages, finite, old[1], partial(two_loop, state), self.pairs, _Storable(self.skip), damping.whole
        )
        self._store(state, pair, accepted)
        return events

    def _store(self, state: SecantBlocksState, pair: DampedPair, accepted: Tensor) -> None:
        """Push the oldest pair out where the new one is accepted. No synchronisation: the decision is arithmetic."""
        memory, count = state.curvatures.shape
        places = torch.arange(memory, device=accepted.device).unsqueeze(1) + accepted
        rows = (places * count + torch.arange(count, device=accepted.device)).view(-1)
        stores = (state.steps, state.changes, state.curvatures)
        for store, new in zip(stores, (pair.step, pair.change, (pair.step * pair.change).sum(1)), strict=True):
            longer = torch.cat([store, new.unsqueeze(0)]).flatten(0, 1)
            store.copy_(longer.index_select(0, rows).view_as(store))  # whole rows: cheaper than a choice per entry
        scales = torch.func.vmap(self.scale.scale)(pair.step, pair.change)
        state.scales.copy_(torch.where(accepted, scales, state.scales))

    def to_dense(self, state: SecantBlocksState, layer: Layer, damping: SideDamping) -> Tensor:
        """Block-diagonal matrix of the inverses of H_b over the served parameters (weight row-major, then bias)."""
        count, order = self.partition.shape(layer)
        identity = torch.eye(order, dtype=state.scales.dtype, device=state.scales.device)
        columns = torch.stack([two_loop(state, entry.expand(count, order)) for entry in identity], 2)
        inverses = torch.cholesky_inverse(torch.linalg.cholesky(0.5 * (columns + columns.mT)))
        return block_diagonal(self.partition, layer, inverses)


@dataclass(frozen=True)
class _Storable:
    """A skip rule, and nothing stored whose squares or 1 / s'y are not finite."""

    rule: SkipRule

    def accepts(self, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
        curvature = dots(step, change)
        finite = _finite(step) & _finite(change) & torch.isfinite(curvature) & torch.isfinite(1.0 / curvature)
        return self.rule.accepts(step, change, reference) & finite & (curvature > 0)


def _point(part: SecantBlocks, record: LayerStatistics) -> Tensor:
    """(2, B, d) parameters and their mean gradients at one evaluation."""
    assert record.parameters is not None and record.gradients is not None
    vectors = []
    for values in (record.parameters, record.gradients):
        named = dict(zip(record.layer.parameters, values, strict=True))
        served = tuple(named[name] for name in part.serves(record.layer))
        vectors.append(part.partition.split((record.layer.joint_matrix(served),) if part.joint else served))
    return torch.stack([vectors[0], record.mean_scale * vectors[1]])


def _finite(vectors: Tensor) -> Tensor:
    """Whether vectors along the last axis have finite squares."""
    return torch.isfinite(vectors.square().sum(-1))
