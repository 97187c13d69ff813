"""Second moments that set out for their owners while the user's backward pass is still running.

When the gradient of the loss has reached the model's output, the inputs of all layers are known, and so are the rows of
sampled labels: their moments are added up by collectives that run beside the rest of the backward pass. That holds for
a mini-batch of one pass; whether the last step was one is told at every meeting, and only if it was so on all processes
do moments set out early in the next. If it then was not (a first accumulated micro-batch), what came early is dropped.

These collectives have a process group of their own, so that their order beside those of DDP and FSDP2 does not matter,
and every process begins them once in such a step: at the latest when it meets the others, with zeros that nobody uses.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...curvature.backends.capture import Capture
from ...curvature.records.needs import Record
from ...curvature.records.statistics import LayerStatistics
from ..processes.packing import packed_size, symmetric_packed, symmetric_unpacked
from ..processes.ranks import Pending, Ranks
from ..processes.records import Travel, rows_are_less

__all__ = ["EarlyMoments"]

_KNOWN = {"inputs": Record.INPUTS, "outputs": Record.SAMPLED}
"""By side the records that are complete when the gradient has reached the output."""


class EarlyMoments:
    """The early moments of one optimizer.

    Args:
        ranks: the processes.
        owners: by layer; ``None``: every process gets all.
        speaks: whether this process's samples count.
        device: of the parameters.

    Attributes:
        used: in how many steps moments came early and were those of the step.
    """

    def __init__(self, ranks: Ranks, owners: Mapping[str, int] | None, speaks: bool, device: torch.device):
        self.ranks, self.owners, self.speaks, self._device = ranks, owners, speaks, device
        ranks.open_side(device)
        self._travels: Mapping[str, Travel] = {}
        self._sizes: dict[str, int] = {}  # of every layer, the largest share of the last meeting
        self._enabled = self._whole = self._over = False
        self.used = 0
        self._arrivals = self._discards = 0
        self._begun: tuple[list[tuple[str, str, int]], Pending] | None = None
        self._capture: weakref.ref[Capture] | None = None

    def arm(self, capture: Any, travels: Mapping[str, Travel], plain: bool) -> None:
        """A new step begins.

        Args:
            capture: that records it; other backends than the hooks tell nothing early.
            travels: what is brought to the owners in this step.
            plain: whether the loss is scaled by nobody.
        """
        self._travels, self._arrivals, self._over = travels, 0, False
        self._enabled = self._enabled and plain
        self._capture = weakref.ref(capture) if isinstance(capture, Capture) and plain else None
        if isinstance(capture, Capture):
            capture.arrived = self.arrived if self.chosen() else None

    def settle(self) -> None:
        """The step is given up: what has set out, or would have, is waited for, so that the next begins in order."""
        if self._begun is None and not self._over and self.chosen():
            self._begin({})
        self.finish(False, {})

    def chosen(self) -> list[tuple[str, str, int]]:
        """Layers, sides and orders of the moments that set out early in this step; the same on every process."""
        found = []
        for name, travel in self._travels.items() if self._enabled else ():
            for side, moment in travel.moments.items():
                known = travel.saved[side] == _KNOWN[side] and not travel.rows & travel.saved[side]
                if known and name in self._sizes and self._sizes[name] >= 0:
                    found.append((name, side, moment.order))
        return found

    def arrived(self) -> None:
        """The gradient has reached the output of a pass."""
        self._arrivals += 1
        capture = None if self._capture is None else self._capture()
        if self._arrivals == 1 and capture is not None:
            self._discards = capture.discards
            if self._begun is None:
                self._begin(capture.records_at_output())
            else:  # of an evaluation that was broken off: they are void, and the others wait for no further ones
                self._whole = False

    def _begin(self, records: Mapping[str, LayerStatistics]) -> None:
        """Set out, with zeros where nothing is known."""
        places = self.chosen()
        self._whole = all(name in records for name, _, _ in places)
        flat: list[list[Tensor]] = [[] for _ in range(self.ranks.count)]
        for name, side, _ in places:
            moment, record = self._travels[name].moments[side], records.get(name)
            known = record is not None and self.speaks
            value = moment(record).mul_(record.samples) if known and record else moment.zeros(self._device)
            flat[0 if self.owners is None else self.owners[name]].append(symmetric_packed(value))
        joined = [torch.cat(values) if values else None for values in flat]
        self._begun = places, self.ranks.begin_totals(joined, "statistics", self.owners is None, early=True)

    def valid(self, found: Mapping[str, LayerStatistics]) -> bool:
        """Whether what has set out is what the step is about; every process has set out when this returns.

        Args:
            found: what this process has recorded.
        """
        capture = None if self._capture is None else self._capture()
        if self._begun is None and self.chosen():
            self._begin({})
            return False
        plain = self._whole and self._arrivals == 1 and capture is not None and capture.discards == self._discards
        return plain and all(name in found for name, _, _ in self.chosen())

    def plain(self, found: Mapping[str, LayerStatistics]) -> bool:
        """Whether the next step may set out early, as far as this process is concerned."""
        return self._capture is not None and all(
            not entry.ragged and not entry.mixed and not entry.unseen and entry.shared_by == 1.0
            for entry in found.values()
        )

    def finish(self, valid: bool, samples: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Tensor]]:
        """The moments of the joint mini-batch that belong to this process, by layer and side; none if they are void.

        Args:
            valid: whether they are on every process.
            samples: by layer, of every process.
        """
        self._over = True
        if self._begun is None:
            return {}
        (places, pending), self._begun = self._begun, None
        totals = pending.wait()
        self.used += valid
        result: dict[str, dict[str, Tensor]] = {}
        positions = [0] * self.ranks.count
        for name, side, order in places if valid else ():
            owner = 0 if self.owners is None else self.owners[name]
            size, start = packed_size(order), positions[owner]
            positions[owner] += size
            if self.owners is None or owner == self.ranks.rank:
                packed = totals[owner][start : start + size]
                result.setdefault(name, {})[side] = symmetric_unpacked(packed, order).div_(sum(samples[name]))
        return result

    def learn(self, enabled: bool, found: Mapping[str, LayerStatistics], samples: Mapping[str, Sequence[int]]) -> None:
        """What the next step may do, as all processes have told.

        Args:
            enabled: whether each was plain.
            found: records of this one.
            samples: by layer, of every process.
        """
        self._enabled = enabled
        for name, travel in self._travels.items():
            entry, most = found.get(name), max(samples.get(name, [0]))
            told = most, self.ranks.count, self.owners is None
            if entry is not None and any(rows_are_less(entry, travel, side, *told) for side in travel.moments):
                self._sizes[name] = -1  # rows are fewer numbers: they go when everything is known
            elif entry is not None:
                self._sizes[name] = most
