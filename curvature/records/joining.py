"""How the calls of a mini-batch become one record: sample by sample, the calls side by side as positions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..layers.adapters import LayerAdapter
from ..layers.layer import Layer
from .calls import EMPTY, Call, ParameterSum
from .statistics import LayerStatistics, Tensors

__all__ = ["FIELDS", "combine", "mean_of_sums", "position_form", "total"]

Pass = list[list[Call]]
"""The calls of one forward pass: one list per call of the module, with one entry but for attention's packed weights."""

_BLANK = LayerStatistics(cast(Any, None), 1, 1)
"""Filled in for nearly every layer of nearly every step: the constructor of a record costs five times as much."""

FIELDS = {"input": "inputs", "gradient": "output_gradient", "sampled": "sampled_gradient", "roots": "curvature_roots"}
"""Attributes of a call, with the names that they have in a record."""


def combine(
    layer: Layer, calls: Sequence[Call], sums: Sequence[ParameterSum], loss_reduction: str
) -> LayerStatistics | None:
    """The record of one layer from all its calls; ``None`` if there is neither a call nor a parameter sum.

    Args:
        layer: the layer.
        calls: of all passes that count, in order.
        sums: of the same passes.
        loss_reduction: ``"mean"`` or ``"sum"``, how the user's loss combines samples.

    Raises:
        ArgumentError: if there are calls, and no samples in them.
    """
    if not calls:
        samples = sum(entry.samples for entry in sums)
        return LayerStatistics(layer, samples, 1, sampled_parameter_gradients=mean_of_sums(sums)) if sums else None
    adapters = {call.adapter for call in calls if call.adapter is not None}
    if len(adapters) > 1:
        raise ArgumentError(
            f"layer {layer.name!r} was called with different output sizes in one mini-batch, and cannot be read as one "
            "map; serve it by a part without statistics, e.g. ByLayer({'name': Identity(), 'default': ...})"
        )
    if adapters:
        layer = replace(layer, adapter=adapters.pop())
    if len(calls) == 1:
        return _of_one_call(layer, calls[0], sums, loss_reduction)
    passes = _by_pass(calls)
    samples = sum(entry[0][0].samples for entry in passes)
    if samples == 0:
        raise ArgumentError(f"layer {layer.name!r} saw a batch of 0 samples; {EMPTY}")
    scale = float(samples) if loss_reduction == "mean" else 1.0
    rows = sum(call.samples * call.positions for call in calls)
    output_sum = total([call.output_sum for call in calls])
    gradient_sum = total([call.gradient_sum for call in calls])
    record = LayerStatistics(
        layer=layer,
        samples=samples,
        positions=rows // samples,
        gradient_scale=scale,
        mean_scale=scale / samples,
        mean_preactivation=None if output_sum is None else output_sum / rows,
        mean_gradient=None if gradient_sum is None else gradient_sum * (scale / rows),
        sampled_parameter_gradients=mean_of_sums(sums) if sums else None,
    )
    return _with_tensors(record, passes, rows)


def _of_one_call(layer: Layer, call: Call, sums: Sequence[ParameterSum], loss_reduction: str) -> LayerStatistics:
    """Nothing to be joined: nearly every layer of nearly every step."""
    samples = call.samples
    if samples == 0:
        raise ArgumentError(f"layer {layer.name!r} saw a batch of 0 samples; {EMPTY}")
    scale, rows = float(samples) if loss_reduction == "mean" else 1.0, samples * call.positions
    gradient = call.gradient_sum
    if gradient is not None and scale != rows:
        gradient = gradient * (scale / rows)
    return _BLANK.with_fields(
        layer=layer,
        samples=samples,
        positions=call.positions,
        gradient_scale=scale,
        mean_scale=scale / samples,
        inputs=call.input,
        output_gradient=call.gradient,
        sampled_gradient=call.sampled,
        curvature_roots=call.roots,
        mean_preactivation=None if call.output_sum is None else call.output_sum / rows,
        mean_gradient=gradient,
        sampled_parameter_gradients=mean_of_sums(sums) if sums else None,
        calls=(call.positions,),
    )


def mean_of_sums(sums: Sequence[ParameterSum]) -> Tensors:
    """Mean over all samples of all passes, per parameter."""
    samples = sum(entry.samples for entry in sums)
    columns = zip(*(entry.gradients for entry in sums), strict=True)
    return tuple(torch.stack(values).sum(0) / samples for values in columns)


def _with_tensors(record: LayerStatistics, passes: Sequence[Pass], rows: int) -> LayerStatistics:
    """The record with inputs and gradients of all calls."""
    adapter = record.layer.adapter
    sizes = [tuple(sum(part.positions for part in parts) for parts in entry) for entry in passes]
    common = all(call.samples == entry[0][0].samples for entry in passes for parts in entry for call in parts)
    if adapter is None or (common and _alike(passes)):
        values: dict[str, Any] = {name: _stacked(passes, field) for field, name in FIELDS.items()}
        return replace(record, calls=sizes[0], **values)
    ragged = not common or len(set(sizes)) > 1
    values = {name: _in_positions(record.layer, adapter, passes, field, ragged) for field, name in FIELDS.items()}
    layer = replace(record.layer, adapter=adapter.of_positions())
    return replace(record, layer=layer, calls=sizes[0], ragged=ragged, row_count=rows, **values)


def _by_pass(calls: Sequence[Call]) -> list[Pass]:
    passes: dict[int, dict[int, list[Call]]] = {}
    for index, call in enumerate(calls):
        # Calls are numbered from 0, parts of one call share a number; the others are kept apart by a negative one.
        key = -1 - index if call.group is None else call.group
        passes.setdefault(call.pass_index, {}).setdefault(key, []).append(call)
    return [list(entry.values()) for entry in passes.values()]


def _alike(passes: Sequence[Pass]) -> bool:
    """Whether every call has the same shapes, as many in every pass, so that records can be stacked as they are."""
    if any(len(parts) > 1 for entry in passes for parts in entry) or len({len(entry) for entry in passes}) > 1:
        return False
    calls = [parts[0] for entry in passes for parts in entry]
    return all(
        len({value.shape[1:] for call in calls if (value := getattr(call, field)) is not None}) <= 1 for field in FIELDS
    )


def _stacked(passes: Sequence[Pass], field: str) -> Tensor | None:
    """Records of calls with the same shapes: N times calls on the first axis, a sample's calls side by side."""
    pieces: list[Tensor] = []
    for entry in passes:
        values: list[Any] = [getattr(parts[0], field) for parts in entry]
        if any(value is None for value in values):
            return None
        pieces.append(values[0] if len(values) == 1 else torch.stack(values, 1).flatten(0, 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _in_positions(
    layer: Layer, adapter: LayerAdapter, passes: Sequence[Pass], field: str, ragged: bool
) -> Tensor | None:
    """Records of calls with different shapes, joined along the positions; as bare rows if even that is not possible."""
    axis = 2 if field == "roots" else 1
    pieces: list[Tensor] = []
    for entry in passes:
        values: list[Any] = [getattr(call, field) for parts in entry for call in parts]
        if any(value is None for value in values):
            return None
        forms = [position_form(layer, adapter, field, value) for value in values]
        if ragged:
            groups = layer.groups if field == "input" else 1
            pieces += [_rows(form, axis, groups) for form in forms]
        else:
            pieces.append(torch.cat(forms, axis))
    return torch.cat(pieces)


def position_form(layer: Layer, adapter: LayerAdapter, field: str, value: Tensor) -> Tensor:
    """Inputs (N, S G, ...), gradients (N, S, d_out), roots (N, V, S, d_out)."""
    if field == "input":
        return adapter.as_positions(layer.module, value)
    if field == "roots":
        expanded = adapter.expand_output(layer.module, value.flatten(0, 1))
        result: Tensor = expanded.unflatten(0, value.shape[:2])
        return result
    return adapter.expand_output(layer.module, value)


def _rows(value: Tensor, axis: int, groups: int) -> Tensor:
    """(N, [V,] S G, ...) with every position as a sample of its own, (N S, [V,] G, ...)."""
    moved: Tensor = value.movedim(axis, 1).flatten(0, 1).unflatten(0, (-1, groups))
    return moved if axis == 1 else moved.movedim(1, -2)


def total(values: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of all values; ``None`` if one is missing or there are none."""
    present = [value for value in values if value is not None]
    return sum(present[1:], present[0]) if present and len(present) == len(values) else None
