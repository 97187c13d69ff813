"""The process that runs a study: it starts the workers, watches them, and shows how far they are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from rich.console import Console

from ...errors import OsculateError
from ..runs.interrupts import interruptible
from .definition import Study
from .display import Board
from .folders import give_up, reopen_damaged, run_folder, settle, write_study
from .ledger import Entry, Ledger, Slot
from .presence import clear
from .same_folder import require_same
from .worker import SETBACK, Assignment, Place, work

__all__ = ["SetbackError", "WorkerError", "conduct"]

_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 60.0


class SetbackError(OsculateError, RuntimeError):
    """A run met what no method is to blame for: no space, no memory, damaged files, an error of the program."""


class WorkerError(OsculateError, RuntimeError):
    """Worker processes end again and again without doing their work."""


@dataclass
class _Crew:
    """The worker processes, by name."""

    study: Study
    place: Place
    processes: dict[str, BaseProcess] = field(default_factory=dict)
    deaths: int = 0
    troubles: SimpleQueue[str] = field(default_factory=multiprocessing.get_context("spawn").SimpleQueue)

    def start(self) -> None:
        """Add one worker."""
        name = uuid.uuid4().hex[:12]
        told = Assignment(self.study, self.place, name)
        process = multiprocessing.get_context("spawn").Process(
            target=work, args=(told, self.troubles), daemon=True, name=name
        )
        process.start()
        self.processes[name] = process

    def signal(self, number: int) -> None:
        """Send a signal to every worker."""
        for process in self.processes.values():
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def replace_dead(self) -> None:
        """Forget workers that have ended; those that died are replaced, up to a point.

        Raises:
            SetbackError: one ended with what no method is to blame for.
            WorkerError: too many died.
        """
        for name, process in list(self.processes.items()):
            if process.is_alive():
                continue
            process.join()
            del self.processes[name]
            if process.exitcode == SETBACK:
                raise SetbackError(
                    f"{self.troubles.get()}\nno method is to blame: the run is given back, and the same command does "
                    "it again once the cause is gone"
                )
            if process.exitcode:
                self.deaths += 1
                if self.deaths > 3 * self.place.workers + 3:
                    raise WorkerError(
                        f"{self.deaths} worker processes died (the last with exit code {process.exitcode}); see their "
                        "messages above; killed by signal 9 without a message means that there was no memory left"
                    )
                self.start()

    def enforce(self, limit: float | None, entries: Mapping[Slot, Entry], ledger: Ledger) -> list[Slot]:
        """Kill the workers whose runs exceed the limit; their runs are misses. Returns those runs."""
        late = []
        for entry in entries.values() if limit is not None else ():
            process = self.processes.get(entry.owner)
            overdue = entry.started is not None and limit is not None and time.time() - entry.started > limit
            if entry.state == "running" and process is not None and overdue:
                process.kill()
                process.join()
                del self.processes[entry.owner]  # no death that would count against the crew
                reason = f"over the limit of {limit:g} s"
                if ledger.finish(entry, None, reason, reason):
                    give_up(self.place.out, ledger, entry.slot, reason)
                    late.append(entry.slot)
                self.start()
        return late


def conduct(study: Study, place: Place, source: Path | None, console: Console) -> bool:
    """Run a study to its end, or until Ctrl-C.

    The first Ctrl-C lets every worker finish its step and save; the second one gives up the steps in progress.

    Args:
        study: as ``checked`` returned it.
        place: where it runs.
        source: the file it was read from, or ``None``.
        console: shows what runs and what is left.

    Returns:
        Whether all runs are done.

    Raises:
        ArgumentError: the folder holds another study, or other runs than this one asks for.
        SetbackError: a run met what no method is to blame for; it is given back.
        OutputError: the book cannot be written.
        WorkerError: workers die again and again.
    """
    ledger = place.ledger(study)
    require_same(place.out, ledger, place.data_dir, source)
    ledger.publish()
    ledger.recover(ledger.entries(), blamed=False)  # as long as the files of the dead tell that they are dead
    settle(place.out, ledger)
    damaged = reopen_damaged(place.out, ledger)
    clear(ledger.presence)
    write_study(place.out, study, ledger, source)
    crew = _Crew(study, place)
    entries = ledger.entries()
    begun = [slot for slot, entry in entries.items() if entry.state != "done" and _has_begun(place.out, slot)]
    with interruptible() as stopped, Board(console, study, begun) as board:
        for line in damaged:
            board.say(line)
        board.show(entries)
        left = sum(entry.state != "done" for entry in entries.values())
        for _ in range(min(place.workers, left)):
            crew.start()
        try:
            _watch(crew, ledger, board, stopped)
        finally:
            crew.signal(signal.SIGKILL)
    entries = ledger.entries()
    settle(place.out, ledger)
    clear(ledger.presence)
    board.end(entries)
    return all(entry.state == "done" for entry in entries.values())


def _has_begun(out: Path, slot: Slot) -> bool:
    return run_folder(out, slot).metrics_file.exists()


def _watch(crew: _Crew, ledger: Ledger, board: Board, stopped: Callable[[], bool]) -> None:
    while crew.processes:
        time.sleep(_LOOK_SECONDS)
        entries = ledger.entries()
        board.show(entries)
        if stopped():
            _wind_down(crew, board)
            return
        for slot in crew.enforce(crew.study.limit, entries, ledger):
            board.say(f"{slot}: killed, over the limit of {crew.study.limit:g} s")
        try:
            crew.replace_dead()
        except SetbackError:
            _wind_down(crew, board)
            raise
    board.show(ledger.entries())


def _wind_down(crew: _Crew, board: Board) -> None:
    board.say("stopping: every worker finishes its step and saves; Ctrl-C again to give up the steps in progress")
    crew.signal(signal.SIGINT)
    until = time.time() + _PATIENCE_SECONDS
    try:
        for process in crew.processes.values():
            process.join(max(0.0, until - time.time()))
    except KeyboardInterrupt:
        board.say("giving up the steps in progress")
