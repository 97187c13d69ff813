"""The record of a layer some of whose calls do not have one entry of the first axis per sample.

Nearly every layer of nearly every model has one, and then nothing here is used. Else a probe
(:mod:`osculate.curvature.backends.probing`) has found the sample of every row, and the records of the calls are put
together here: as samples with equally many rows if that is what they are, else row by row with the sample's number
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..layers.adapters import LayerAdapter
from ..layers.layer import Layer
from . import joining
from .calls import Call, ParameterSum
from .joining import FIELDS, mean_of_sums, position_form, total
from .ownership import regular_order
from .statistics import LayerStatistics

__all__ = ["combine"]


def combine(
    layer: Layer, calls: Sequence[Call], sums: Sequence[ParameterSum], loss_reduction: str
) -> LayerStatistics | None:
    """The record of one layer from all its calls: see :func:`.joining.combine`, which does those that are as usual."""
    for call in calls:
        if call.ownership is not None:
            return _combined(layer, calls, sums, loss_reduction)
    return joining.combine(layer, calls, sums, loss_reduction)


def _combined(
    layer: Layer, calls: Sequence[Call], sums: Sequence[ParameterSum], loss_reduction: str
) -> LayerStatistics:
    passes: dict[int, list[Call]] = {}
    for call in calls:
        passes.setdefault(call.pass_index, []).append(call)
    counts = [_samples(entry) for entry in passes.values()]
    samples = sum(counts)
    scale = float(samples) if loss_reduction == "mean" else 1.0
    rows = sum(call.samples * call.positions for call in calls)
    shared = [call.ownership is not None and call.ownership.owners is None for call in calls]
    seen = sum(
        count * sum(call.samples * call.positions for call in entry)
        for count, entry in zip(counts, passes.values(), strict=True)
    )
    pairs = seen if all(shared) else rows
    output_sum, gradient_sum = total([call.output_sum for call in calls]), total([call.gradient_sum for call in calls])
    record = LayerStatistics(
        layer=layer,
        samples=samples,
        positions=max(1, rows // samples),
        gradient_scale=scale,
        mean_scale=scale / samples,
        mean_preactivation=None if output_sum is None else output_sum / rows,
        mean_gradient=None if gradient_sum is None else gradient_sum * (scale / pairs),
        sampled_parameter_gradients=mean_of_sums(sums) if sums else None,
    )
    adapter, groups = layer.adapter, list(passes.values())
    if adapter is None:
        return record
    if all(shared):
        return _of_all(record, adapter, groups)
    if any(shared):
        return _bare(record, adapter, calls, rows, mixed=True)
    return _whole_entries(record, groups) or _row_by_row(record, adapter, groups, counts)


def _samples(calls: Sequence[Call]) -> int:
    """N of one pass."""
    return next((call.ownership.samples for call in calls if call.ownership is not None), calls[0].samples)


def _of_all(record: LayerStatistics, adapter: LayerAdapter, passes: Sequence[Sequence[Call]]) -> LayerStatistics:
    """Rows that belong to all samples of their pass.

    Raises:
        ArgumentError: if passes have different numbers of rows.
    """
    layer, lengths = record.layer, {sum(call.samples * call.positions for call in entry) for entry in passes}
    if len(lengths) > 1:
        raise ArgumentError(
            f"layer {layer.name!r} has rows that belong to several samples, and their number differs between "
            f"micro-batches ({', '.join(map(str, sorted(lengths)))}); pad the micro-batches to one length, or serve it "
            "by a part that needs no statistics (ByLayer with Identity() or Diagonal())"
        )
    (length,) = lengths
    values: dict[str, Any] = {
        name: _cat(layer, adapter, [c for entry in passes for c in entry], field) for field, name in FIELDS.items()
    }
    for field, name in FIELDS.items():
        if values[name] is not None:
            value = values[name].unflatten(0, (len(passes), -1))
            values[name] = (
                value.flatten(1, 2) if field == "input" else value.transpose(1, 2) if field == "roots" else value
            )
    layer = replace(layer, adapter=adapter.of_positions())
    shared_by = record.samples / len(passes)
    return replace(record, layer=layer, positions=length, calls=(length,), shared_by=shared_by, **values)


def _whole_entries(record: LayerStatistics, passes: Sequence[Sequence[Call]]) -> LayerStatistics | None:
    """Every sample has the same number of entries of the first axis: its record is that of several calls."""
    if any(len(entry) > 1 or entry[0].ownership is None for entry in passes):
        return None
    calls = [entry[0] for entry in passes]
    found = [call.ownership.entries if call.ownership is not None else None for call in calls]
    if any(entry is None for entry in found) or len({entry[0] for entry in found if entry is not None}) > 1:
        return None
    if len({call.positions for call in calls}) > 1:
        return None
    values: dict[str, Any] = {}
    for field, name in FIELDS.items():
        pieces: list[Any] = [getattr(call, field) for call in calls]
        if any(piece is None for piece in pieces):
            values[name] = None
            continue
        if len({piece.shape[1:] for piece in pieces}) > 1:
            return None
        for index, entry in enumerate(found):
            if entry is not None and entry[1] is not None:
                pieces[index] = pieces[index].index_select(0, entry[1].to(pieces[index].device))
        values[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    assert found[0] is not None
    positions = found[0][0] * calls[0].positions
    return replace(record, positions=positions, calls=(positions,), **values)


def _row_by_row(
    record: LayerStatistics, adapter: LayerAdapter, passes: Sequence[Sequence[Call]], counts: Sequence[int]
) -> LayerStatistics:
    """Every row goes to its sample; the rows keep their order, with the samples' numbers, where samples differ."""
    layer, offset, pieces = record.layer, 0, []
    for entry, count in zip(passes, counts, strict=True):
        for call in entry:
            own = _owners(call)
            pieces.append(torch.where(own < 0, own, own + offset))
        offset += count
    owners, calls = torch.cat(pieces), [call for entry in passes for call in entry]
    regular = regular_order(owners, record.samples)
    if regular is None:
        return _bare(record, adapter, calls, len(owners), owners=owners)
    count, order = regular
    values: dict[str, Any] = {}
    for field, name in FIELDS.items():
        value = _cat(layer, adapter, calls, field)
        if value is not None:
            value = value if order is None else value.index_select(0, order.to(value.device))
            value = value.unflatten(0, (record.samples, count))
            value = value.flatten(1, 2) if field == "input" else value.transpose(1, 2) if field == "roots" else value
        values[name] = value
    layer = replace(layer, adapter=adapter.of_positions())
    return replace(record, layer=layer, positions=count, calls=(count,), **values)


def _owners(call: Call) -> Tensor:
    """(R S,) the sample of every row."""
    if call.ownership is not None and call.ownership.owners is not None:
        return call.ownership.owners.flatten()
    return torch.arange(call.samples).repeat_interleave(call.positions)


def _bare(
    record: LayerStatistics,
    adapter: LayerAdapter,
    calls: Sequence[Call],
    rows: int,
    owners: Tensor | None = None,
    mixed: bool = False,
) -> LayerStatistics:
    """Rows one by one, every row as an entry of its own."""
    values: dict[str, Any] = {name: _cat(record.layer, adapter, calls, field) for field, name in FIELDS.items()}
    for name, axis in (("output_gradient", 1), ("sampled_gradient", 1), ("curvature_roots", 2)):
        value = values[name]
        values[name] = None if value is None else value.unsqueeze(axis)
    device = next(iter(record.layer.parameters.values())).device
    return replace(
        record,
        layer=replace(record.layer, adapter=adapter.of_positions()),
        calls=(record.positions,),
        ragged=True,
        row_count=rows,
        owners=None if owners is None else owners.to(device),
        mixed=mixed,
        **values,
    )


def _cat(layer: Layer, adapter: LayerAdapter, calls: Sequence[Call], field: str) -> Tensor | None:
    """Rows of all calls: inputs (rows, G, ...), gradients (rows, d_out), roots (rows, V, d_out)."""
    pieces: list[Tensor] = []
    for call in calls:
        value = getattr(call, field)
        if value is None:
            return None
        form = position_form(layer, adapter, field, value)
        if field == "input":
            pieces.append(form.unflatten(1, (-1, layer.groups)).flatten(0, 1))
        else:
            pieces.append(form.movedim(2, 1).flatten(0, 1) if field == "roots" else form.flatten(0, 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
