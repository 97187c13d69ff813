"""What a person sees while runs are in progress: bars on a terminal, one line per evaluation in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .config import Budget
from .evaluation import Metrics
from .on_screen import say
from .training_run import TrainingRun

__all__ = ["Display"]

_REFRESH_SECONDS = 0.5
_WIDE = 120
"""Columns of a terminal on which there is a bar, too, and the time that is left."""
_BESIDE = 50
"""What those take of a line."""


class Display:
    """Progress of one run after another.

    Args:
        console: where to draw; a terminal gets one bar per run, anything else one line per evaluation.
        budget: of every run.
        line_seconds: least time between two lines of a log, >= 0; the first and the last line of a run always come.
    """

    def __init__(self, console: Console, budget: Budget, line_seconds: float = 0.0) -> None:
        self._console = console
        self._budget = budget
        self._line_seconds = line_seconds
        self._drawn = 0.0
        self._name = ""
        self._task: TaskID | None = None
        self._told: dict[TaskID, Sequence[str]] = {}
        self._names: list[str] = []
        self._wide = console.width >= _WIDE
        wide: list[ProgressColumn] = [
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        ]
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            *(wide if self._wide else wide[1:2]),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        """Start the bar of the next run."""
        self._name = name
        self._names.append(name)
        for task, pieces in self._told.items():  # a longer name leaves them less room
            self._progress.update(task, state=self._fitting(pieces))
        self._task = self._progress.add_task(f"[bold]{escape(name)}", total=1.0, state="starting")

    def _tell(self, share: float, pieces: Sequence[str]) -> None:
        """Move the bar, and say what fits beside it."""
        assert self._task is not None
        self._told[self._task] = pieces
        self._progress.update(self._task, completed=share, state=self._fitting(pieces))

    def _fitting(self, pieces: Sequence[str]) -> str:
        """The first of the pieces that fit into what the longest name leaves of the line; all of them if they do."""
        room = self._console.width - max(map(len, self._names)) - 3 - (_BESIDE if self._wide else 0)
        for number in range(len(pieces), 1, -1):
            if len(text := "  ".join(pieces[:number])) <= room:
                return text
        return pieces[0]

    def step(self, run: TrainingRun) -> None:
        """Move the bar, at most twice a second: reading the loss waits for the device."""
        now = time.perf_counter()
        if self._task is None or not self._console.is_terminal or now - self._drawn < _REFRESH_SECONDS:
            return
        self._drawn = now
        loss = [] if run.last_loss is None else [f"batch loss {float(run.last_loss):.4g}"]
        self._tell(self._budget.spent(run.epoch, run.clock.seconds), [f"epoch {run.epoch:.1f}", *loss])

    def measured(self, metrics: Metrics) -> None:
        """Show an evaluation."""
        now = time.perf_counter()
        pieces = [f"epoch {metrics.epoch:5.4g}", f"train {metrics.train_loss:.5g}", f"test {metrics.test_loss:.5g}"]
        pieces += [] if metrics.relative_l2 is None else [f"relative L2 {metrics.relative_l2:.3g}"]
        pieces += [] if metrics.test_accuracy is None else [f"accuracy {metrics.test_accuracy:.2%}"]
        pieces.append(f"{metrics.seconds:.1f} s")
        share = self._budget.spent(metrics.epoch, metrics.seconds)
        if self._console.is_terminal and self._task is not None:
            self._drawn = now
            self._tell(share, pieces)
        elif share >= 1 or metrics.iterations == 0 or now - self._drawn >= self._line_seconds:
            self._drawn = now
            say(self._console, f"{self._name:<14} {'  '.join(pieces)}")

    def failed(self, reason: str) -> None:
        """Show that the run broke down."""
        if self._console.is_terminal and self._task is not None:
            self._progress.update(self._task, state="[red]broke down")
        say(self._console, f"[red]{escape(self._name)} broke down:[/] {escape(reason)}", markup=True)
