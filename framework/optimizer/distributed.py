"""Data-parallel training: every rank sees the statistics of the joint mini-batch.

``DistributedDataParallel`` averages gradients; what hooks record stays on its rank. Records are therefore gathered
before the parts see them: each rank then holds the record of the joint batch, all states stay equal on all ranks, and
every composition of parts does exactly what one process would do with the joint batch. Parts know nothing of it.

Cost: per layer and due step one all-gather of the recorded rows, N (d_in + d_out) numbers per rank, and their outer
products on every rank. (Averaging d x d second moments instead would be cheaper for N much larger than d, but only for
parts whose state is linear in them.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ...curvature.layers.layer import Layer
from ...curvature.records.statistics import LayerStatistics, SampleGradients, Tensors
from ...errors import ArgumentError

__all__ = ["Ranks", "unwrapped"]


_OWN, _SHARED, _UNEVEN = range(3)


def _kind_of_rows(entry: LayerStatistics) -> int:
    """Rows of one sample each, as many for all; rows shared by samples; anything else."""
    if entry.ragged or entry.mixed or entry.unseen:
        return _UNEVEN
    return _SHARED if entry.shared_by > 1.0 else _OWN


def unwrapped(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The module inside ``torch.compile`` and ``DistributedDataParallel``, and the latter if there is one."""
    wrapper: DistributedDataParallel | None = None
    while True:
        if isinstance(model, DistributedDataParallel):
            wrapper = model
            model = wrapper.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model, wrapper


class Ranks:
    """The processes that share a mini-batch.

    Args:
        group: ``"auto"``: the world group while ``torch.distributed`` is initialised; ``None``: every process for
            itself; or a process group.
        wrapper: the ``DistributedDataParallel`` around the model, whose gradient exchange a look back must suspend.
    """

    def __init__(self, group: Any, wrapper: DistributedDataParallel | None):
        if isinstance(group, str | int | float) and group != "auto":
            raise ArgumentError(f"process_group must be 'auto', None or a process group, got {group!r}")
        self.group, self.wrapper = group, wrapper

    def __getstate__(self) -> dict[str, Any]:
        """The model of a copy is not wrapped."""
        return {"group": self.group, "wrapper": None}

    @property
    def count(self) -> int:
        """How many they are; 1 outside distributed training."""
        if self.group is None or not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self._group)

    @property
    def rank(self) -> int:
        """Which one this process is."""
        if self.group is None or not (distributed.is_available() and distributed.is_initialized()):
            return 0
        return distributed.get_rank(self._group)

    @property
    def _group(self) -> Any:
        return None if isinstance(self.group, str) else self.group

    def silent(self) -> AbstractContextManager[None]:
        """Context of a pass whose gradients are not exchanged."""
        context: AbstractContextManager[None] = nullcontext() if self.wrapper is None else self.wrapper.no_sync()
        return context

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a number over the ranks."""
        if self.count == 1:
            return value
        total = value.clone()
        distributed.all_reduce(total, group=self._group)
        return total / self.count

    def largest(self, layers: Sequence[Layer], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of one number per layer the largest of all ranks; 0 where a rank has none. Every rank must ask."""
        device = next(iter(layers[0].parameters.values())).device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        values = torch.stack([own.get(layer.name, zero).to(zero) for layer in layers])
        distributed.all_reduce(values, op=distributed.ReduceOp.MAX, group=self._group)
        return dict(zip((layer.name for layer in layers), values, strict=True))

    def joint(self, layers: Sequence[Layer], own: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        """Records of the joint mini-batch, the samples of rank 0 first.

        Args:
            layers: all layers, in the same order on every rank.
            own: what this rank recorded.

        Raises:
            ArgumentError: on every rank, if some layer was recorded on some ranks only, or has other numbers of rows on
                each.
        """
        if self.count == 1:
            return dict(own)
        device = next(iter(layers[0].parameters.values())).device
        found = [own.get(layer.name) for layer in layers]
        samples = [0 if entry is None else entry.samples for entry in found]
        kinds = [_OWN if entry is None else _kind_of_rows(entry) for entry in found]
        table = torch.stack(self._gather(torch.tensor([samples, kinds], device=device))).transpose(1, 2).tolist()
        result: dict[str, LayerStatistics] = {}
        for layer, ranks in zip(layers, zip(*table, strict=True), strict=True):
            counts = [int(samples) for samples, _ in ranks]
            if not any(counts):
                continue
            if not all(counts):
                raise ArgumentError(
                    f"layer {layer.name!r} saw a mini-batch on some ranks only ({counts} samples); every rank must use "
                    "the same layers in a step"
                )
            if {kind for _, kind in ranks} not in ({_OWN}, {_SHARED}):
                raise ArgumentError(
                    f"the samples of layer {layer.name!r} have different numbers of rows (experts, packed sequences, "
                    "micro-batches of different lengths, one sample on one rank and several on another), which several "
                    "processes cannot put together; pad them to one length, build with process_group=None, or give the "
                    "layer Identity(), or Diagonal() with BatchMean()"
                )
            result[layer.name] = self._joined(own[layer.name], counts)
        return result

    def _joined(self, entry: LayerStatistics, counts: list[int]) -> LayerStatistics:
        weight, samples = entry.samples / sum(counts), sum(counts)
        shared_by = 1.0
        if entry.shared_by > 1.0:  # the first axis counts passes then, as many on every rank
            passes = round(entry.samples / entry.shared_by)
            counts = [passes] * len(counts)
            shared_by = samples / sum(counts)
        rows = None if entry.output_gradient is None else entry.output_gradient * entry.gradient_scale
        sums, measured, hessian = entry.sampled_parameter_gradients, entry.sample_gradients, entry.hessian
        raw = None if measured.loss is None else tuple(value * entry.gradient_scale for value in measured.loss)
        return replace(
            entry,
            samples=samples,
            shared_by=shared_by,
            gradient_scale=1.0,
            inputs=self._concatenated(entry.inputs, counts),
            output_gradient=self._concatenated(rows, counts),
            sampled_gradient=self._concatenated(entry.sampled_gradient, counts),
            mean_preactivation=self._weighted(entry.mean_preactivation, weight),
            mean_gradient=self._weighted(entry.mean_gradient, weight),
            sampled_parameter_gradients=None if sums is None else tuple(self._summed(value, weight) for value in sums),
            curvature_roots=self._concatenated(entry.curvature_roots, counts),
            sample_gradients=SampleGradients(
                self._all(raw, counts), self._all(measured.sampled, counts), self._all(measured.roots, counts)
            ),
            measured={name: self._summed(value, 1.0) for name, value in sorted(entry.measured.items())},
            hessian=None if hessian is None else lambda: self._summed(hessian(), weight),
        )

    def _all(self, values: Tensors | None, counts: list[int]) -> Tensors | None:
        if values is None:
            return None
        found = [self._concatenated(value, counts) for value in values]
        return tuple(value for value in found if value is not None)

    def _weighted(self, value: Tensor | None, weight: float) -> Tensor | None:
        return None if value is None else self._summed(value, weight)

    def _summed(self, value: Tensor, weight: float) -> Tensor:
        total = value * weight
        distributed.all_reduce(total, group=self._group)
        return total

    def _concatenated(self, value: Tensor | None, counts: list[int]) -> Tensor | None:
        """Rows of all ranks; shorter ones are padded on the way."""
        if value is None:
            return None
        longest = max(counts)
        rows = value.shape[0] // counts[self.rank] if counts[self.rank] else 1
        padded = value.new_zeros(longest * rows, *value.shape[1:])
        padded[: value.shape[0]] = value
        pieces = self._gather(padded)
        return torch.cat([piece[: count * rows] for piece, count in zip(pieces, counts, strict=True)])

    def _gather(self, value: Tensor) -> list[Tensor]:
        pieces = [torch.empty_like(value) for _ in range(self.count)]
        distributed.all_gather(pieces, value.contiguous(), group=self._group)
        return pieces
