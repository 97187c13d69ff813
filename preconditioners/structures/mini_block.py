"""Mini-block structure: a layer's curvature is block diagonal with many small blocks (MBF, arXiv:2202.04124)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import Tensors
from ..averages import Average, MovingAverage
from ..damping.split import SideDamping
from ..linalg import Computed, accumulate_gram_, add_to_diagonal
from ..protocol import Observation, Request, ScalingLaw, Schedule
from ..state import State
from .identity import Stateless
from .partitions import Partition, PerOutput, block_diagonal

__all__ = ["MiniBlock", "MiniBlockState"]

_CHUNK = 64
"""Gradient vectors per layer that are expanded into outer products at a time (per-sample estimators)."""


@dataclass
class MiniBlockState(State):
    """Averaged blocks, undamped, and the last good inverses: (blocks, d, d), or (d, d) if shared."""

    blocks: Tensor
    inverse: Tensor
    weight: float
    replaced = frozenset(("inverse",))


@dataclass(frozen=True)
class MiniBlock(Stateless):
    """direction = (F_b + lambda I)^{-1} M_b for every block b of a partition.

    Implements: arXiv:2202.04124, blocks and schedule as in the authors' code (PAPERS 2.2, 2.3). Inverses of all blocks
    of one size, across layers, are one batched Cholesky.

    Args:
        partition: which entries share a block.
        average: rule over steps for F_b.
        schedule: (T1, T2) = (2, 25) for autoencoders, (10, 100) for CNNs in the paper.

    Memory: 2 blocks d^2 numbers, 2 d^2 if shared.
    """

    partition: Partition = field(default_factory=PerOutput)
    average: Average = field(default_factory=lambda: MovingAverage(0.9))
    schedule: Schedule = field(default_factory=lambda: Schedule(statistics=2, inverses=25, eager=25))
    needs = Needs.VECTORS
    scaling = ScalingLaw(2.0, whole=2.0)

    def __post_init__(self) -> None:
        require_fields(self)

    @property
    def joint(self) -> bool:
        """As the partition wants it."""
        return self.partition.joint

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """What the partition covers."""
        return self.partition.serves(layer)

    def numbers(self, layer: Layer) -> int:
        """Blocks and inverses."""
        count, order = self.partition.shape(layer)
        return 2 * order**2 * (1 if self.partition.shared(layer) else count)

    def bounds(self, state: MiniBlockState, layer: Layer, damping: SideDamping) -> tuple[float, float]:
        """(lambda, infinity)."""
        return damping.whole, float("inf")

    def init(self, layer: Layer, parameters: Tensors) -> MiniBlockState:
        """Zero blocks, identity inverses."""
        count, order = self.partition.shape(layer)
        like = parameters[0]
        shape = (order, order) if self.partition.shared(layer) else (count, order, order)
        identity = torch.eye(order, dtype=like.dtype, device=like.device).expand(shape).contiguous()
        return MiniBlockState(like.new_zeros(shape), identity, 0.0)

    def update(self, state: MiniBlockState, observation: Observation, average: Average | None = None) -> None:
        """F_b <- keep F_b + add mean over gradient vectors of v v'."""
        statistics = observation.statistics
        assert statistics is not None and statistics.vectors is not None
        keep, add, state.weight = (average or self.average).coefficients(state.weight)
        served = self.serves(statistics.layer)
        named = dict(zip(statistics.layer.parameters, statistics.vectors(), strict=True))
        values = tuple(named[name].to(state.blocks.dtype) for name in served)
        if self.joint:
            values = (statistics.layer.joint_matrix(values),)
        total = values[0].shape[0]
        for start in range(0, total, _CHUNK):
            chunk = tuple(value[start : start + _CHUNK] for value in values)
            self._accumulate(state.blocks, chunk, keep if start == 0 else 1.0, add / total)

    def _accumulate(self, blocks: Tensor, values: Tensors, keep: float, add: float) -> None:
        """Add the outer products of V gradients to ``blocks``."""
        vectors = [self.partition.split(tuple(value[v] for value in values)) for v in range(values[0].shape[0])]
        if blocks.ndim == 2:
            rows = vectors[0] if len(vectors) == 1 else torch.cat(vectors)
            accumulate_gram_(blocks, rows, keep, add / vectors[0].shape[0])
            return
        if len(vectors) == 1:  # entry by entry: a batched product of columns with rows takes three times as long
            column = vectors[0].unsqueeze(2)
            blocks.mul_(keep).addcmul_(column, column.mT, value=add)
            return
        columns = torch.stack(vectors, 2)  # (blocks, d, V)
        blocks.baddbmm_(columns, columns.transpose(1, 2), beta=keep, alpha=add)

    def mean_eigenvalue(self, state: MiniBlockState) -> Tensor:
        """Of the undamped blocks, all blocks of the layer together."""
        return state.blocks.diagonal(dim1=-2, dim2=-1).mean()

    def matrices(self, state: MiniBlockState, damping: SideDamping) -> Sequence[Request]:
        """All blocks of the layer as one request, damped by the whole lambda."""
        return (Request(state.blocks, damping.whole),)

    def install(self, state: MiniBlockState, results: Sequence[Computed]) -> None:
        """Keep the last good inverses if the factorisation failed."""
        if results[0].value is not None:
            state.inverse = results[0].value

    def precondition(self, state: MiniBlockState, momentum: Tensors) -> Tensors:
        """Blockwise product."""
        vectors = self.partition.split(momentum)
        if state.inverse.ndim == 2:
            return self.partition.join(vectors @ state.inverse, momentum)
        # The inverses are symmetric, and rows times matrices are read in the order in which they lie in memory.
        product = torch.bmm(vectors.unsqueeze(1), state.inverse).squeeze(1)
        return self.partition.join(product, momentum)

    def to_dense(self, state: MiniBlockState, layer: Layer, damping: SideDamping) -> Tensor:
        """Block-diagonal matrix over the served parameters (weight row-major, then bias)."""
        count, order = self.partition.shape(layer)
        damped = add_to_diagonal(state.blocks, damping.whole).expand(count, order, order)
        return block_diagonal(self.partition, layer, damped)
