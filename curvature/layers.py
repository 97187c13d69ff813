"""Layers: what a module looks like to a second-order method.

A layer is a module together with its trainable parameters. An adapter tells how to read it as a linear map
``h = W a + b`` applied at ``S`` shared positions of each of ``N`` samples. The axis convention, used everywhere:

    ``n`` samples, ``s`` positions (``Linear``: 1 or the sequence length, ``Conv2d``: output sites),
    ``i`` inputs of the map (``Conv2d``: channels x kernel), ``o`` outputs.

The bias is the last column of the layer matrix ``[W | b]`` (homogeneous coordinate last, as in the K-BFGS paper).
A module that no adapter recognises is a layer of kind ``"Other"``: it has parameters but no statistics, and gets the
fallback that the method declares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BatchNormAdapter", "Conv2dAdapter", "Layer", "LayerAdapter", "LinearAdapter", "discover_layers"]


class LayerAdapter(Protocol):
    """How to read one kind of module as a linear map at shared positions."""

    kind: str
    is_matrix: bool
    batched_ndim: int

    def matches(self, module: nn.Module) -> bool:
        """Whether this adapter can read ``module``."""

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Number S of positions that share the map, from one output of the module."""

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """What is kept of an input during the forward pass, batch axis first."""

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """A recorded input as (N, S, d_in), without the homogeneous 1."""

    def expand_output(self, module: nn.Module, value: Tensor) -> Tensor:
        """Output of the module, or a gradient with respect to it, as (N, S, d_out)."""

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output's derivative along a parameter direction: ``weight``, ``bias`` applied to a recorded input."""


class LinearAdapter:
    """``nn.Linear`` on inputs (N, d_in) or (N, ..., d_in); the middle axes are positions."""

    kind = "Linear"
    is_matrix = True
    batched_ndim = 2

    def matches(self, module: nn.Module) -> bool:
        """``nn.Linear`` and subclasses that keep its forward, but for the one whose forward attention never calls."""
        uncalled = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not uncalled

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Product of the middle axes."""
        return output[0, ..., 0].numel()

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The input as it is."""
        return value

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, ..., d_in) to (N, S, d_in)."""
        return value.reshape(value.shape[0], -1, value.shape[-1])

    expand_output = expand_input

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``a @ weight.T + bias``; a missing direction counts as zero."""
        if weight is None:
            assert bias is not None
            return bias.expand(*value.shape[:-1], bias.shape[0]).clone()
        return functional.linear(value, weight, bias)


class Conv2dAdapter:
    """``nn.Conv2d`` with one group and zero padding; a position is an output site, an input row is a patch."""

    kind = "Conv2d"
    is_matrix = True
    batched_ndim = 4

    def matches(self, module: nn.Module) -> bool:
        """One group, zero padding given in numbers."""
        return (
            isinstance(module, nn.Conv2d)
            and type(module).forward is nn.Conv2d.forward
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Height times width of the output."""
        return output.shape[-2] * output.shape[-1]

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The input as it is."""
        return value

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """Patches (N, S, channels x kernel height x kernel width), channel slowest as in ``weight.flatten(1)``."""
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
        patches = functional.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2)

    def expand_output(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, d_out, H, W) to (N, S, d_out)."""
        return value.flatten(2).transpose(1, 2)

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The convolution with ``weight`` and ``bias`` in the place of the module's own."""
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
        kernel = torch.zeros_like(module.weight) if weight is None else weight
        return functional.conv2d(value, kernel, bias, module.stride, module.padding, module.dilation)


class BatchNormAdapter:
    """``nn.BatchNorm1d/2d/3d`` with scale and shift: linear in (scale, shift), but not a matrix.

    In training mode the batch statistics couple the samples; as in the papers that coupling is ignored, which makes
    per-sample quantities of this layer (and of those below it) an approximation.
    """

    kind = "BatchNorm"
    is_matrix = False
    batched_ndim = 2

    def matches(self, module: nn.Module) -> bool:
        """Any batch normalisation with affine parameters."""
        return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Product of the axes after the channel axis."""
        return output[0, 0].numel()

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The normalised input, with the statistics that this call uses; buffers stay untouched."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training or module.running_mean is None:
            return functional.batch_norm(value, None, None, training=True, eps=module.eps)
        return functional.batch_norm(value, module.running_mean, module.running_var, eps=module.eps)

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, channels, ...) to (N, S, channels)."""
        return value.reshape(value.shape[0], value.shape[1], -1).transpose(1, 2)

    expand_output = expand_input

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``normalised * weight + bias``; a missing direction counts as zero."""
        shape = (1, -1) + (1,) * (value.ndim - 2)
        moved = torch.zeros_like(value) if weight is None else value * weight.view(shape)
        return moved if bias is None else moved.add_(bias.view(shape))


ADAPTERS: tuple[LayerAdapter, ...] = (LinearAdapter(), Conv2dAdapter(), BatchNormAdapter())


@dataclass(frozen=True)
class Layer:
    """One module with trainable parameters.

    Attributes:
        name: qualified name of the module in the model (``"(root)"`` for the model itself).
        kind: ``"Linear"``, ``"Conv2d"``, ``"BatchNorm"`` or ``"Other"``.
        module: the module.
        parameters: its own trainable parameters by name, in the module's order (``weight`` before ``bias``).
        adapter: how to read it; ``None`` for kind ``"Other"``.
    """

    name: str
    kind: str
    module: nn.Module = field(repr=False)
    parameters: dict[str, nn.Parameter] = field(repr=False)
    adapter: LayerAdapter | None = field(repr=False)

    @property
    def is_matrix(self) -> bool:
        """Whether the layer has a trainable weight that can be read as a matrix (d_out, d_in)."""
        return self.adapter is not None and self.adapter.is_matrix and "weight" in self.parameters

    @property
    def has_bias(self) -> bool:
        """Whether a trainable bias is the last column of the layer matrix."""
        return "bias" in self.parameters

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape (d_out, d_in) of the weight as a matrix, without the bias column."""
        weight = self.parameters["weight"]
        return weight.shape[0], weight[0].numel()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (d_out, d_in + 1 if there is a bias) of the layer matrix ``[W | b]``."""
        rows, columns = self.weight_shape
        return rows, columns + self.has_bias


def discover_layers(model: nn.Module, adapters: Sequence[LayerAdapter] = ADAPTERS) -> list[Layer]:
    """All layers of ``model`` with at least one trainable parameter, in the model's order.

    A parameter that several modules share belongs to the first of them, and every module that shares one is of kind
    ``"Other"``: its statistics would count only one of its uses.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {
            key: parameter
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in seen
        }
        if not own:
            continue
        seen.update(id(parameter) for parameter in own.values())
        tied = any(owners[id(parameter)] > 1 for parameter in own.values())
        adapter = None if tied else next((entry for entry in adapters if entry.matches(module)), None)
        layers.append(Layer(name or "(root)", adapter.kind if adapter else "Other", module, own, adapter))
    return layers
