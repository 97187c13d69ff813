"""Records of the joint mini-batch: every owner of a layer gets what its structures take of all processes' samples.

A statistic is a mean over samples, so that of the joint mini-batch is the mean of the processes' own, weighted by their
samples. Where a structure takes nothing but second moments (:attr:`.StructureDeclarations.takes_moments`), these are
added up, d (d + 1) / 2 numbers for each matrix, if that is less than the rows themselves, n d numbers for the n rows of
a process; secant pairs are means already. Rows travel where a structure takes rows, to the owner alone. What
step-size rules measure along directions travels as the sums that they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Record
from ...curvature.records.statistics import LayerStatistics, SampleGradients, Tensors
from ...errors import ArgumentError
from .packing import rows_are_fewer, symmetric_packed, symmetric_unpacked
from .ranks import Pending, Ranks

__all__ = ["Moment", "Travel", "brought_together", "kind_of_rows", "require_same_layers", "rows_are_less"]

_OWN, _SHARED, _UNEVEN = range(3)
_ROWS = {
    Record.INPUTS: ("inputs",),
    Record.GRADIENTS: ("output_gradient",),
    Record.SAMPLED: ("sampled_gradient",),
    Record.CURVATURE_ROOTS: ("curvature_roots",),
}
_WHOLE = {"loss": Record.GRADIENTS, "sampled": Record.SAMPLED, "roots": Record.CURVATURE_ROOTS}
_STATISTICS = "statistics"


class Moment(Protocol):
    """What makes the second moment of one side of a process's record, as a structure's sharing rule wants it."""

    @property
    def order(self) -> int:
        """d of the (d, d) matrix."""

    def __call__(self, record: LayerStatistics) -> Tensor:
        """The matrix: a mean over the record's samples."""

    def zeros(self, device: torch.device) -> Tensor:
        """Of nothing."""


@dataclass(frozen=True)
class Travel:
    """What is brought to the owner of one layer at one step.

    Attributes:
        rows: of which records the rows, or whole gradients, are taken.
        moments: by side, what makes the second moment of this process's record.
        saved: by side, the record whose rows travel in the moment's place if that is less.
        mean_input: whether the mean input row is taken.
    """

    rows: Record = Record.NOTHING
    moments: Mapping[str, Moment] = field(default_factory=dict)
    saved: Mapping[str, Record] = field(default_factory=dict)
    mean_input: bool = False


def kind_of_rows(entry: LayerStatistics) -> int:
    """Rows of one sample each, as many for all; rows shared by samples; anything else."""
    if entry.ragged or entry.mixed or entry.unseen:
        return _UNEVEN
    return _SHARED if entry.shared_by > 1.0 else _OWN


def require_same_layers(layers: Sequence[Layer], samples: Sequence[Sequence[int]], kinds: Sequence[set[int]]) -> None:
    """Check that every process recorded the same layers, in rows that can be put together.

    Args:
        layers: in order.
        samples: of every layer, by process; 0 for one that was not recorded there.
        kinds: of every layer, those of the processes that recorded it.

    Raises:
        ArgumentError: on every process, naming the layer.
    """
    for layer, counts, found in zip(layers, samples, kinds, strict=True):
        if not any(counts):
            continue
        if not all(counts):
            raise ArgumentError(
                f"layer {layer.name!r} saw a mini-batch on some ranks only ({list(counts)} samples); every rank must "
                "use the same layers in a step"
            )
        if found not in ({_OWN}, {_SHARED}):
            raise ArgumentError(
                f"the samples of layer {layer.name!r} have different numbers of rows (experts, packed sequences, "
                "micro-batches of different lengths, one sample on one rank and several on another), which several "
                "processes cannot put together; pad them to one length, build with process_group=None, or give the "
                "layer Identity(), or Diagonal() with BatchMean()"
            )


@dataclass
class _Sum:
    """One tensor that is added up: where it goes, and what becomes of it."""

    layer: str
    name: str
    shape: torch.Size
    order: int = 0  # of a symmetric matrix that is packed


def brought_together(
    ranks: Ranks,
    own: Mapping[str, LayerStatistics],
    travels: Mapping[str, Travel],
    owners: Mapping[str, int] | None,
    samples: Mapping[str, Sequence[int]],
    settled: Collection[tuple[str, str]] = (),
    early: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, LayerStatistics]:
    """Records of the joint mini-batch, the samples of process 0 first, of the layers that this process owns.

    Args:
        ranks: the processes.
        own: what this one recorded.
        travels: by layer, what is taken; layers that are missing stay where they are.
        owners: by layer; ``None``: every process gets all.
        samples: by layer, of every process; 0 for a process whose samples another one has too.
        settled: layers and sides whose moments have been added up already; the same on every process.
        early: these moments, by layer and side, where this process owns them.
    """
    sums: list[tuple[_Sum, Tensor]] = []
    rows: list[_Rows] = []
    for name, travel in travels.items():
        entry = own.get(name)
        if entry is None:
            continue
        counts = samples[name]
        left = {side: moment for side, moment in travel.moments.items() if (name, side) not in settled}
        travel = replace(travel, moments=left)
        taken = _fields(entry, travel, max(counts), ranks.count, owners is None)
        rows += _rows(entry, travel, taken)
        weight = counts[ranks.rank] / sum(counts)
        sums += [(place, value * weight) for place, value in _means(entry, travel, taken)]
        speaks = float(counts[ranks.rank] > 0)
        sums += [
            (_Sum(name, f"measured {key}", value.shape), value * speaks)
            for key, value in sorted(entry.measured.items())
        ]
    pending = _begun(ranks, sums, owners)
    gathered = _gathered(ranks, rows, owners, samples)
    added = _finished(ranks, pending, owners)
    return {
        name: _joint(own[name], samples[name], gathered.get(name, {}), added.get(name, {}), (early or {}).get(name, {}))
        for name, travel in travels.items()
        if name in own and (owners is None or owners[name] == ranks.rank)
    }


def _flags(record: Record) -> list[Record]:
    return [flag for flag in _ROWS if flag in record]


def _fields(entry: LayerStatistics, travel: Travel, samples: int, count: int, everyone: bool) -> Record:
    """The records whose rows travel: those that somebody takes, and those that are fewer than their moment."""
    taken = travel.rows
    for side in travel.moments:
        if rows_are_less(
            entry, travel, side, samples, count, everyone
        ):  # the same on every process: the largest share decides
            taken |= travel.saved[side]
    return taken


def rows_are_less(entry: LayerStatistics, travel: Travel, side: str, samples: int, count: int, everyone: bool) -> bool:
    """Whether a side's rows cost fewer bytes than its moment.

    Args:
        entry: a record with these rows.
        travel: what is brought to the owner.
        side: with a moment.
        samples: of the largest share of the mini-batch.
        count: number of processes.
        everyone: whether all of them get it.
    """
    numbers = 0
    for flag in _flags(travel.saved[side]):
        for name in _ROWS[flag]:
            value = getattr(entry, name)
            numbers += 0 if value is None else value[0].numel() * samples
    return rows_are_fewer(numbers, travel.moments[side].order, count, everyone)


def _means(entry: LayerStatistics, travel: Travel, taken: Record) -> list[tuple[_Sum, Tensor]]:
    """Means over this process's samples."""
    name = entry.layer.name
    found: list[tuple[_Sum, Tensor]] = []
    for key in ("mean_preactivation", "mean_gradient"):
        value = getattr(entry, key)
        if value is not None:
            found.append((_Sum(name, key, value.shape), value))
    if Record.SAMPLED_PARAMETERS in travel.rows and entry.sampled_parameter_gradients is not None:
        for index, value in enumerate(entry.sampled_parameter_gradients):
            found.append((_Sum(name, f"sampled_parameter_gradients {index}", value.shape), value))
    for side, moment in travel.moments.items():
        if not taken & travel.saved[side]:
            value = moment(entry)
            found.append((_Sum(name, f"moment {side}", value.shape, moment.order), symmetric_packed(value)))
    if travel.mean_input and Record.INPUTS not in taken and entry.inputs is not None:
        value = entry.mean_row()
        found.append((_Sum(name, "input_mean", value.shape), value))
    return found


_Begun = list[tuple[dict[int, list[tuple[_Sum, Tensor]]], Pending]]


def _begun(ranks: Ranks, sums: Sequence[tuple[_Sum, Tensor]], owners: Mapping[str, int] | None) -> _Begun:
    """Begin to add up, in one tensor per owner and precision."""
    grouped: dict[tuple[torch.dtype, torch.device], dict[int, list[tuple[_Sum, Tensor]]]] = {}
    for place, value in sums:
        owner = 0 if owners is None else owners[place.layer]
        grouped.setdefault((value.dtype, value.device), {}).setdefault(owner, []).append((place, value))
    pending: _Begun = []
    for of_owner in grouped.values():
        flat = [
            torch.cat([value.reshape(-1) for _, value in of_owner[rank]]) if rank in of_owner else None
            for rank in range(ranks.count)
        ]
        pending.append((of_owner, ranks.begin_totals(flat, _STATISTICS, owners is None)))
    return pending


def _finished(ranks: Ranks, pending: _Begun, owners: Mapping[str, int] | None) -> dict[str, dict[str, Tensor]]:
    """The sums that belong to this process, by layer and name."""
    result: dict[str, dict[str, Tensor]] = {}
    for of_owner, begun in pending:
        for rank, total in enumerate(begun.wait()):
            if total is None or (owners is not None and rank != ranks.rank):
                continue
            sizes = [value.numel() for _, value in of_owner[rank]]
            for (entry, _), value in zip(of_owner[rank], total.split(sizes), strict=True):
                whole = symmetric_unpacked(value, entry.order) if entry.order else value.view(entry.shape)
                result.setdefault(entry.layer, {})[entry.name] = whole
    return result


@dataclass
class _Rows:
    """Rows that travel: entry n belongs to sample n, or to pass n of a layer whose rows all samples share."""

    layer: str
    name: str
    value: Tensor
    samples: int  # of this process's record
    passes: int  # number of entries per record: samples, or passes


def _rows(entry: LayerStatistics, travel: Travel, taken: Record) -> list[_Rows]:
    """What travels of one record."""
    passes = entry.samples if entry.shared_by == 1.0 else round(entry.samples / entry.shared_by)
    found: list[_Rows] = []

    def add(name: str, value: Tensor | None) -> None:
        if value is not None:
            found.append(_Rows(entry.layer.name, name, value, entry.samples, passes))

    for flag in _flags(taken):
        for name in _ROWS[flag]:
            value = getattr(entry, name)
            scaled = value is not None and name == "output_gradient"
            add(name, value * entry.gradient_scale if scaled else value)
    for name, flag in _WHOLE.items():
        for index, value in enumerate(getattr(entry.sample_gradients, name) or () if flag in travel.rows else ()):
            add(f"{name} {index}", value * entry.gradient_scale if name == "loss" else value)
    return found


def _gathered(
    ranks: Ranks, rows: Sequence[_Rows], owners: Mapping[str, int] | None, samples: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Tensor]]:
    """Rows of all processes, in their order, by layer and name: one exchange per precision."""
    grouped: dict[torch.dtype, list[_Rows]] = {}
    for entry in rows:
        grouped.setdefault(entry.value.dtype, []).append(entry)
    result: dict[str, dict[str, Tensor]] = {}
    for entries in grouped.values():
        pieces: list[list[Tensor]] = [[entries[0].value.new_empty(0)] for _ in range(ranks.count)]
        due: list[list[int]] = []
        for entry in entries:
            counts = samples[entry.layer]
            if entry.passes != entry.samples:  # as many passes on every process
                counts = [entry.passes if count else 0 for count in counts]
            per = entry.value.numel() // entry.passes
            for rank in range(ranks.count):
                if (owners is None or owners[entry.layer] == rank) and counts[ranks.rank]:
                    pieces[rank].append(entry.value.reshape(-1))
            here = owners is None or owners[entry.layer] == ranks.rank
            due.append([per * count * here for count in counts])
        sizes = [sum(column) for column in zip(*due, strict=True)]
        got = ranks.exchange([torch.cat(some) for some in pieces], sizes, _STATISTICS)
        for entry, numbers in zip(entries, due, strict=True):
            if not any(numbers):
                continue
            parts = []
            for rank, size in enumerate(numbers):
                parts.append(got[rank][:size])
                got[rank] = got[rank][size:]
            shape = entry.value.shape[1:]
            result.setdefault(entry.layer, {})[entry.name] = torch.cat(parts).view(-1, *shape)
    return result


def _joint(
    own: LayerStatistics,
    counts: Sequence[int],
    gathered: Mapping[str, Tensor],
    added: Mapping[str, Tensor],
    early: Mapping[str, Tensor],
) -> LayerStatistics:
    """The record of the joint mini-batch."""
    samples, shared_by = sum(counts), 1.0
    if own.shared_by > 1.0:
        shared_by = samples / (round(own.samples / own.shared_by) * sum(map(bool, counts)))

    def listed(found: Mapping[str, Tensor], name: str) -> Tensors | None:
        values = [found[key] for key in found if key.startswith(f"{name} ")]
        return tuple(values) or None

    return own.with_fields(
        samples=samples,
        shared_by=shared_by,
        gradient_scale=1.0,
        inputs=gathered.get("inputs"),
        output_gradient=gathered.get("output_gradient"),
        sampled_gradient=gathered.get("sampled_gradient"),
        curvature_roots=gathered.get("curvature_roots"),
        sample_gradients=SampleGradients(*(listed(gathered, name) for name in _WHOLE)),
        mean_preactivation=added.get("mean_preactivation"),
        mean_gradient=added.get("mean_gradient"),
        sampled_parameter_gradients=listed(added, "sampled_parameter_gradients"),
        moments={key.split()[1]: value for key, value in added.items() if key.startswith("moment ")} | dict(early),
        input_mean=added.get("input_mean"),
        measured={key: added[f"measured {key}"] for key in own.measured},
    )
