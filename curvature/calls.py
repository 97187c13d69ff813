"""What one call of one layer left behind, and how the calls of a mini-batch become one record."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .layers import Layer
from .statistics import LayerStatistics

__all__ = ["Call", "Calls", "ParameterSum", "column_sum", "combine", "join", "mean_of_sums", "total"]


@dataclass
class Call:
    """One call of one layer. ``pass_index`` counts forward passes of the whole model."""

    pass_index: int
    samples: int
    positions: int
    input: Tensor | None = None
    gradient: Tensor | None = None
    sampled: Tensor | None = None
    roots: Tensor | None = None
    output_sum: Tensor | None = None
    gradient_sum: Tensor | None = None
    edge: GradientEdge | None = None
    complete: bool = False


class Calls:
    """The calls of one layer in the order they were made, while somebody holds them.

    A call is held by the autograd graph it belongs to until its gradient arrives, and by this list from then on: an
    evaluation pass whose graph is thrown away leaves nothing behind, whether or not it ran under ``torch.no_grad()``.
    """

    def __init__(self) -> None:
        self._references: list[weakref.ref[Call]] = []
        self._kept: list[Call] = []

    def __iter__(self) -> Iterator[Call]:
        """Calls that are still alive."""
        return iter([call for call in (reference() for reference in self._references) if call is not None])

    def append(self, call: Call) -> None:
        """Note a call without holding it."""
        self._references = [reference for reference in self._references if reference() is not None]
        self._references.append(weakref.ref(call))

    def keep(self, call: Call) -> None:
        """Hold a call from now on."""
        if not any(call is other for other in self._kept):
            self._kept.append(call)

    def discard_complete(self) -> None:
        """Forget the calls that have a gradient."""
        self._references = [weakref.ref(call) for call in self if not call.complete]
        self._kept = [call for call in self._kept if not call.complete]

    def clear(self) -> None:
        """Forget every call, and let go of graphs that nobody ran backward."""
        for call in self:
            call.edge = None
        self._references, self._kept = [], []


@dataclass
class ParameterSum:
    """Parameter gradients of the sampled loss, summed over the samples of one pass."""

    pass_index: int
    samples: int
    gradients: tuple[Tensor, ...]


def join(calls: Sequence[Call], values: Sequence[Tensor | None]) -> Tensor | None:
    """Records of several calls as one, sample by sample: the calls of one pass lie side by side as positions do."""
    passes: dict[int, list[Tensor]] = {}
    for call, value in zip(calls, values, strict=True):
        if value is None:
            return None
        passes.setdefault(call.pass_index, []).append(value)
    pieces = [_side_by_side(entry) for entry in passes.values()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _side_by_side(values: Sequence[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    if any(value.shape != values[0].shape for value in values):  # no common samples: rows for outer products only
        return torch.cat(list(values))
    return torch.stack(list(values), 1).flatten(0, 1)


def column_sum(value: Tensor) -> Tensor:
    """Sum over samples and positions, half precision in float32: secant pairs are differences of such sums."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.sum((0, 1), dtype=torch.float32 if half else None)


def total(values: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of all values; ``None`` if one is missing or there are none."""
    present = [value for value in values if value is not None]
    return sum(present[1:], present[0]) if present and len(present) == len(values) else None


def mean_of_sums(sums: Sequence[ParameterSum]) -> tuple[Tensor, ...]:
    """Mean over all samples of all passes, per parameter."""
    samples = sum(entry.samples for entry in sums)
    columns = zip(*(entry.gradients for entry in sums), strict=True)
    return tuple(torch.stack(values).sum(0) / samples for values in columns)


def combine(
    layer: Layer, calls: Sequence[Call], sums: Sequence[ParameterSum], loss_reduction: str
) -> LayerStatistics | None:
    """The record of one layer from all its calls; ``None`` if there is neither a call nor a parameter sum.

    Args:
        layer: the layer.
        calls: of all passes that count, in order.
        sums: of the same passes.
        loss_reduction: ``"mean"`` or ``"sum"``, how the user's loss combines samples.
    """
    if not calls:
        samples = sum(entry.samples for entry in sums)
        return LayerStatistics(layer, samples, 1, sampled_parameter_gradients=mean_of_sums(sums)) if sums else None
    first_of_pass = {call.pass_index: call.samples for call in reversed(calls)}
    samples = sum(first_of_pass.values())
    scale = float(samples) if loss_reduction == "mean" else 1.0
    rows = sum(call.samples * call.positions for call in calls)
    output_sum = total([call.output_sum for call in calls])
    gradient_sum = total([call.gradient_sum for call in calls])
    return LayerStatistics(
        layer=layer,
        samples=samples,
        positions=rows // samples,
        gradient_scale=scale,
        inputs=join(calls, [call.input for call in calls]),
        output_gradient=join(calls, [call.gradient for call in calls]),
        sampled_gradient=join(calls, [call.sampled for call in calls]),
        curvature_roots=join(calls, [call.roots for call in calls]),
        mean_preactivation=None if output_sum is None else output_sum / rows,
        mean_gradient=None if gradient_sum is None else gradient_sum * (scale / rows),
        sampled_parameter_gradients=mean_of_sums(sums) if sums else None,
    )
