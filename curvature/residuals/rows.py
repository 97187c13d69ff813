"""A linear layer whose rows are listed one by one, with the homogeneous coordinate in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from ..layers.adapters.linear import LinearAdapter
from ..layers.layer import Layer

__all__ = ["RowsAdapter", "RowsLayer"]


class RowsAdapter(LinearAdapter):
    """Inputs (R, d_in + 1) with the homogeneous coordinate, outputs (R', d_out): a row is a position."""

    def matches(self, module: nn.Module) -> bool:
        """Nothing: it reads records, not modules."""
        return False

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """(R, 1, d_in + 1)."""
        return value.unsqueeze(1)

    def expand_output(self, module: nn.Module, value: Tensor) -> Tensor:
        """(R, 1, d_out)."""
        return value.unsqueeze(1)


@dataclass(frozen=True)
class RowsLayer(Layer):
    """A layer whose recorded inputs have their last column already: no row gets a 1 that its product did not have."""

    @classmethod
    def of(cls, layer: Layer) -> Self:
        """The same layer, read so."""
        return cls(layer.name, layer.kind, layer.module, layer.parameters, RowsAdapter(), layer.others)

    @property
    def has_bias(self) -> bool:
        """Not for rows; :meth:`joint_matrix` and the shapes of the parameters are those of the layer."""
        return False
