"""Convolutions and transposed convolutions: a position is an output site, an input row is a patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .forwards import keeps_forward
from .protocol import LayerAdapter, MatrixAdapter, PatchAdapter

__all__ = ["ConvolutionAdapter", "TransposedConvolutionAdapter"]

_CONVOLUTIONS: tuple[Any, ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: tuple[Any, ...] = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


class _Sites(MatrixAdapter):
    """What both directions share: outputs (N, d_out, *sites) and a weight with ``dimensions`` trailing axes."""

    dimensions: int

    def groups(self, module: nn.Module) -> int:
        """The module's."""
        return int(_convolution(module).groups)

    def batched_ndim(self, module: nn.Module) -> int:
        """Samples, channels, sites."""
        return self.dimensions + 2

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Number of output sites."""
        return output[0, 0].numel()

    def expand_output(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, d_out, *sites) to (N, S, d_out)."""
        return value.flatten(2).transpose(1, 2)

    def of_positions(self) -> LayerAdapter:
        """Patches are no image any more."""
        return PatchAdapter(self)

    def _patches(self, windows: Tensor, groups: int) -> Tensor:
        """Windows (N, C, *sites, *kernel) to (N, S G, C/G x kernel), channel slowest."""
        d = self.dimensions
        channels_last = windows.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))
        rows = channels_last.flatten(1, d).flatten(2)  # (N, S, C x kernel): the one copy
        return rows if groups == 1 else rows.unflatten(2, (groups, -1)).flatten(1, 2)


@dataclass(frozen=True)
class ConvolutionAdapter(_Sites):
    """``nn.Conv1d/2d/3d`` with any stride, dilation, groups, padding (also ``"same"``) and padding mode.

    Row o of the matrix (d_out, d_in / G x kernel) is the kernel of output channel o, channel slowest as in
    ``weight.flatten(1)``. What is not zero padding in numbers is padded when it is recorded.

    Attributes:
        dimensions: 1, 2 or 3.
    """

    dimensions: int

    @property
    def kind(self) -> str:
        """``"Conv1d"``, ``"Conv2d"`` or ``"Conv3d"``."""
        return f"Conv{self.dimensions}d"

    def matches(self, module: nn.Module) -> bool:
        """The torch class and subclasses that keep its forward."""
        expected = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dimensions - 1]
        return keeps_forward(module, expected)

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The input, padded if the padding is not zeros given in numbers."""
        conv = _convolution(module)
        if not _pads_itself(conv):
            return value
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return functional.pad(value, _both_sides(conv), mode)

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """Patches (N, S G, d_in / G x kernel), channel slowest."""
        conv, groups = _convolution(module), self.groups(module)
        padding: tuple[int, ...] = self._padding(conv)
        if self.dimensions == 2:
            columns = functional.unfold(value, conv.kernel_size, conv.dilation, padding, conv.stride)
            if groups == 1:
                return columns.transpose(1, 2)
            grouped: Tensor = columns.unflatten(1, (groups, -1))
            return grouped.permute(0, 3, 1, 2).flatten(1, 2)
        if any(padding):
            value = functional.pad(value, [entry for entry in reversed(padding) for _ in range(2)])
        return self._patches(_windows(value, conv.kernel_size, conv.dilation, conv.stride), groups)

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The convolution with ``weight`` and ``bias`` in the place of the module's own."""
        conv = _convolution(module)
        kernel = torch.zeros_like(conv.weight) if weight is None else weight
        result: Tensor = _CONVOLUTIONS[self.dimensions - 1](
            value, kernel, bias, conv.stride, self._padding(conv), conv.dilation, conv.groups
        )
        return result

    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Kernels in a row."""
        return weight.flatten(-(self.dimensions + 1))

    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """Rows as kernels."""
        conv = _convolution(module)
        kernels: Tensor = matrix.unflatten(-1, (conv.in_channels // conv.groups, *conv.kernel_size))
        return kernels

    def _padding(self, conv: Any) -> tuple[int, ...]:
        """What is still to be padded with zeros in a recorded input."""
        return (0,) * self.dimensions if _pads_itself(conv) else conv.padding


@dataclass(frozen=True)
class TransposedConvolutionAdapter(_Sites):
    """``nn.ConvTranspose1d/2d/3d`` with any stride, dilation, padding, output padding and groups.

    Read from the output: a site sees the inputs whose kernels reach it, a patch of the input with zeros between its
    sites. Row o of the matrix (d_out, d_in / G x kernel) holds the weights into output channel o. The weight itself
    has the input channel first; as a matrix with several groups it is no view of one strided matrix unless each group
    has one input channel, so these have per-sample quantities but no matrix.

    Attributes:
        dimensions: 1, 2 or 3.
        output_padding: of one call that was given ``output_size``; ``None``: the module's.
    """

    dimensions: int
    output_padding: tuple[int, ...] | None = None
    reads_calls = True

    @property
    def kind(self) -> str:
        """``"ConvTranspose1d"``, ``"ConvTranspose2d"`` or ``"ConvTranspose3d"``."""
        return f"ConvTranspose{self.dimensions}d"

    def matches(self, module: nn.Module) -> bool:
        """The torch class and subclasses that keep its forward."""
        expected = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[self.dimensions - 1]
        return keeps_forward(module, expected)

    def of_call(self, module: nn.Module, value: Tensor, output: Tensor) -> TransposedConvolutionAdapter:
        """With the output padding that makes this output of this input."""
        conv = _convolution(module)
        axes = zip(
            value.shape[2:], output.shape[2:], conv.stride, conv.padding, conv.dilation, conv.kernel_size, strict=True
        )
        found = tuple(
            after - ((before - 1) * stride - 2 * padding + dilation * (size - 1) + 1)
            for before, after, stride, padding, dilation, size in axes
        )
        return self if found == tuple(conv.output_padding) else replace(self, output_padding=found)

    def has_matrix(self, module: nn.Module) -> bool:
        """One group, or one input channel per group."""
        conv = _convolution(module)
        return conv.groups in (1, conv.in_channels)

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """Patches (N, S G, d_in / G x kernel) of the input with stride - 1 zeros between its sites."""
        conv, d = _convolution(module), self.dimensions
        shape = [(size - 1) * step + 1 for size, step in zip(value.shape[2:], conv.stride, strict=True)]
        spread = value.new_zeros(*value.shape[:2], *shape)
        sites: tuple[Any, ...] = (..., *(slice(None, None, step) for step in conv.stride))
        spread[sites] = value
        reach = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        added, sides = self.output_padding or conv.output_padding, list[int]()
        for axis in reversed(range(d)):
            before = reach[axis] - conv.padding[axis]
            sides += [before, before + added[axis]]
        windows = _windows(functional.pad(spread, sides), conv.kernel_size, conv.dilation, (1,) * d)
        return self._patches(windows.flip(tuple(range(2 + d, 2 + 2 * d))), conv.groups)

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The convolution with ``weight`` and ``bias`` in the place of the module's own."""
        conv = _convolution(module)
        kernel = torch.zeros_like(conv.weight) if weight is None else weight
        result: Tensor = _TRANSPOSED[self.dimensions - 1](
            value,
            kernel,
            bias,
            conv.stride,
            conv.padding,
            self.output_padding or conv.output_padding,
            conv.groups,
            conv.dilation,
        )
        return result

    def per_sample(self, module: nn.Module, value: Tensor, upstream: Tensor) -> Tensor:
        """As for any matrix; several groups are put into the weight's layout with a copy."""
        conv, samples = _convolution(module), upstream.shape[0]
        inputs = self.expand_input(module, value).flatten(0, 1).unflatten(0, (*upstream.shape[:2], conv.groups))
        product = torch.einsum("nsgo,nsgi->ngio", upstream.unflatten(2, (conv.groups, -1)), inputs)
        kernels: Tensor = product.unflatten(2, (-1, _volume(conv)))
        return kernels.transpose(3, 4).reshape(samples, *conv.weight.shape)

    def weight_as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Weights into one output channel in a row; a copy, because two axes change places."""
        conv, lead = _convolution(module), weight.ndim - self.dimensions - 2
        grouped: Tensor = weight.unflatten(lead, (conv.groups, -1))
        return grouped.transpose(lead + 1, lead + 2).flatten(lead + 2).flatten(lead, lead + 1)

    def matrix_as_weight(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """Rows as kernels, input channel first."""
        conv, lead = _convolution(module), matrix.ndim - 2
        kernels: Tensor = matrix.unflatten(-1, (conv.in_channels // conv.groups, *conv.kernel_size))
        if conv.groups == 1:
            return kernels.transpose(lead, lead + 1)
        split: Tensor = kernels.squeeze(lead + 1).unflatten(lead, (conv.groups, -1))
        return split


def _convolution(module: nn.Module) -> Any:
    return module


def _volume(conv: Any) -> int:
    """Number of entries of one kernel."""
    return int(conv.weight[0, 0].numel())


def _pads_itself(conv: Any) -> bool:
    """Whether padding is more than a number of zeros on both sides."""
    return isinstance(conv.padding, str) or conv.padding_mode != "zeros"


def _both_sides(conv: Any) -> list[int]:
    """Amounts for ``functional.pad``, last axis first; ``"same"`` puts the odd one behind."""
    amounts: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if not isinstance(conv.padding, str):
            amounts += [conv.padding[axis]] * 2
            continue
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1) if conv.padding == "same" else 0
        amounts += [total // 2, total - total // 2]
    return amounts


def _windows(value: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Sliding windows (N, C, *sites, *kernel) of (N, C, *axes), a view."""
    for axis, (size, spread, step) in enumerate(zip(kernel, dilation, stride, strict=True)):
        value = value.unfold(2 + axis, spread * (size - 1) + 1, step)[..., ::spread]
    return value
