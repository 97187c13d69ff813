"""What an adapter is: how one kind of module is read as a linear map ``h = W a + b`` at shared positions.

Axes, used everywhere: ``n`` samples, ``s`` positions, ``g`` groups, ``i`` inputs of the map, ``o`` outputs. A grouped
map has G groups of outputs, and row o of its matrix sees the inputs of its own group only; its expanded input has G
rows per position, the group fastest.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ....errors import CompatibilityError

__all__ = ["Expanded", "LayerAdapter", "MatrixAdapter", "PatchAdapter", "ScaleAdapter"]


class LayerAdapter(Protocol):
    """How to read one kind of module as a linear map at shared positions. The adapters here inherit from it.

    Attributes:
        reads_calls: whether arguments of a call change how it is to be read: :meth:`of_call` is asked then.
    """

    reads_calls: ClassVar[bool] = False

    def of_call(self, module: nn.Module, value: Tensor, output: Tensor) -> LayerAdapter:
        """The adapter that reads one call with this input and output."""
        return self

    @property
    @abstractmethod
    def kind(self) -> str:
        """The layer's kind in tables and in ``ByLayer``."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this adapter can read ``module``."""

    @abstractmethod
    def has_matrix(self, module: nn.Module) -> bool:
        """Whether the weight can be read as a matrix (d_out, d_in)."""

    @abstractmethod
    def groups(self, module: nn.Module) -> int:
        """Number G >= 1 of groups."""

    @abstractmethod
    def batched_ndim(self, module: nn.Module) -> int:
        """Smallest number of axes of the output of a batch."""

    @abstractmethod
    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Number S of positions that share the map, from one output of the module."""

    @abstractmethod
    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """What is kept of an input during the forward pass, batch axis first."""

    @abstractmethod
    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """A recorded input as (N, S G, d_in), without the homogeneous 1."""

    @abstractmethod
    def expand_output(self, module: nn.Module, value: Tensor) -> Tensor:
        """Output of the module, or a gradient with respect to it, as (N, S, d_out)."""

    @abstractmethod
    def as_positions(self, module: nn.Module, value: Tensor) -> Tensor:
        """A recorded input as (N, S G, ...): calls with different numbers of positions are then joined along axis 1."""

    @abstractmethod
    def of_positions(self) -> LayerAdapter:
        """The adapter that reads inputs in that form, and outputs (N, S, d_out)."""

    @abstractmethod
    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output's derivative along a parameter direction: ``weight``, ``bias`` applied to a recorded input."""

    @abstractmethod
    def per_sample(self, module: nn.Module, value: Tensor, upstream: Tensor) -> Tensor:
        """Gradients (N, *weight.shape) of the weight from a recorded input and gradients (N, S, d_out) at the output.

        The first axis of ``value`` may be N times the number of calls.
        """

    @abstractmethod
    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """A tensor (..., *weight.shape) as matrices (..., d_out, d_in)."""

    @abstractmethod
    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """Matrices (..., d_out, d_in), of any strides, in the shape of the weight: always a view."""


class _Ungrouped(LayerAdapter):
    """What adapters share that know no groups, and whose recorded inputs are joined after they are expanded."""

    def groups(self, module: nn.Module) -> int:
        """One."""
        return 1

    def as_positions(self, module: nn.Module, value: Tensor) -> Tensor:
        """The expanded input."""
        return self.expand_input(module, value)


class MatrixAdapter(_Ungrouped):
    """What adapters share whose weight is a matrix (d_out, d_in) as it stands."""

    def has_matrix(self, module: nn.Module) -> bool:
        """Always."""
        return True

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The input as it is."""
        return value

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, ..., d_in) to (N, S, d_in)."""
        return value.reshape(value.shape[0], -1, value.shape[-1])

    def expand_output(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, ..., d_out) to (N, S, d_out)."""
        return value.reshape(value.shape[0], -1, value.shape[-1])

    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight."""
        return weight

    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The matrix."""
        return matrix

    def per_sample(self, module: nn.Module, value: Tensor, upstream: Tensor) -> Tensor:
        """``sum over s of g(n, s) a(n, s)'``, for each group of outputs with its own inputs."""
        groups = self.groups(module)
        rows = self.expand_input(module, value).flatten(0, 1)
        if groups == 1:
            product = torch.einsum("nso,nsi->noi", upstream, rows.unflatten(0, (upstream.shape[0], -1)))
            return self.matrix_as_weight(module, product)
        inputs = rows.unflatten(0, (*upstream.shape[:2], groups))
        product = torch.einsum("nsgo,nsgi->ngoi", upstream.unflatten(2, (groups, -1)), inputs).flatten(1, 2)
        return self.matrix_as_weight(module, product)


class Expanded:
    """Inputs that another adapter has expanded already: calls of one module on images of different sizes.

    Args:
        inner: the adapter that made the rows and knows the layout of the weight.
    """

    def __init__(self, inner: LayerAdapter):
        self.inner = inner

    @property
    def kind(self) -> str:
        """As the other adapter says."""
        return self.inner.kind

    def matches(self, module: nn.Module) -> bool:
        """Whatever the other adapter reads."""
        return self.inner.matches(module)


class PatchAdapter(Expanded, MatrixAdapter):
    """Expanded inputs of an adapter whose weight is a matrix."""

    def has_matrix(self, module: nn.Module) -> bool:
        """As the other adapter says."""
        return self.inner.has_matrix(module)

    def groups(self, module: nn.Module) -> int:
        """As the other adapter says."""
        return self.inner.groups(module)

    def batched_ndim(self, module: nn.Module) -> int:
        """Samples, positions, outputs."""
        return 3

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """The second axis."""
        return output.shape[1]

    def of_positions(self) -> LayerAdapter:
        """They are."""
        return self

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Rows times the direction's matrix, group by group."""
        groups = self.groups(module)
        if weight is None:
            assert bias is not None
            return bias.expand(value.shape[0], value.shape[1] // groups, -1).clone()
        matrix = self.inner.weight_as_matrix(module, weight).unflatten(0, (groups, -1))
        moved = torch.einsum("nsgi,goi->nsgo", value.unflatten(1, (-1, groups)), matrix).flatten(2)
        return moved if bias is None else moved + bias

    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """As the other adapter says."""
        return self.inner.weight_as_matrix(module, weight)

    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """As the other adapter says."""
        return self.inner.matrix_as_weight(module, matrix)


class ScaleAdapter(_Ungrouped):
    """What normalisations share: linear in (scale, shift), entry by entry, but not a matrix."""

    def has_matrix(self, module: nn.Module) -> bool:
        """Never."""
        return False

    def per_sample(self, module: nn.Module, value: Tensor, upstream: Tensor) -> Tensor:
        """Entrywise product, summed over positions."""
        rows = self.expand_input(module, value).reshape(upstream.shape)
        weight = module.weight
        assert isinstance(weight, Tensor)
        return (upstream * rows).sum(1).reshape(-1, *weight.shape)

    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Refused."""
        raise _no_matrix(module)

    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """Refused."""
        raise _no_matrix(module)


def _no_matrix(module: nn.Module) -> CompatibilityError:
    return CompatibilityError(
        f"the weight of {type(module).__name__} is not a matrix; serve it by a part that works on tensors (Diagonal, "
        "Identity)"
    )
