"""Two graph convolutions whose samples are labelled nodes.

The network maps nodes (N,) to logits (N, classes), and holds the whole graph. While gradients are wanted, it runs in a
form in which a *sample* is a node of the mini-batch, exactly as everywhere else in this library: the first linear map
sees (N, S, features), the propagated features of each node's S neighbours (itself among them, zeros where it has
fewer), the second one (N, hidden). So the gradient of a node's own loss is a sum over its own positions only, and
per-sample gradients, sampled Fisher information, mini-blocks and layer-wise steps are exact without a word about
graphs. A neighbour of two nodes appears twice, with the same dropout mask, so that outputs and gradients
are those of the usual form. PAPERS 5 asks for that reading: X W of a graph convolution is a dense layer whose input is
the propagated X.

Without gradients, in evaluation mode, the usual form runs: two sparse products over the whole graph.

K-FAC's output factor averages over all N S positions, empty ones included; it is a factor of the fill smaller than an
average over neighbours, which the damping takes up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ArgumentError

__all__ = ["GraphConvolutions", "Rows"]

Rows = tuple[Tensor, Tensor, Tensor]
"""A sparse matrix by rows: where each row starts (n + 1,), its columns and its values (entries,)."""


class GraphConvolutions(nn.Module):
    """softmax(P relu(P X W0) W1) at some nodes, before the softmax; P is the normalised adjacency, no biases.

    Args:
        features: of a node.
        hidden: width of the layer in between, >= 1.
        classes: of nodes.
        dropout: share of features and of hidden values that are dropped in training, in [0, 1).

    Source: Kipf and Welling, arXiv:1609.02907v4, equation 9, with their uniform distribution of Glorot and Bengio.
    """

    def __init__(self, features: int, hidden: int, classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden, bias=False)
        self.second = nn.Linear(hidden, classes, bias=False)
        self.dropout = dropout
        self.features: Rows | None = None
        self.propagation: Rows | None = None
        self._around: tuple[Tensor, Tensor, Tensor] | None = None
        self._measured: tuple[Tensor, int, _Sizes] | None = None
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)

    def set_context(self, *tensors: Tensor) -> None:
        """Take the graph: rows of X, then rows of P, three tensors each.

        Raises:
            ArgumentError: it is not six tensors.
        """
        if len(tensors) != 6:
            raise ArgumentError(f"a graph is 3 tensors of features and 3 of edges, got {len(tensors)}")
        self.features, self.propagation = (tensors[0], tensors[1], tensors[2]), (tensors[3], tensors[4], tensors[5])
        near = self.propagation[0].diff()
        reach = _sums(self.propagation, self.features[0].diff())
        self._around = near, _sums(self.propagation, near), _sums(self.propagation, reach)
        self._measured = None

    def forward(self, nodes: Tensor) -> Tensor:
        """Logits (N, classes) of nodes (N,)."""
        if self.features is None or self.propagation is None:
            raise ArgumentError("the model has no graph yet; give it the data's context with set_context(*context)")
        if self.training or torch.is_grad_enabled():
            return self._by_sample(nodes, self.features, self.propagation)
        features, propagation = _sparse(self.features, self.first.in_features), _sparse(self.propagation)
        hidden = torch.sparse.mm(propagation, torch.sparse.mm(features, self.first.weight.T)).relu()
        logits: Tensor = self.second(torch.sparse.mm(propagation, hidden))
        return logits[nodes]

    def _by_sample(self, nodes: Tensor, features: Rows, propagation: Rows) -> Tensor:
        starts, columns, values = features
        kept = functional.dropout(values, self.dropout, self.training)
        sizes = self._sizes(nodes)
        slots = sizes.slots
        owner, entry, slot = _entries(propagation[0], nodes, sizes.near)
        neighbours, weights = propagation[1][entry], propagation[2][entry]
        place = owner * slots + slot
        inputs = _propagated((starts, columns, kept), propagation, neighbours, place, sizes, self.first)
        hidden = self.first(inputs.unflatten(0, (len(nodes), slots))).relu()
        mask = functional.dropout(hidden.new_ones(len(starts) - 1, hidden.shape[-1]), self.dropout, self.training)
        factors = hidden.new_zeros(sizes.rows, hidden.shape[-1])
        factors = factors.index_copy(0, place, mask[neighbours] * weights.unsqueeze(1))
        logits: Tensor = self.second((hidden * factors.unflatten(0, (len(nodes), slots))).sum(1))
        return logits

    def _sizes(self, nodes: Tensor) -> _Sizes:
        """Shapes of a pass, which only the device knows: asked once for one tensor of nodes, in a single question."""
        version = -1 if nodes.is_inference() else nodes._version
        if self._measured is not None and version >= 0 and self._measured[0] is nodes and self._measured[1] == version:
            return self._measured[2]
        assert self._around is not None
        near, far, entries = (counts[nodes] for counts in self._around)
        slots, *totals = torch.stack([near.max(), near.sum(), far.sum(), entries.sum()]).tolist()
        sizes = _Sizes(len(nodes) * slots, slots, *totals)
        self._measured = (nodes, version, sizes)
        return sizes


class _Sizes(NamedTuple):
    """Of a pass: slots in all and per node, neighbours in all, neighbours of these, and entries of their features."""

    rows: int
    slots: int
    near: int
    far: int
    entries: int


def _propagated(
    features: Rows, propagation: Rows, nodes: Tensor, place: Tensor, sizes: _Sizes, layer: nn.Linear
) -> Tensor:
    """Rows of P X for ``nodes`` at ``place`` among the slots of all samples, the others zero; (slots, d) dense."""
    owner, edge, _ = _entries(propagation[0], nodes, sizes.far)
    source, entry, _ = _entries(features[0], propagation[1][edge], sizes.entries)
    values = propagation[2][edge][source] * features[2][entry]
    flat = place[owner][source] * layer.in_features + features[1][entry]
    dense = torch.zeros(sizes.rows * layer.in_features, dtype=layer.weight.dtype, device=values.device)
    return dense.index_add_(0, flat, values.to(dense.dtype)).view(-1, layer.in_features)


def _sums(rows: Rows, values: Tensor) -> Tensor:
    """(n,) for each row of a matrix the sum of ``values`` over its columns; whole numbers, so exact in any order."""
    before = torch.cat([values.new_zeros(1), values[rows[1]].cumsum(0)])
    return before[rows[0]].diff()


def _entries(starts: Tensor, rows: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every entry of the given rows, ``total`` in all: which row it is in, its number in the matrix and the row."""
    counts = starts[rows + 1] - starts[rows]
    owner = torch.repeat_interleave(counts, output_size=total)
    before = counts.cumsum(0) - counts
    within = torch.arange(len(owner), device=rows.device) - before[owner]
    return owner, starts[rows][owner] + within, within


def _sparse(rows: Rows, columns: int | None = None) -> Tensor:
    count = len(rows[0]) - 1
    index = torch.stack([torch.repeat_interleave(rows[0].diff(), output_size=len(rows[1])), rows[1]])
    return torch.sparse_coo_tensor(index, rows[2], (count, columns or count), is_coalesced=True, check_invariants=False)
