"""What one step costs each of many processes on this machine: started, counted, and compared with the forecast."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ...errors import ArgumentError, OsculateError
from ...framework.optimizer.forecast import DIVISIONS
from .sharing import Case, forecast

__all__ = ["METHODS", "Shares", "benchmark_processes", "processes_table"]

METHODS = ("kfac", "kbfgs", "joint-kfac", "mbf", "shampoo")
"""Of which a table is made unless others are chosen."""

PARTS = ("statistics", "gradients", "directions", "numbers")


@dataclass(frozen=True)
class Shares:
    """One method in one division.

    Attributes:
        method: its name.
        division: how the processes divide the work.
        sent: bytes per step by what they carry, counted; one entry per process. What DDP and FSDP2 exchange by
            themselves nobody counts: it is the formula's.
        formula: the same from shapes alone.
        state: bytes of state and momentum that each process keeps, counted.
        state_formula: the same from shapes alone.
        inverses: operations of each process when inverses are renewed.
        directions: operations of each process in every step.
        busiest: largest entry of ``inverses`` over the P-th part of all of them, >= 1; ``None``: there are none.
        allowed: bytes per process and step of DDP's gradients and of every moment and pair, added up once.
        milliseconds: median step of the slowest process; on a machine with fewer cores than processes a remark.
        shortened: steps that the guard shortened, which the formula does not foresee.
    """

    method: str
    division: str
    sent: list[dict[str, float]]
    formula: list[dict[str, float]]
    state: list[int]
    state_formula: list[int]
    inverses: list[float]
    directions: list[float]
    busiest: float | None
    allowed: float
    milliseconds: float
    shortened: int

    @property
    def agrees(self) -> bool:
        """Whether what was counted is what the formula says, byte by byte on every process."""
        return self.sent == self.formula and self.state == self.state_formula

    def mean(self, *names: str) -> float:
        """Bytes per step of some kinds, mean over processes."""
        return sum(entry.get(name, 0.0) for entry in self.sent for name in names) / len(self.sent)

    @property
    def wrapper(self) -> float:
        """Bytes per step that DDP and FSDP2 exchange."""
        return self.mean(*{name for entry in self.sent for name in entry if " of " in name})

    @property
    def total(self) -> float:
        """Gradients, statistics and directions per step, mean over processes."""
        return self.wrapper + self.mean("statistics", "gradients", "directions")


def benchmark_processes(
    count: int,
    network: str,
    methods: Sequence[str],
    divisions: Sequence[str],
    samples: int,
    steps: int,
    note: Callable[[str], None] = lambda text: None,
    seconds: float = 3600.0,
) -> list[Shares]:
    """Start processes, one thread each, that train together with every method in every division.

    Args:
        count: number of processes P >= 2.
        network: a name from :data:`~.sharing.NETWORKS`.
        methods: registered names.
        divisions: names from :data:`~osculate.framework.optimizer.forecast.DIVISIONS`.
        samples: of every process in a step, >= 1.
        steps: to take, >= 1.
        note: told now and then how far they are.
        seconds: after which they are ended.

    Raises:
        ArgumentError: if a number is out of range or a division unknown.
        OsculateError: if a process fails.
    """
    if count < 2 or samples < 1 or steps < 1:
        raise ArgumentError(f"it takes 2 processes, a sample each and a step, got {count}, {samples} and {steps}")
    for division in divisions:
        if division not in DIVISIONS:
            raise ArgumentError(f"division must be one of {', '.join(DIVISIONS)}, got {division!r}")
    cases = [Case(network, method, division, samples, steps) for method in methods for division in divisions]
    foreseen = [forecast(case, count) for case in cases]  # which refuses unknown names, too
    found = _counted(cases, count, note, seconds)
    return [_shares(case, foreseen[index], [rank[index] for rank in found]) for index, case in enumerate(cases)]


def _shares(case: Case, foreseen: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> Shares:
    formula, sent = [], []
    for rank, counted in zip(foreseen, found, strict=True):
        by_wrapper = {name: value for name, value in rank["traffic"].items() if " of " in name}
        formula.append({name: value / case.steps for name, value in sorted(rank["traffic"].items())})
        both = by_wrapper | {name: value for name, value in counted["traffic"].items() if value}
        sent.append({name: value / case.steps for name, value in sorted(both.items())})
    inverses = [rank["inverses"] for rank in foreseen]
    share = foreseen[0]["inverses of all"] / len(foreseen)
    return Shares(
        case.method,
        case.division,
        sent,
        formula,
        [rank["state"] for rank in found],
        [rank["state"] for rank in foreseen],
        inverses,
        [rank["directions"] for rank in foreseen],
        max(inverses) / share if share else None,
        foreseen[0]["allowed"] / case.steps,
        1e3 * max(rank["seconds"] for rank in found),
        found[0]["shortened"],
    )


def _counted(cases: Sequence[Case], count: int, note: Callable[[str], None], seconds: float) -> list[Any]:
    """What each process has written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        words = [sys.executable, "-W", "ignore", "-m", f"{__package__}.sharing"]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                with (folder / f"{rank}.log").open("wb") as log:
                    command = [*words, str(rank), str(count), name]
                    running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            _wait(running, folder, len(cases), note, time.monotonic() + seconds)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _wait(
    running: Sequence[subprocess.Popen[bytes]], folder: Path, cases: int, note: Callable[[str], None], end: float
) -> None:
    """Until all are over.

    Raises:
        OsculateError: if one fails, or they take too long.
    """
    told = ""
    while True:
        codes = [process.poll() for process in running]
        for rank, code in enumerate(codes):
            if code:
                said = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
                raise OsculateError(f"process {rank} ended with status {code}: {said[-1] if said else 'no word'}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > end:
            raise OsculateError("the processes did not end in time; ask for fewer steps, or a smaller network")
        progress = folder / "progress"
        done = progress.read_text() if progress.exists() else ""
        if done and done != told:
            note(f"{done} of {cases} runs")
            told = done
        time.sleep(0.1)


def processes_table(rows: Sequence[Shares], title: str) -> Table:
    """The table for the screen, 80 columns."""
    caption = (
        "KB per process and step, mean over processes: what DDP or FSDP2 exchange (formula), statistics, gradients "
        "and directions (counted); sent: these over DDP's gradients and all moments and pairs, added up once; "
        "=: every byte sent and kept is the formula's. MB of state of the fullest process. P max: inverse work of the "
        "busiest process over the P-th part."
    )
    table = Table(title=title, caption=caption, pad_edge=False, collapse_padding=True, box=None, header_style="bold")
    for heading in ("division", "wrapper", "stat.", "grad.", "dir.", "sent", "=", "state", "P max", "ms"):
        table.add_column(heading, justify="left" if heading == "division" else "right", no_wrap=True)
    before = ""
    for row in rows:
        if row.method != before:
            table.add_row(f"[bold]{row.method}")
        table.add_row(
            f" {row.division}",
            _short(row.wrapper / 1e3),
            *(_short(row.mean(name) / 1e3) for name in ("statistics", "gradients", "directions")),
            f"{row.total / row.allowed:.2f}",
            "=" if row.agrees else "[red]no",
            _short(max(row.state) / 1e6),
            "" if row.busiest is None else f"{row.busiest:.2f}",
            f"{row.milliseconds:.0f}",
        )
        before = row.method
    return table


def _short(value: float) -> str:
    """Three digits or so."""
    return "0" if not value else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
