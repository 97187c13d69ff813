"""Which runs there are and who does them: the study's book, kept in an Optuna storage that many processes share.

Every run has a place in the book, a *slot*: a tuning point or a final seed of one arm on one problem. A slot is a row
of Optuna trials, of which the lowest-numbered one that has not failed, nor was reopened, counts. All steps are single
atomic operations of the storage, so that no lock is needed and a process may die between any two of them:

- a worker *claims* a slot by turning its trial from waiting to running, which the storage grants to one process only;
- a run that is given back, or whose worker is gone, gets a new waiting trial first, and its old one fails after that;
- trials that two processes enter at the same time for one slot do no harm: the lower number counts.

A run that broke down is complete, with the worst possible value: failing is reserved for attempts that were cut short.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from ...errors import ArgumentError
from ..runs.targets import writing
from .definition import METRICS, Arm, Study, StudyProblem
from .journal import open_journal
from .presence import is_alive
from .spaces import distributions

__all__ = ["FINAL", "TUNE", "Entry", "Ledger", "Slot", "open_storage"]

TUNE, FINAL = "tune", "final"
_MOST_CRASHES = 3
_VOID = "void "
"""Before the trial's number, the name of a mark of trials that are complete and count no more."""
_TRIALS_BEFORE_PRUNING = 4
_MOST_OPENINGS = 6
_REOPEN_SECONDS = 0.5
_MAY_PASS = ("IntegrityError", "OperationalError", "ProgrammingError")
"""Errors of a database whose tables another process is making at this moment."""


@dataclass(frozen=True, order=True)
class Slot:
    """One run: problem and arm by label, ``tune`` with the point's number or ``final`` with the seed."""

    problem: str
    arm: str
    phase: str
    index: int

    @property
    def folder(self) -> Path:
        """Where it lies below the study's ``runs``."""
        return Path(self.problem) / self.arm / f"{self.phase}-{self.index}"

    def __str__(self) -> str:
        return f"{self.problem} {self.arm} {self.phase}-{self.index}"


@dataclass(frozen=True)
class Entry:
    """How a slot stands.

    Args:
        slot: the run.
        trial: Optuna's id of the trial that counts.
        state: ``waiting``, ``running`` or ``done``.
        value: of a run that is done; ``None`` for a miss.
        owner: the worker that has it.
        beat: its last sign of life.
        started: when the owner began, in seconds of ``time.time``.
        crashes: attempts that ended with their process.
        status: how it ended, in words; empty before.
        why: the reason of a miss, where it is known.
        steps: optimizer steps that a miss had taken, where that is known.
    """

    slot: Slot
    trial: int
    state: str
    value: float | None = None
    owner: str = ""
    beat: float | None = None
    started: float | None = None
    crashes: int = 0
    status: str = ""
    why: str = ""
    steps: int | None = None


def open_storage(out: Path, url: str | None) -> BaseStorage:
    """Open the storage of a study: the database at ``url``, or the journal in its folder.

    Raises:
        ArgumentError: the database cannot be opened, or the journal is damaged.
        OutputError: the journal cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    if url is None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        return open_journal(out / "journal.log")
    for attempt in range(_MOST_OPENINGS):
        try:
            return optuna.storages.get_storage(url)
        except Exception as error:  # SQLAlchemy's, its drivers' and import errors have no common class
            if type(error).__name__ in _MAY_PASS and attempt + 1 < _MOST_OPENINGS:
                time.sleep(_REOPEN_SECONDS)
                continue
            raise ArgumentError(
                f"storage {url!r} cannot be opened ({type(error).__name__}: {error}); a URL reads sqlite:///file.db or "
                "postgresql://user@machine/name; leave --storage out for a file in the study's folder"
            ) from error
    raise AssertionError("unreachable")


@dataclass
class Ledger:
    """The book of one study.

    Args:
        storage: where it is kept.
        study: what it is about.
        presence: folder of the workers' files.
    """

    storage: BaseStorage
    study: Study
    presence: Path
    _ids: dict[tuple[str, str, str], int] = field(default_factory=dict, init=False)
    _cache: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict, init=False)

    def publish(self) -> None:
        """Enter every run that is not in the book yet; safe to call from several processes.

        Raises:
            ArgumentError: the book is about an arm or problem of the same name with another definition.
        """
        for problem in self.study.problems:
            for arm in self.study.arms:
                self._publish(problem, arm.at(problem.label))

    def entries(self) -> dict[Slot, Entry]:
        """How every run stands, in the order in which they are to be done: tuning first, the arms side by side."""
        found: dict[Slot, Entry] = {}
        for problem in self.study.problems:
            for arm in (entry.at(problem.label) for entry in self.study.arms):
                for phase in (TUNE, FINAL):
                    if phase == FINAL or self.study.trials(arm):
                        found.update((entry.slot, entry) for entry in self._phase(problem, arm, phase))
        order = {arm.label: number for number, arm in enumerate(self.study.arms)}
        position = {
            (problem.label, seed): number
            for problem in self.study.problems
            for number, seed in enumerate(self.study.final_seeds(problem))
        }

        def rank(slot: Slot) -> tuple[bool, int, int]:
            final = slot.phase == FINAL
            return final, position[slot.problem, slot.index] if final else slot.index, order[slot.arm]

        return {slot: found[slot] for slot in sorted(found, key=rank)}

    def done(self) -> set[Slot]:
        """Which runs the book has as done; enters nothing, so that it may be asked before ``publish``."""
        found: set[Slot] = set()
        for entry in self.storage.get_all_studies():
            name, *labels = entry.study_name.split("/")
            if name == self.study.name and len(labels) == 3:
                problem, arm, phase = labels
                found |= {
                    Slot(problem, arm, phase, int(trial.user_attrs["slot"]))
                    for trial in self._trials(entry._study_id)
                    if trial.state == TrialState.COMPLETE and "slot" in trial.user_attrs
                }
        return found

    def point(self, slot: Slot, entries: Mapping[Slot, Entry]) -> dict[str, Any] | None:
        """The searched settings of a run: its own point, or for a final run the best of its arm.

        Returns:
            ``{}`` for an arm without a space; ``None`` for a final run whose arm has only misses.
        """
        arm = next(arm for arm in self.study.arms if arm.label == slot.arm).at(slot.problem)
        if not arm.space:
            return {}
        trials = self._points(slot.problem, arm)
        if slot.phase == TUNE:
            return trials[slot.index]
        tried = [entries[Slot(slot.problem, slot.arm, TUNE, number)] for number in range(len(trials))]
        hits = [entry for entry in tried if entry.value is not None]
        if not hits:
            return None
        sign = -1 if METRICS[self.metric(slot.problem)] else 1
        best = min(hits, key=lambda entry: (sign * (entry.value or 0.0), entry.slot.index))
        return trials[best.slot.index]

    def ready(self, slot: Slot, entries: Mapping[Slot, Entry]) -> bool:
        """Whether a run may start: a final one waits for the whole tuning of its arm."""
        if slot.phase == TUNE:
            return True
        own = [entry for other, entry in entries.items() if (other.problem, other.arm) == (slot.problem, slot.arm)]
        return all(entry.state == "done" for entry in own if entry.slot.phase == TUNE)

    def metric(self, problem: str) -> str:
        """By which the arms are tuned on a problem."""
        return self.study.tuning_metric(problem)

    def claim(self, entry: Entry, owner: str) -> bool:
        """Take a waiting run; whether it was granted."""
        try:
            granted = self.storage.set_trial_state_values(entry.trial, TrialState.RUNNING)
        except (optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
            return False
        if granted:
            for name, value in (("owner", owner), ("started", time.time()), ("beat", time.time())):
                self.storage.set_trial_user_attr(entry.trial, name, value)
        return granted

    def beat(self, trial: int) -> None:
        """Leave a sign of life."""
        self.storage.set_trial_user_attr(trial, "beat", time.time())

    def ends_early(self, entry: Entry, step: int, value: float) -> bool:
        """Take the value of a tuning run at an evaluation; whether the study's pruner ends the run there.

        Args:
            entry: as claimed.
            step: of the optimizer.
            value: of the tuning metric.
        """
        slot = entry.slot
        if self.study.tuning.pruner == "none" or slot.phase != TUNE:
            return False
        self.storage.set_trial_intermediate_value(entry.trial, step, value)
        name = self._name(slot.problem, slot.arm, slot.phase)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_TRIALS_BEFORE_PRUNING)
        study = optuna.load_study(study_name=name, storage=self.storage)
        return pruner.prune(study, self.storage.get_trial(entry.trial))

    def give_back(self, entry: Entry, crashed: bool = False) -> None:
        """Let somebody else do (or continue) a run; after too many crashes it counts as a miss instead."""
        crashes = entry.crashes + crashed
        if crashes >= _MOST_CRASHES:
            self.finish(entry, None, f"its process died {crashes} times")
            return
        trial = self.storage.get_trial(entry.trial)
        study = self._ids[entry.slot.problem, entry.slot.arm, entry.slot.phase]
        self._enter(study, entry.slot.index, trial.params, trial.distributions, crashes)
        self._end(entry.trial, TrialState.FAIL)

    def reopen(self, entry: Entry) -> None:
        """Enter a run anew that is done, but whose files are damaged; what the book says of it counts no more."""
        trial = self.storage.get_trial(entry.trial)
        study = self._ids[entry.slot.problem, entry.slot.arm, entry.slot.phase]
        self._enter(study, entry.slot.index, trial.params, trial.distributions, 0)
        self.storage.set_study_user_attr(study, f"{_VOID}{entry.trial}", True)

    def finish(self, entry: Entry, value: float | None, status: str, why: str = "", steps: int | None = None) -> bool:
        """Record the result of a run.

        Args:
            entry: as claimed.
            value: of the tuning metric; ``None`` for a miss.
            status: how it ended, in words.
            why: the reason of a miss.
            steps: optimizer steps that it had taken.

        Returns:
            Whether the run was still this worker's.
        """
        if value is None:
            value = -math.inf if METRICS[self.metric(entry.slot.problem)] else math.inf
        try:
            for name, told in (("why", why), ("steps", steps), ("status", status)):
                if told not in ("", None):
                    self.storage.set_trial_user_attr(entry.trial, name, told)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return self._end(entry.trial, TrialState.COMPLETE, value)

    def recover(self, entries: Mapping[Slot, Entry], blamed: bool = True) -> list[Slot]:
        """Give back the runs whose workers are gone.

        Args:
            entries: how the runs stand.
            blamed: whether that counts as a crash of the run; not where the whole study may have been killed.

        Returns:
            Those runs.
        """
        gone = [
            entry
            for entry in entries.values()
            if entry.state == "running" and not is_alive(self.presence, entry.owner or "-", entry.beat)
        ]
        for entry in gone:
            self.give_back(entry, crashed=blamed and bool(entry.owner))
        return [entry.slot for entry in gone]

    def _name(self, problem: str, arm: str, phase: str) -> str:
        return f"{self.study.name}/{problem}/{arm}/{phase}"

    def _end(self, trial: int, state: TrialState, value: float | None = None) -> bool:
        try:
            self.storage.set_trial_state_values(trial, state, None if value is None else [value])
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def _points(self, problem: str, arm: Arm) -> list[dict[str, Any]]:
        if (problem, arm.label) not in self._cache:
            self._cache[problem, arm.label] = self.study.points(arm)
        return self._cache[problem, arm.label]

    def _publish(self, problem: StudyProblem, arm: Arm) -> None:
        phases: dict[str, dict[int, dict[str, Any]]] = {FINAL: {seed: {} for seed in self.study.final_seeds(problem)}}
        if self.study.trials(arm):
            phases[TUNE] = dict(enumerate(self._points(problem.label, arm)))
        for phase, wanted in phases.items():
            study = self._open(problem, arm, phase)
            present = {trial.user_attrs.get("slot") for trial in self._trials(study)}
            ranges = distributions(arm.space) if phase == TUNE else {}
            for index, point in wanted.items():
                if index not in present:
                    self._enter(study, index, point, ranges, 0)

    def _open(self, problem: StudyProblem, arm: Arm, phase: str) -> int:
        name = self._name(problem.label, arm.label, phase)
        more = METRICS[self.metric(problem.label)]
        direction = optuna.study.StudyDirection.MAXIMIZE if more else optuna.study.StudyDirection.MINIMIZE
        try:
            number = self.storage.create_new_study([direction], name)
        except optuna.exceptions.DuplicatedStudyError:
            number = self.storage.get_study_id_from_name(name)
        definition = json.dumps(self.study.definition(problem, arm), sort_keys=True)
        saved = self.storage.get_study_user_attrs(number).get("definition", definition)
        if saved != definition:
            raise ArgumentError(
                f"arm {arm.label!r} on {problem.label!r} is in the book of study {self.study.name!r} with another "
                f"definition:\n  there: {saved}\n  asked for: {definition}\ntake another folder with --out, and "
                "another database where --storage names one"
            )
        self.storage.set_study_user_attr(number, "definition", definition)
        self._ids[problem.label, arm.label, phase] = number
        return number

    def _enter(self, study: int, slot: int, params: Mapping[str, Any], ranges: Mapping[str, Any], crashes: int) -> None:
        attributes = {"slot": slot, "crashes": crashes}
        trial = create_trial(
            state=TrialState.WAITING, params=dict(params), distributions=dict(ranges), user_attrs=attributes
        )
        self.storage.create_new_trial(study, trial)

    def _trials(self, study: int) -> list[FrozenTrial]:
        trials = self.storage.get_all_trials(study, deepcopy=False)
        void = {name for name in self.storage.get_study_user_attrs(study) if name.startswith(_VOID)}
        valid = (t for t in trials if t.state != TrialState.FAIL and f"{_VOID}{t._trial_id}" not in void)
        return sorted(valid, key=lambda trial: trial.number)

    def _phase(self, problem: StudyProblem, arm: Arm, phase: str) -> Iterator[Entry]:
        key = (problem.label, arm.label, phase)
        if key not in self._ids:
            self._open(problem, arm, phase)
        known = range(self.study.trials(arm)) if phase == TUNE else self.study.final_seeds(problem)
        seen: set[int] = set()
        for trial in self._trials(self._ids[key]):
            index = int(trial.user_attrs["slot"])
            if index in known and index not in seen:
                seen.add(index)
                yield _entry(Slot(*key, index), trial)


def _entry(slot: Slot, trial: FrozenTrial) -> Entry:
    names = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running"}
    value = trial.value if trial.state == TrialState.COMPLETE else None
    own = trial.user_attrs
    return Entry(
        slot,
        trial._trial_id,
        names.get(trial.state, "done"),
        value if value is not None and math.isfinite(value) else None,
        own.get("owner", ""),
        own.get("beat") or (trial.datetime_start.timestamp() if trial.datetime_start else None),
        own.get("started"),
        own.get("crashes", 0),
        own.get("status", ""),
        own.get("why", ""),
        own.get("steps"),
    )
