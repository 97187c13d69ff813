"""Normalisations with scale and shift: linear in (scale, shift), entry by entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .forwards import keeps_forward
from .protocol import Expanded, LayerAdapter, ScaleAdapter

__all__ = ["BatchNormAdapter", "GroupNormAdapter", "InstanceNormAdapter", "LayerNormAdapter", "RMSNormAdapter"]


class _Trailing(ScaleAdapter):
    """Scale and shift over the last axes of the input; the axes between batch and these are positions."""

    def batched_ndim(self, module: nn.Module) -> int:
        """Samples and the normalised axes."""
        return 1 + len(_norm(module).normalized_shape)

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Product of the middle axes."""
        return output[0].numel() // int(_norm(module).weight.numel())

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, ..., *normalised) to (N, S, entries)."""
        return value.reshape(value.shape[0], -1, _norm(module).weight.numel())

    def expand_output(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, ..., *normalised) to (N, S, entries)."""
        return self.expand_input(module, value)

    def as_positions(self, module: nn.Module, value: Tensor) -> Tensor:
        """The middle axes as one."""
        return value.reshape(value.shape[0], -1, *_norm(module).normalized_shape)

    def of_positions(self) -> LayerAdapter:
        """The same."""
        return self

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``normalised * weight + bias``; a missing direction counts as zero."""
        moved = torch.zeros_like(value) if weight is None else value * weight
        return moved if bias is None else moved.add_(bias)


class LayerNormAdapter(_Trailing):
    """``nn.LayerNorm`` with a scale."""

    kind = "LayerNorm"

    def matches(self, module: nn.Module) -> bool:
        """Any layer normalisation with a scale."""
        return keeps_forward(module, nn.LayerNorm) and module.weight is not None

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The normalised input."""
        norm = _norm(module)
        return functional.layer_norm(value, norm.normalized_shape, eps=norm.eps)


class RMSNormAdapter(_Trailing):
    """``nn.RMSNorm`` with a scale."""

    kind = "RMSNorm"

    def matches(self, module: nn.Module) -> bool:
        """Any root-mean-square normalisation with a scale."""
        return keeps_forward(module, nn.RMSNorm) and module.weight is not None

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The normalised input."""
        norm = _norm(module)
        return functional.rms_norm(value, norm.normalized_shape, eps=norm.eps)


class _Channels(ScaleAdapter):
    """Scale and shift per channel, axis 1; the axes after it are positions."""

    def batched_ndim(self, module: nn.Module) -> int:
        """Samples and channels."""
        return 2

    def positions(self, module: nn.Module, output: Tensor) -> int:
        """Product of the axes after the channel axis."""
        return output[0, 0].numel()

    def expand_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, channels, ...) to (N, S, channels)."""
        return value.reshape(value.shape[0], value.shape[1], -1).transpose(1, 2)

    def expand_output(self, module: nn.Module, value: Tensor) -> Tensor:
        """(N, channels, ...) to (N, S, channels)."""
        return self.expand_input(module, value)

    def of_positions(self) -> LayerAdapter:
        """(N, S, channels) is no image any more."""
        return _ChannelsLast(self)

    def directional(self, module: nn.Module, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``normalised * weight + bias``; a missing direction counts as zero."""
        shape = (1, -1) + (1,) * (value.ndim - 2)
        moved = torch.zeros_like(value) if weight is None else value * weight.view(shape)
        return moved if bias is None else moved.add_(bias.view(shape))


class _ChannelsLast(Expanded, _Trailing):
    """Normalised rows (N, S, channels) of calls on images of different sizes."""

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """As the other adapter does."""
        return self.inner.recorded_input(module, value)

    def as_positions(self, module: nn.Module, value: Tensor) -> Tensor:
        """They are."""
        return value


class BatchNormAdapter(_Channels):
    """``nn.BatchNorm1d/2d/3d`` with scale and shift: linear in (scale, shift), but not a matrix.

    In training mode the batch statistics couple the samples; as in the papers that coupling is ignored, which makes
    per-sample quantities of this layer (and of those below it) an approximation.
    """

    kind = "BatchNorm"

    def matches(self, module: nn.Module) -> bool:
        """Any batch normalisation with affine parameters."""
        kept = keeps_forward(module, nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
        return kept and bool(module.affine)

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The normalised input, with the statistics that this call uses; buffers stay untouched."""
        norm = _norm(module)
        if norm.training or norm.running_mean is None:
            return functional.batch_norm(value, None, None, training=True, eps=norm.eps)
        return functional.batch_norm(value, norm.running_mean, norm.running_var, eps=norm.eps)


class GroupNormAdapter(_Channels):
    """``nn.GroupNorm`` with scale and shift."""

    kind = "GroupNorm"

    def matches(self, module: nn.Module) -> bool:
        """Any group normalisation with affine parameters."""
        return keeps_forward(module, nn.GroupNorm) and bool(module.affine)

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The normalised input."""
        norm = _norm(module)
        return functional.group_norm(value, norm.num_groups, eps=norm.eps)


class InstanceNormAdapter(_Channels):
    """``nn.InstanceNorm1d/2d/3d`` with scale and shift."""

    kind = "InstanceNorm"

    def matches(self, module: nn.Module) -> bool:
        """Any instance normalisation with affine parameters."""
        return keeps_forward(module, nn.modules.instancenorm._InstanceNorm) and bool(module.affine)

    def batched_ndim(self, module: nn.Module) -> int:
        """Samples, channels, sites."""
        return 1 + int(_norm(module)._get_no_batch_dim())

    def recorded_input(self, module: nn.Module, value: Tensor) -> Tensor:
        """The normalised input, with the statistics that this call uses; buffers stay untouched."""
        norm = _norm(module)
        if norm.training or not norm.track_running_stats:
            return functional.instance_norm(value, eps=norm.eps)
        return functional.batch_norm(value, norm.running_mean, norm.running_var, eps=norm.eps)


def _norm(module: nn.Module) -> Any:
    return module
