"""Layers: what a module looks like to a second-order method.

A layer is a module together with its trainable parameters. An adapter (:mod:`.adapters`) tells how to read it as a
linear map ``h = W a + b`` applied at ``S`` shared positions of each of ``N`` samples. The axis convention, used
everywhere:

    ``n`` samples, ``s`` positions (``Linear``: 1 or the sequence length, convolutions: output sites),
    ``i`` inputs of the map (convolutions: channels x kernel), ``o`` outputs.

The bias is the last column of the layer matrix ``[W | b]`` (homogeneous coordinate last, as in the K-BFGS paper).
A module that no adapter recognises is a layer of kind ``"Other"``: it has parameters but no statistics, and gets the
fallback that the method declares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ...errors import CompatibilityError
from .adapters import LayerAdapter

__all__ = ["Layer", "LayerAdapter"]


@dataclass(frozen=True)
class Layer:
    """One module with trainable parameters.

    Attributes:
        name: qualified name of the module in the model (``"(root)"`` for the model itself).
        kind: ``"Linear"``, ``"Conv2d"``, ``"Attention"``, ... (:data:`.adapters.KINDS`) or ``"Other"``.
        module: the module.
        parameters: its own trainable parameters by name, ``weight`` before ``bias``.
        adapter: how to read it; ``None`` for kind ``"Other"``.
        others: further modules with the same parameters; their calls count as calls of this layer.
        batch_axis: the axis of its input and output that counts samples: 0, or 1 inside torch's own transformer layers
            built with ``batch_first=False``.
        note: why it is of kind ``"Other"`` although modules of its type usually are not; else empty.
    """

    name: str
    kind: str
    module: nn.Module = field(repr=False)
    parameters: dict[str, nn.Parameter] = field(repr=False)
    adapter: LayerAdapter | None = field(repr=False)
    others: tuple[nn.Module, ...] = field(default=(), repr=False)
    batch_axis: int = 0
    note: str = ""

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module whose calls are calls of this layer."""
        return (self.module, *self.others)

    @cached_property
    def is_matrix(self) -> bool:
        """Whether the layer has a trainable weight that can be read as a matrix (d_out, d_in)."""
        return self.adapter is not None and "weight" in self.parameters and self.adapter.has_matrix(self.module)

    @cached_property
    def has_bias(self) -> bool:
        """Whether a trainable bias is the last column of the layer matrix."""
        return "bias" in self.parameters

    @cached_property
    def groups(self) -> int:
        """Number G of groups: row o of the matrix sees the inputs of its own group."""
        return 1 if self.adapter is None else self.adapter.groups(self.module)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """Shape (d_out, d_in) of the weight as a matrix, without the bias column."""
        shape = self.parameters["weight"].shape
        rows, columns = self._reader().weight_as_matrix(self.module, torch.empty(shape, device="meta")).shape
        return rows, columns

    @cached_property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (d_out, d_in + 1 if there is a bias) of the layer matrix ``[W | b]``."""
        rows, columns = self.weight_shape
        return rows, columns + self.has_bias

    def joint_matrix(self, values: Sequence[Tensor]) -> Tensor:
        """Tensors in the shapes of (weight, bias), with any leading axes, as matrices (..., d_out, d_in [+ 1])."""
        weight = self._reader().weight_as_matrix(self.module, values[0])
        return torch.cat([weight, values[1].unsqueeze(-1)], -1) if len(values) > 1 else weight

    def parameter_views(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """A joint matrix (..., d_out, d_in [+ 1]) in the shapes of (weight, bias), without a copy."""
        reader = self.adapter or self._reader()
        if not self.has_bias:
            return (reader.matrix_as_weight(self.module, matrix),)
        return reader.matrix_as_weight(self.module, matrix[..., :-1]), matrix[..., -1]

    def entries(self) -> Tensor:
        """(d,) For every entry of weight and bias, in the parameters' own order, its place in the joint matrix.

        The place counts row by row: a matrix over the joint matrix's entries, indexed by this on both axes, is one over
        the parameters' entries.
        """
        rows, columns = self.matrix_shape
        places = torch.arange(rows * columns).reshape(rows, columns)
        return torch.cat([view.flatten() for view in self.parameter_views(places)])

    def _reader(self) -> LayerAdapter:
        if self.adapter is None:
            raise CompatibilityError(
                f"layer {self.name!r} ({type(self.module).__name__}) is of kind 'Other' and no matrix; serve it by a "
                "part that works on tensors (Diagonal, Identity)"
            )
        return self.adapter
