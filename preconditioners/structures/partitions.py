"""Partitions: which entries of a layer's gradient share a mini-block (PAPERS 2.2).

A partition turns a batch of layer gradients into vectors, one per block, and back. A *shared* partition has many
vectors but one matrix: the average of their outer products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.layers.layer import Layer
from ...curvature.records.statistics import Tensors
from ...errors import require_positive_integer

__all__ = [
    "FlatChunk",
    "Kernel",
    "Partition",
    "PerInputAveraged",
    "PerOutput",
    "PerOutputAveraged",
    "block_diagonal",
]


class Partition(Protocol):
    """Blocks of one layer. ``joint`` as in ``Preconditioner``; ``shared``: one matrix for all vectors."""

    joint: bool

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Parameters covered by the blocks."""

    def shared(self, layer: Layer) -> bool:
        """Whether all vectors of this layer share one matrix."""

    def shape(self, layer: Layer) -> tuple[int, int]:
        """(number of vectors, length of a vector)."""

    def split(self, values: Tensors) -> Tensor:
        """Storage (one joint matrix, or the covered parameters) to vectors (blocks, length)."""

    def join(self, vectors: Tensor, like: Tensors) -> Tensors:
        """The inverse of :meth:`split`."""


def block_diagonal(partition: Partition, layer: Layer, blocks: Tensor) -> Tensor:
    """One matrix per vector, (blocks, length, length), as a matrix over the entries of the covered parameters."""
    served = [layer.parameters[name] for name in partition.serves(layer)]
    labels = torch.arange(sum(parameter.numel() for parameter in served))
    pieces = labels.split([parameter.numel() for parameter in served])
    values = tuple(piece.reshape(parameter.shape) for piece, parameter in zip(pieces, served, strict=True))
    storage = (layer.joint_matrix(values),) if partition.joint else values
    dense = torch.zeros(labels.numel(), labels.numel(), dtype=blocks.dtype, device=blocks.device)
    for block, entries in zip(blocks, partition.split(storage), strict=True):
        dense[entries.unsqueeze(1), entries.unsqueeze(0)] = block
    return dense


class _Joint:
    joint = True

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Weight and bias of layers that are matrices."""
        return tuple(layer.parameters) if layer.is_matrix else ()


@dataclass(frozen=True)
class PerOutputAveraged(_Joint):
    """One (d_in+1)^2 matrix per layer: the average over output neurons of their rows' outer products."""

    def shared(self, layer: Layer) -> bool:
        """One matrix."""
        return True

    def shape(self, layer: Layer) -> tuple[int, int]:
        """Rows of [W | b]."""
        return layer.matrix_shape

    def split(self, values: Tensors) -> Tensor:
        """The rows."""
        return values[0]

    def join(self, vectors: Tensor, like: Tensors) -> Tensors:
        """The rows."""
        return (vectors,)


@dataclass(frozen=True)
class PerOutput(PerOutputAveraged):
    """The paper's definition for dense layers: one (d_in+1)^2 matrix per output neuron (weights and bias into it).

    Args:
        limit: layers whose blocks would hold more than this many numbers share one averaged matrix instead (PAPERS 5).
            Default 2^22: 16 MiB in float32, twice that with the inverses.
    """

    limit: int = 2**22

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("limit", self.limit)

    def shared(self, layer: Layer) -> bool:
        """Only where the limit is exceeded."""
        rows, columns = layer.matrix_shape
        return rows * columns**2 > self.limit


@dataclass(frozen=True)
class PerInputAveraged(_Joint):
    """One d_out x d_out matrix per layer: the average over inputs (bias included) of their columns' outer products."""

    def shared(self, layer: Layer) -> bool:
        """One matrix."""
        return True

    def shape(self, layer: Layer) -> tuple[int, int]:
        """Columns of [W | b]."""
        rows, columns = layer.matrix_shape
        return columns, rows

    def split(self, values: Tensors) -> Tensor:
        """The columns."""
        return values[0].T

    def join(self, vectors: Tensor, like: Tensors) -> Tensors:
        """The columns."""
        return (vectors.T,)


@dataclass(frozen=True)
class FlatChunk(_Joint):
    """What the authors' released driver runs on dense layers: [W | b] written row by row and cut into chunks of d_out.

    One d_out x d_out matrix, the average of the chunks' outer products. Unless d_out = d_in + 1 a chunk is neither a
    row nor a column of the weight matrix: kept for comparison with the released numbers, not as a recommendation.
    """

    def shared(self, layer: Layer) -> bool:
        """One matrix."""
        return True

    def shape(self, layer: Layer) -> tuple[int, int]:
        """d_in+1 chunks of length d_out."""
        rows, columns = layer.matrix_shape
        return columns, rows

    def split(self, values: Tensors) -> Tensor:
        """Chunks; a view of the row-major matrix."""
        rows, columns = values[0].shape
        return values[0].reshape(columns, rows)

    def join(self, vectors: Tensor, like: Tensors) -> Tensors:
        """Back to the matrix."""
        return (vectors.reshape(like[0].shape),)


@dataclass(frozen=True)
class Kernel:
    """Convolutions of any kind: one matrix per (output channel, input channel) pair; biases are not covered.

    Its order is the size of a kernel: k in one dimension, k^2 in two, k^3 in three.
    """

    joint = False

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """The weight of a convolution."""
        return ("weight",) if layer.kind.startswith("Conv") and "weight" in layer.parameters else ()

    def shared(self, layer: Layer) -> bool:
        """One matrix per kernel."""
        return False

    def shape(self, layer: Layer) -> tuple[int, int]:
        """(channel pairs, kernel size)."""
        weight = layer.parameters["weight"]
        return weight.shape[0] * weight.shape[1], weight[0, 0].numel()

    def split(self, values: Tensors) -> Tensor:
        """Kernels, flattened row by row."""
        return values[0].flatten(2).flatten(0, 1)

    def join(self, vectors: Tensor, like: Tensors) -> Tensors:
        """Back to the kernel tensor."""
        return (vectors.reshape(like[0].shape),)
