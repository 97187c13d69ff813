"""What a person sees of a study: a table of what runs and what is left, or one line per finished run in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..report.breakdowns import Breakdown, breakdown_rows, breakdown_screen, in_short
from ..report.scoring import quantile
from ..report.tables import screen_table
from ..runs.on_screen import say
from .definition import METRICS, Study
from .ledger import FINAL, TUNE, Entry, Slot

__all__ = ["Board", "duration"]


class Board:
    """The state of a study while it runs.

    Args:
        console: where to draw; a terminal gets a live table, anything else lines.
        study: whose runs are shown.
        begun: runs that an earlier command began: what is left of them says nothing about how long others take.
    """

    def __init__(self, console: Console, study: Study, begun: Collection[Slot] = ()) -> None:
        self._console = console
        self._study = study
        self._begun = frozenset(begun)
        self._began = time.time()
        self._first: int | None = None
        self._seen: set[Slot] = set()
        self._started: set[tuple[Slot, float]] = set()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        say(self._console, text)

    def show(self, entries: Mapping[Slot, Entry]) -> None:
        """Draw the table, or print what has changed."""
        done = {slot for slot, entry in entries.items() if entry.state == "done"}
        if self._first is None:
            self._first, self._seen = len(done), done
            if done:
                self.say(f"{len(done)} of {len(entries)} runs are done already")
        if self._live is not None:
            self._live.update(self.table(entries), refresh=True)
            return
        for slot in entries:
            entry = entries[slot]
            if slot in done - self._seen:
                self._seen.add(slot)
                value = _miss(entry) if entry.value is None else f"{entry.value:.6g}"
                self.say(f"[{len(self._seen)}/{len(entries)}] {slot}: {value}{self._left(done, len(entries))}")
            elif entry.state == "running" and entry.started and (slot, entry.started) not in self._started:
                self._started.add((slot, entry.started))
                self.say(f"started {slot}")

    def end(self, entries: Mapping[Slot, Entry]) -> None:
        """Print how all arms ended, and of those that broke down at which step and why."""
        self._console.print(self.table(entries))
        rows = breakdown_rows(
            Breakdown(slot.problem, slot.arm, f"{slot.phase}-{slot.index}", entry.steps, entry.why or entry.status)
            for slot, entry in entries.items()
            if entry.state == "done" and entry.value is None
        )
        if rows:
            self._console.print(breakdown_screen(rows))

    def table(self, entries: Mapping[Slot, Entry]) -> Table:
        """One row per arm and problem; a column comes when there is something in it."""
        done = {slot for slot, entry in entries.items() if entry.state == "done"}
        title = f"{self._study.title or self._study.name}: {len(done)} of {len(entries)} runs"
        rows = [
            {"problem": problem.label, "arm": arm.label}
            | _row(
                [own for slot, own in entries.items() if (slot.problem, slot.arm) == (problem.label, arm.label)],
                METRICS[self._study.tuning_metric(problem.label)],
            )
            for problem in self._study.problems
            for arm in self._study.arms
        ]
        return screen_table(title + self._left(done, len(entries)), rows, {name: name for name in rows[0]}, digits=5)

    def _left(self, done: Collection[Slot], total: int) -> str:
        """How long it may take, by the runs that were begun and done since the board is there."""
        fresh = len(done) - (self._first or 0) - len(self._begun.intersection(done))
        if fresh <= 0 or len(done) == total:
            return ""
        return f", about {duration((time.time() - self._began) / fresh * (total - len(done)))} left"


def _row(own: list[Entry], more: bool) -> dict[str, Any]:
    """What is known of an arm on a problem; of its metric ``more`` may be better. Misses are infinitely bad."""
    sign = -1.0 if more else 1.0

    def costs(phase: str) -> list[float]:
        return [math.inf if entry.value is None else sign * entry.value for entry in over if entry.slot.phase == phase]

    def count(phase: str) -> str:
        phased = [entry for entry in own if entry.slot.phase == phase]
        return f"{sum(entry.state == 'done' for entry in phased)}/{len(phased)}" if phased else ""

    over = [entry for entry in own if entry.state == "done"]
    finals, trials = costs(FINAL), [cost for cost in costs(TUNE) if cost < math.inf]
    running = [
        f"{entry.slot.phase}-{entry.slot.index} {duration(time.time() - (entry.started or time.time()))}"
        for entry in own
        if entry.state == "running"
    ]
    return {
        "tuned": count(TUNE),
        "final": count(FINAL),
        "misses": sum(entry.value is None for entry in over) or None,
        "best trial": sign * min(trials) if trials else None,
        "median of finals": sign * float(quantile(finals, 0.5)) if finals else None,
        "running": ", ".join(running),
    }


def _miss(entry: Entry) -> str:
    """A miss in words, as far as the book knows more."""
    after = "" if entry.steps is None else f" after {entry.steps} step(s)"
    return f"miss{after}" + (f": {in_short(entry.why)}" if entry.why else "")


def duration(seconds: float) -> str:
    """A length of time in words: seconds, minutes or hours."""
    seconds = max(0, round(seconds))
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds // 60} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
