"""A worker: one process that takes runs out of the book, one after another, until there is none left.

Runs share the process, and are not vectorised over seeds or learning rates. Measured on one core, in seconds of its
time: imports 1.1, the first run of one epoch on the small curves autoencoder 1.6, every further one 0.28, so that a
process for every run would cost ten times the runs themselves. SGD-momentum on 1, 4 and 8 such networks at once by
``torch.func`` (``vmap`` over stacked parameters) took 9.7, 7.0 and 7.4 milliseconds per step and network, one after
another 4.3 to 4.7: stacking is slower already for the simplest method, and curvature by hooks cannot be stacked at all.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from rich.console import Console

from ...errors import OsculateError, require_positive_integer
from ..problems import get_problem
from ..runs.config import Budget, RunConfig
from ..runs.environment import prepare_process
from ..runs.evaluation import Metrics
from ..runs.interrupts import interruptible
from ..runs.runs import Resume, run_in_folder
from ..runs.setbacks import in_words, is_setback
from ..runs.targets import DamagedError, HeldError, OutputError, exclusive
from ..runs.training import EveryEpoch
from ..runs.watched import Extras
from ..runs.wholeness import contradiction_in
from .definition import Study
from .folders import NOT_FINISHED, breakdown, recorded_value, run_folder, told, write_trial
from .ledger import FINAL, TUNE, Entry, Ledger, Slot, open_storage
from .presence import BEAT_SECONDS
from .same_folder import misfit

__all__ = ["SETBACK", "Assignment", "Place", "perform", "processors", "work"]

SETBACK = 75
"""Exit code of a worker that met an error no method is to blame for; its run is given back."""

_POLL_SECONDS = 0.5


class _SetbackError(Exception):
    """What ended a run and says nothing of its method."""


def processors() -> int:
    """Return how many this process may use, which can be fewer than the machine has."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Place:
    """Where a study runs.

    Args:
        out: its folder.
        storage: URL of a database that several machines share, or ``None`` for a journal in the folder.
        data_dir: where the data sets lie, or ``None``.
        workers: processes, >= 1; the processor's threads are divided among them.
        tensorboard: whether every run leaves event files for TensorBoard too.
    """

    out: Path
    storage: str | None = None
    data_dir: Path | None = None
    workers: int = 1
    tensorboard: bool = False

    def __post_init__(self) -> None:
        require_positive_integer("workers", self.workers)

    @property
    def threads(self) -> int:
        """Threads of one operation in every worker: its share of the processors that this process may use.

        Never more than the environment variable ``OMP_NUM_THREADS`` allows.
        """
        share = max(1, processors() // self.workers)
        allowed = os.environ.get("OMP_NUM_THREADS", "")
        return min(share, max(1, int(allowed))) if allowed.isdecimal() else share

    def ledger(self, study: Study) -> Ledger:
        """The book of a study there."""
        return Ledger(open_storage(self.out, self.storage), study, self.out / "workers")


@dataclass(frozen=True)
class Assignment:
    """What a worker is told: whose runs are done, where, and its own name."""

    study: Study
    place: Place
    name: str


def work(assignment: Assignment, troubles: SimpleQueue[str]) -> None:
    """Do runs until none is left, or until told to stop; the body of a worker process.

    The first SIGINT ends the run in progress after its step, and gives it back to be continued. The death of the
    parent ends the worker at once.

    Args:
        assignment: what is to be done.
        troubles: told what ended the worker, beside exit code :data:`SETBACK`, where no method is to blame: no space
            on the disk, no memory, damaged files, an error of the program.
    """
    os.setpgrp()  # Ctrl-C reaches the parent alone, who passes it on
    threading.Thread(target=_die_with_parent, daemon=True).start()
    prepare_process(assignment.place.threads)
    try:
        _work(assignment)
    except (_SetbackError, OutputError) as error:
        troubles.put(str(error))
        raise SystemExit(SETBACK) from None


def _work(assignment: Assignment) -> None:
    ledger = assignment.place.ledger(assignment.study)
    with interruptible() as stopped, exclusive(ledger.presence / assignment.name):
        while not stopped():
            entries = ledger.entries()
            if all(entry.state == "done" for entry in entries.values()):
                return
            ledger.recover(entries)
            entry = _claimed(ledger, entries, assignment.name)
            if entry is None:
                time.sleep(_POLL_SECONDS)
            elif not _do(ledger, entry, assignment, stopped):
                return


def _claimed(ledger: Ledger, entries: dict[Slot, Entry], owner: str) -> Entry | None:
    for entry in entries.values():
        if entry.state == "waiting" and ledger.ready(entry.slot, entries) and ledger.claim(entry, owner):
            return entry
    return None


def _do(ledger: Ledger, entry: Entry, assignment: Assignment, stopped: Callable[[], bool]) -> bool:
    """Do one claimed run and record it; whether the worker goes on."""
    point = ledger.point(entry.slot, ledger.entries())
    try:
        with _beating(ledger, entry.trial):
            if stopped():
                ended = None
            else:
                metric = ledger.metric(entry.slot.problem)
                ended = perform(assignment, entry.slot, point, metric, _pruner(ledger, entry, metric))
    except HeldError:  # by a worker that was thought gone
        time.sleep(_POLL_SECONDS)
        ledger.give_back(entry)
        return True
    except BaseException as error:
        if not isinstance(error, Exception) or not is_setback(error):
            ledger.give_back(entry)
            raise
        with suppress(OutputError):  # else the next command gives it back
            ledger.give_back(entry)
        if not isinstance(error, OsculateError):
            traceback.print_exception(error)
        raise _SetbackError(f"{entry.slot}: {in_words(error)}") from error
    if ended is None:
        ledger.give_back(entry)
        return False
    status, value = ended
    why, steps = ("", None) if value is not None else breakdown(run_folder(assignment.place.out, entry.slot))
    ledger.finish(entry, value, status, why, steps)
    return True


def perform(
    assignment: Assignment,
    slot: Slot,
    point: dict[str, object] | None,
    metric: str,
    enough: Callable[[Metrics], bool] = lambda metrics: False,
) -> tuple[str, float | None] | None:
    """Do one run in its folder, or what is left of it; nothing where it is done already.

    Args:
        assignment: whose study's run, and where.
        slot: the run.
        point: its searched settings; ``None``: its arm has only misses, and so is this run.
        metric: its value is the last one of.
        enough: asked after every evaluation whether the run ends there.

    Returns:
        How it ended and its value (``None`` for a miss); ``None`` if it was interrupted.

    Raises:
        OutputError: nothing can be written.
        HeldError: another process writes to its folder.
        Exception: no memory, another run in its folder, an error of the program: see ``is_setback``.
    """
    study, place = assignment.study, assignment.place
    problem = next(problem for problem in study.problems if problem.label == slot.problem)
    arm = next(arm for arm in study.arms if arm.label == slot.arm).at(slot.problem)
    seed, settings = told(study, slot, point)
    folder = run_folder(place.out, slot)
    if point is None:
        reason = "every tuning run of this arm was a miss"
        write_trial(folder, slot, seed, settings, None, reason)
        return reason, None
    config = arm.config(problem, point, seed, study.device)
    budget = study.problem_budget(problem) if slot.phase == FINAL else study.tuning_budget(problem)
    another = folder.config_file.exists() and _is_another(assignment, slot, config, budget)
    ended = None if another else recorded_value(folder, metric)
    reason = ""
    if ended is None:
        resume = Resume.NEVER if another or contradiction_in(folder, metric) else Resume.AUTO
        write_trial(folder, slot, seed, settings, None, NOT_FINISHED)
        extras = Extras(
            schedule=EveryEpoch(study.evaluations), tensorboard=place.tensorboard, whole=True, enough=enough
        )
        silent = Console(file=io.StringIO())
        try:
            try:
                result = run_in_folder(config, budget, folder, place.data_dir, resume, silent, extras)
            except DamagedError:
                result = run_in_folder(config, budget, folder, place.data_dir, Resume.NEVER, silent, extras)
        except Exception as error:  # whatever a method does wrong is its own miss, not the end of the study
            if is_setback(error):
                raise
            reason = in_words(error)
            ended = "broken down", None
        else:
            if result.status == "interrupted":
                return None
            reason, ended = result.reason, recorded_value(folder, metric) or (result.status, None)
    write_trial(folder, slot, seed, settings, ended[1], reason)
    return ended


def _is_another(assignment: Assignment, slot: Slot, config: RunConfig, budget: Budget) -> bool:
    """Whether a folder holds a run with other settings, such as those of another best point of the tuning.

    Where that cannot be told (the method is refused, a file is damaged), it is left to the run itself to say so.
    """
    problem = get_problem(config.problem, **config.problem_options)
    early = slot.phase == TUNE and assignment.study.tuning.pruner != "none"
    with suppress(OsculateError):
        material = problem, problem.load(assignment.place.data_dir)
        return bool(misfit(config, budget, run_folder(assignment.place.out, slot), material, early))
    return False


def _pruner(ledger: Ledger, entry: Entry, metric: str) -> Callable[[Metrics], bool]:
    """What the study's pruner says of a run after an evaluation."""

    def enough(metrics: Metrics) -> bool:
        value = metrics.as_dict().get(metric)
        return value is not None and ledger.ends_early(entry, metrics.iterations, float(value))

    return enough


@contextmanager
def _beating(ledger: Ledger, trial: int) -> Iterator[None]:
    """Leave signs of life while the block lasts."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            try:
                ledger.beat(trial)
            except Exception:  # a storage out of reach for a moment; the next sign of life may come through
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # as if killed: the next command finds the run's last checkpoint
