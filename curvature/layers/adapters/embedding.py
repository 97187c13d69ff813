"""``nn.Embedding``: a linear map on one-hot inputs that are never built unless a matrix is asked for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ....errors import ArgumentError, CompatibilityError
from .forwards import keeps_forward
from .protocol import LayerAdapter, MatrixAdapter

__all__ = ["ONE_HOT_LIMIT", "EmbeddingAdapter"]

ONE_HOT_LIMIT = 1024
"""Largest number of rows of a table that is read as a matrix: its second moment of one-hot inputs has this order."""


class EmbeddingAdapter(MatrixAdapter):
    """``nn.Embedding``: indices (N, ...), one position per index; the matrix (dim, rows) is the transposed table.

    The record is the index tensor. A table of more than :data:`ONE_HOT_LIMIT` rows is no matrix, but per-sample
    gradients and directional derivatives work for any size. The row of ``padding_idx`` has no gradient.
    """

    kind = "Embedding"

    def matches(self, module: nn.Module) -> bool:
        """Dense gradients that are not divided by the frequency of an index.

        Raises:
            ArgumentError: for a trainable table with sparse gradients.
        """
        if not keeps_forward(module, nn.Embedding):
            return False
        if module.sparse:
            raise ArgumentError(
                f"Embedding({module.num_embeddings}, {module.embedding_dim}) has sparse=True, and no part takes sparse "
                "gradients; build it with sparse=False, or freeze it"
            )
        return not module.scale_grad_by_freq

    def has_matrix(self, module: nn.Module) -> bool:
        """Small tables."""
        return _table(module).num_embeddings <= ONE_HOT_LIMIT

    def batched_ndim(self, module: nn.Module) -> int:
        """Samples and features."""
        return 2

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Product of the middle axes."""
        return output[0, ..., 0].numel()

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """One-hot rows (N, S, table rows), zero at the padding index.

        Raises:
            CompatibilityError: if the table is too large for it.
        """
        table = _table(module)
        if not self.has_matrix(module):
            raise CompatibilityError(
                f"a table of {table.num_embeddings} rows is not read as a matrix (limit {ONE_HOT_LIMIT}); serve it by "
                "a part that works on tensors (Diagonal, Identity)"
            )
        rows = functional.one_hot(value.flatten(1) if value.ndim > 1 else value.unsqueeze(1), table.num_embeddings)
        if table.padding_idx is not None:
            rows[..., table.padding_idx] = 0
        return rows.to(table.weight.dtype)

    def as_positions(self, module: nn.Module, value: Tensor) -> Tensor:
        """Indices (N, S)."""
        return value.reshape(value.shape[0], -1)

    def of_positions(self) -> LayerAdapter:
        """Indices are indices."""
        return self

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Rows of the direction; zero at the padding index."""
        assert weight is not None
        moved = functional.embedding(value, weight)
        padding = _table(module).padding_idx
        return moved if padding is None else moved.masked_fill_((value == padding).unsqueeze(-1), 0.0)

    def per_sample(self, module: nn.Module, value: Tensor, upstream: Tensor) -> Tensor:
        """Gradients added up by index, without one-hot rows."""
        table, (samples, positions, width) = _table(module), upstream.shape
        index = value.reshape(samples, positions)
        if table.padding_idx is not None:
            upstream = upstream.masked_fill((index == table.padding_idx).unsqueeze(-1), 0.0)
        result = upstream.new_zeros(samples, table.num_embeddings, width)
        return result.scatter_add_(1, index.unsqueeze(-1).expand(-1, -1, width), upstream)

    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The transposed table."""
        return weight.mT

    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The transposed matrix."""
        return matrix.mT


def _table(module: nn.Module) -> nn.Embedding:
    assert isinstance(module, nn.Embedding)
    return module
