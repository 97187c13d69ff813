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
        owner, entry, slot = _entries(propagation[0], nodes)
        slots = int(slot.max()) + 1
        neighbours, weights = propagation[1][entry], propagation[2][entry]
        place = owner * slots + slot
        inputs = _propagated((starts, columns, kept), propagation, neighbours, place, len(nodes) * slots, self.first)
        hidden = self.first(inputs.unflatten(0, (len(nodes), slots))).relu()
        mask = functional.dropout(hidden.new_ones(len(starts) - 1, hidden.shape[-1]), self.dropout, self.training)
        factors = hidden.new_zeros(len(nodes) * slots, hidden.shape[-1])
        factors = factors.index_copy(0, place, mask[neighbours] * weights.unsqueeze(1))
        logits: Tensor = self.second((hidden * factors.unflatten(0, (len(nodes), slots))).sum(1))
        return logits


def _propagated(
    features: Rows, propagation: Rows, nodes: Tensor, place: Tensor, count: int, layer: nn.Linear
) -> Tensor:
    """Rows of P X for ``nodes`` at ``place`` among ``count`` rows, the others zero; (count, d) dense."""
    owner, edge, _ = _entries(propagation[0], nodes)
    source, entry, _ = _entries(features[0], propagation[1][edge])
    values = propagation[2][edge][source] * features[2][entry]
    flat = place[owner][source] * layer.in_features + features[1][entry]
    dense = torch.zeros(count * layer.in_features, dtype=layer.weight.dtype, device=values.device)
    return dense.index_add_(0, flat, values.to(dense.dtype)).view(count, layer.in_features)


def _entries(starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every entry of the given rows: which of them it is in, its number in the matrix, its number in the row."""
    counts = starts[rows + 1] - starts[rows]
    owner = torch.repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    within = torch.arange(len(owner), device=rows.device) - before[owner]
    return owner, starts[rows][owner] + within, within


def _sparse(rows: Rows, columns: int | None = None) -> Tensor:
    count = len(rows[0]) - 1
    index = torch.stack([torch.repeat_interleave(rows[0].diff()), rows[1]])
    return torch.sparse_coo_tensor(index, rows[2], (count, columns or count), is_coalesced=True, check_invariants=False)
