"""The command that maps where linear convergence is certified."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...analysis.function_space.convergence_map import (
    MAPPED,
    Cell,
    CellKey,
    Surroundings,
    cells_of,
    interval_of,
    measure_cell,
)
from ...errors import ArgumentError, require_interval
from ..report.tables import screen_table, write_rows
from ..runs.environment import choose_device, describe_environment, prepare_process
from ..runs.interrupts import interruptible
from ..runs.records import write_json
from .flags import Count, DeviceFlag, StyleFlag
from .screen import bar, say

__all__ = ["CellFile", "ConvergenceMap"]

_DAMPINGS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_SHOWN = {
    "blocks": "blocks",
    "width": "width",
    "certified": "cells certified",
    "eta": "largest certified eta",
    "interval": "its damping interval",
    "best": "best measured ratio",
}
_ETAS = (0.003, 0.01, 0.03, 0.1, 0.3, 0.7)


@dataclass(frozen=True, kw_only=True)
class ConvergenceMap(DeviceFlag, StyleFlag):
    """Map where full-batch linear convergence is certified and what is measured, block by block.

    Runs a two-layer tanh net in function space (float64) for every combination of blocks, width, damping and step size.
    Every finished cell is a line of cells.jsonl in the folder, and is not run again; Ctrl-C ends after the present
    cell. The folder also gets map.json, map.csv and the figures (PNG and PDF).

    Exit status: 0 finished, 1 a certified cell missed its rate, 2 bad input, 130 interrupted.
    """

    blocks: tuple[str, ...] = tuple(MAPPED)
    """Structures: per-output, per-input, whole (exact natural gradient), kfac on a dense net; kernel, conv-whole,
    conv-kfac on a convolution."""
    widths: tuple[int, ...] = (100, 400)
    """Hidden neurons, or output channels."""
    dampings: tuple[float, ...] = _DAMPINGS
    """Damping values, each > 0."""
    etas: tuple[float, ...] = _ETAS
    """Step sizes, each in (0, 1]; 1 - eta is the rate to be certified."""
    steps: int = 30
    """Steps of a run."""
    seed: int = 0
    """Seed of data and weights."""
    memory_gib: float = 0.016
    """Room for the tensors of one chunk of neurons, in GiB; more pays on a GPU."""
    out: Path = Path("runs") / "convergence-map"
    """Folder to write, and to continue."""
    threads: Count = None
    """Threads of one operation on the CPU. Default: torch's own choice."""

    def run(self, console: Console) -> int:
        """Measure what is missing, print a table, draw, and return the exit status."""
        from ..report.convergence_figures import save_map_figures

        prepare_process(self.threads)
        require_interval("memory_gib", self.memory_gib, 0.0, math.inf, closed="()")
        surroundings = Surroundings(str(choose_device(self.device)), int(self.memory_gib * 2**30))
        keys = cells_of(self.blocks, self.widths, self.dampings, self.etas, steps=self.steps, seed=self.seed)
        cells, finished = self._measure(console, keys, surroundings)
        if not cells:
            return 130
        console.print(_table(cells))
        write_json(
            self.out / "map.json",
            {
                "environment": describe_environment(choose_device(self.device)),
                "cells": [cell.to_dict() for cell in cells],
            },
        )
        write_rows(self.out / "map.csv", [cell.to_dict() for cell in cells])
        save_map_figures(cells, self.out)
        broken = [cell for cell in cells if cell.certified and not cell.kept]
        for cell in broken:
            say(console, f"[red]violated[/] {cell.key}: {cell.worst_ratio:.6g} > {1 - cell.key.eta:.6g}", markup=True)
        say(console, f"cells, tables and figures lie in {self.out}")
        return 1 if broken else 0 if finished else 130

    def _measure(
        self, console: Console, keys: Sequence[CellKey], surroundings: Surroundings
    ) -> tuple[list[Cell], bool]:
        """All cells that are known now, in the order of ``keys``, and whether none is missing."""
        store = CellFile(self.out / "cells.jsonl")
        known = store.read()
        with bar(console) as progress, interruptible() as interrupted:
            task = progress.add_task("", total=len(keys))
            for key in keys:
                if interrupted():
                    break
                if key not in known:
                    progress.update(task, description=f"{key.blocks} {key.width}: {key.damping:g}, {key.eta:g}")
                    known[key] = measure_cell(key, surroundings)
                    store.append(known[key])
                progress.advance(task)
        return [known[key] for key in keys if key in known], all(key in known for key in keys)


@dataclass(frozen=True)
class CellFile:
    """Cells on disk, one JSON object per line.

    Args:
        path: created with its folder by the first ``append``.
    """

    path: Path

    def read(self) -> dict[CellKey, Cell]:
        """Everything readable; the half line that an interruption leaves is skipped.

        Raises:
            ArgumentError: for lines that are JSON but no cells.
        """
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            with suppress(json.JSONDecodeError):
                values = json.loads(line)
                try:
                    cell = Cell.from_dict(values)
                except (KeyError, TypeError, AttributeError):
                    raise ArgumentError(f"{self.path} holds something else than cells; name another folder") from None
                found[cell.key] = cell
        return found

    def append(self, cell: Cell) -> None:
        """Add one cell; numbers that are not finite become null."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in cell.to_dict().items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        broken = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if broken else "") + json.dumps(values, allow_nan=False) + "\n")


def _table(cells: Sequence[Cell]) -> Table:
    """Per structure and width: the largest certified step size and its damping interval."""
    rows = []
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.key.blocks, cell.key.width), []).append(cell)
    for (blocks, width), own in groups.items():
        certified = [cell for cell in own if cell.certified]
        best = min((cell.worst_ratio for cell in own if math.isfinite(cell.worst_ratio)), default=math.nan)
        row = {"blocks": blocks, "width": width, "certified": f"{len(certified)} of {len(own)}", "best": best}
        if certified:
            row["eta"] = max(cell.key.eta for cell in certified)
            low, high = interval_of(cell for cell in own if cell.key.eta == row["eta"])
            row["interval"] = f"{low:g} to {high:g}"
        rows.append(row)
    return screen_table("certified linear convergence", rows, _SHOWN, digits=3)
