"""What a study compares: arms, problems, seeds, budget and how arms are tuned.

House protocol (the field's bar): search spaces declared before the first run; equal trials for every arm; tuning on a
validation metric where the problem has one; the best setting of each arm run again on fresh seeds, which all arms
share; no pruning, unless a study asks for it. A run that breaks down is a miss: it counts as infinitely bad and stays
in every table.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ArgumentError, UnknownNameError, require_positive_integer
from ...framework.methods.expressions import is_part_text
from ..rivals.catalogue import runnable
from ..runs.config import Budget, RunConfig, WarmStart
from .spaces import SAMPLERS, Range, grid_size, points

__all__ = ["METRICS", "PRUNERS", "Arm", "Study", "StudyProblem", "Target", "Tuning"]

METRICS = {
    "train_loss": False,
    "valid_loss": False,
    "valid_accuracy": True,
    "test_loss": False,
    "test_accuracy": True,
    "relative_l2": False,
}
"""Metrics that a run records, and whether more is better."""

PRUNERS = ("none", "median")
"""Whether tuning runs may end early."""

_LABEL = re.compile(r"[\w.,=+()-]+")
_NUMBERS = ("lr", "damping", "weight_decay")


def _require_label(kind: str, label: str) -> None:
    if not isinstance(label, str):
        raise ArgumentError(f"the name of a {kind} must be text, got {label!r}")
    if not _LABEL.fullmatch(label) or label.startswith("."):
        raise ArgumentError(
            f"{kind} {label!r} names a folder: use letters, digits and any of . , = + ( ) - _, not a dot first"
        )


def _require_seed(rule: str, seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"{rule} >= 0, got {seed!r}")


def _require_seeds(seeds: tuple[int, ...]) -> None:
    _require_unique("seeds", list(seeds))
    for seed in seeds:
        _require_seed("seeds must be integers", seed)


@dataclass(frozen=True)
class Target:
    """What counts as reached: ``metric`` at most ``value`` (at least, for an accuracy)."""

    metric: str
    value: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UnknownNameError("metric", self.metric, METRICS)
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ArgumentError(f"a target's value must be a finite number, got {self.value!r}")


@dataclass(frozen=True)
class StudyProblem:
    """A problem of a study.

    Args:
        name: of a registered problem.
        label: its folder's name, unique in the study.
        options: keywords of the problem.
        batch_size: samples in a mini-batch, >= 1; ``None``: the problem's own.
        epochs: passes over the data on this problem, >= 1; ``None``: those of the study.
        target: what is to be reached, or ``None``.
        seeds: of the final runs on this problem, each once; ``None``: those of the study.
        source: file and line where it is written, for messages.
    """

    name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    epochs: int | None = None
    target: Target | None = None
    seeds: tuple[int, ...] | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _require_label("problem", self.label)
        if self.epochs is not None:
            require_positive_integer(f"epochs of problem {self.label!r}", self.epochs)
        if self.seeds is not None:
            _require_seeds(self.seeds)


@dataclass(frozen=True)
class Arm:
    """One of the competitors: a method, its settings, and what may be tuned.

    Args:
        label: its name in tables, and its folder's.
        method: registered method.
        settings: ``lr``, ``lr_schedule``, ``lr_warm_up``, ``damping``, ``weight_decay``, ``batch_size``,
            ``warm_start``; options of the method; parts by place (a value with a capital letter first is a part, see
            :mod:`osculate.framework.methods.expressions`).
        space: ranges of settings that are tuned; none: the arm goes straight to the final seeds.
        varied: in an ablation, which part was changed against the base and to what.
        source: file and line where it is written, for messages.
        on: the arm as it is on some problems, by their labels: same label and method, other settings or space.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Range] = field(default_factory=dict)
    varied: tuple[str, str] | None = None
    source: str = field(default="", compare=False)
    on: Mapping[str, Arm] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_label("arm", self.label)
        both = sorted(self.settings.keys() & self.space.keys())
        if both:
            raise ArgumentError(f"arm {self.label!r}: {', '.join(both)} both set and searched; do one of them")

    def at(self, problem: str) -> Arm:
        """Return the arm as it is on the problem of that label."""
        return self.on.get(problem, self)

    def config(self, problem: StudyProblem, point: Mapping[str, Any], seed: int, device: str = "cpu") -> RunConfig:
        """Return the configuration of one run, of an arm as it is on that problem (see ``at``).

        Args:
            problem: on which it runs.
            point: values of the searched settings.
            seed: of the run.
            device: where it computes.

        Raises:
            UnknownNameError: the method is unknown.
            ArgumentError: a value is of the wrong kind.
        """
        entries = runnable()
        if self.method not in entries:
            raise UnknownNameError("method", self.method, entries)
        options = entries[self.method].options
        fields: dict[str, Any] = {"batch_size": problem.batch_size}
        chosen: dict[str, Any] = {}
        parts: dict[str, Any] = {}
        for name, value in {**self.settings, **point}.items():
            if is_part_text(value):
                parts[name] = value
            elif name in _NUMBERS or name in ("batch_size", "lr_schedule", "lr_warm_up"):
                fields[name] = value
            elif name == "warm_start":
                fields[name] = _warm_start(value)
            else:
                (chosen if name in options else parts)[name] = value
        fields |= {"method_options": chosen, "parts": parts, "problem_options": problem.options}
        return RunConfig(problem=problem.name, method=self.method, seed=seed, device=device, **fields)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        varied = None if self.varied is None else {"part": self.varied[0], "value": self.varied[1]}
        space = {name: entry.as_dict() for name, entry in self.space.items()}
        return {"method": self.method, "settings": dict(self.settings), "space": space, "varied": varied}


def _warm_start(value: Any) -> WarmStart:
    try:
        return WarmStart(value)
    except ValueError:
        raise UnknownNameError("warm_start", str(value), [entry.value for entry in WarmStart]) from None


@dataclass(frozen=True)
class Tuning:
    """How arms are tuned.

    Args:
        trials: settings tried for every arm with a space, >= 1; a grid with fewer points is tried whole.
        metric: by which the best is chosen: one of ``METRICS``, or ``auto``: validation loss where the problem has a
            validation split, else training loss.
        sampler: ``quasi-random`` or ``random``; grids take neither.
        seed: of the tuning runs (initial parameters, order of the data) and of the points, >= 0.
        epochs: passes over the data of a tuning run, >= 1, and never more than those of a final run; ``None``: as many.
        seconds: training time of a tuning run, > 0, likewise.
        pruner: ``none``, or ``median``: a tuning run ends at an evaluation where even its best value so far is worse
            than the median of its arm's finished trials there, once 4 have finished; it counts with the value it had.
            Saves time, and makes what is tried depend on which runs ended first: the reason why it is off.
    """

    trials: int = 8
    metric: str = "auto"
    sampler: str = "quasi-random"
    seed: int = 0
    epochs: int | None = None
    seconds: float | None = None
    pruner: str = "none"

    def __post_init__(self) -> None:
        require_positive_integer("trials", self.trials)
        if self.epochs is not None:
            require_positive_integer("epochs of the tuning", self.epochs)
        if self.seconds is not None:
            try:
                Budget(seconds=self.seconds)
            except ArgumentError as error:
                raise ArgumentError(f"of the tuning runs: {error}") from error
        if self.metric != "auto" and self.metric not in METRICS:
            raise UnknownNameError("metric", self.metric, ["auto", *METRICS])
        if self.pruner not in PRUNERS:
            raise UnknownNameError("pruner", self.pruner, PRUNERS)
        if self.sampler not in SAMPLERS:
            raise UnknownNameError("sampler", self.sampler, SAMPLERS)
        _require_seed("seed of the tuning must be an integer", self.seed)


@dataclass(frozen=True)
class Study:
    """Everything that decides the runs of a study.

    Args:
        name: of its folder.
        arms: what is compared; labels are unique.
        problems: on what; labels are unique.
        seeds: of the final runs, each once and none the tuning seed.
        budget: of every final run, and of tuning runs that have no smaller one.
        tuning: how arms are tuned.
        title: one line for people.
        base: label of the arm against which others are varied, or ``None``.
        notes: caveats, such as how it was scaled down.
        limit: wall-clock seconds of a run with everything, > 0, after which its process is killed and the run a miss;
            ``None``: no limit beside the budget, which is looked at after every step.
        evaluations: evaluations in an epoch, >= 1.
        tuned_by: metric of the tuning by problem, where ``auto`` chose it; filled in by ``checking.checked``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ArgumentError: labels or seeds come twice, or something is missing.
    """

    name: str
    arms: tuple[Arm, ...]
    problems: tuple[StudyProblem, ...]
    seeds: tuple[int, ...]
    budget: Budget
    tuning: Tuning = field(default_factory=Tuning)
    title: str = ""
    base: str | None = None
    notes: tuple[str, ...] = ()
    limit: float | None = None
    evaluations: int = 1
    tuned_by: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        _require_label("study", self.name)
        if not isinstance(self.title, str):
            raise ArgumentError(f"the title must be text, got {self.title!r}")
        if self.budget.epochs is not None:
            require_positive_integer("epochs of the budget", self.budget.epochs)
        _require_unique("arms", [arm.label for arm in self.arms])
        _require_unique("problems", [problem.label for problem in self.problems])
        _require_seeds(self.seeds)
        require_positive_integer("evaluations in an epoch", self.evaluations)
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ArgumentError(f"limit must be positive and finite, got {self.limit!r}")
        taken = any(self.tuning.seed in self.final_seeds(problem) for problem in self.problems)
        if taken and any(arm.at(problem.label).space for arm in self.arms for problem in self.problems):
            raise ArgumentError(
                f"seed {self.tuning.seed} is the tuning seed; final runs need fresh ones: change seeds, or seed in "
                "[tuning], which is 0 unless given"
            )

    def final_seeds(self, problem: StudyProblem) -> tuple[int, ...]:
        """Return the seeds of the final runs on a problem."""
        return self.seeds if problem.seeds is None else problem.seeds

    def trials(self, arm: Arm) -> int:
        """Return how many settings are tried of an arm as it is on some problem (see ``Arm.at``)."""
        return min(self.tuning.trials, grid_size(arm.space) or self.tuning.trials) if arm.space else 0

    def points(self, arm: Arm) -> list[dict[str, Any]]:
        """Return the settings of an arm that are tried, in order; see :func:`spaces.points`."""
        return points(arm.space, self.trials(arm), self.tuning.sampler, self.tuning.seed)

    def problem_budget(self, problem: StudyProblem) -> Budget:
        """Return the budget of a final run on a problem."""
        return self.budget if problem.epochs is None else dataclasses.replace(self.budget, epochs=problem.epochs)

    def tuning_budget(self, problem: StudyProblem) -> Budget:
        """Return the budget of a tuning run on a problem: that of a final run, unless the tuning has a smaller one."""
        whole = self.problem_budget(problem)
        return Budget(_least(self.tuning.epochs, whole.epochs), _least(self.tuning.seconds, whole.seconds))

    def tuning_metric(self, problem: str) -> str:
        """Return by which metric the arms are tuned on the problem of that label."""
        metric = self.tuning.metric
        return self.tuned_by.get(problem, "train_loss") if metric == "auto" else metric

    def definition(self, problem: StudyProblem, arm: Arm) -> dict[str, Any]:
        """Return as plain values all that decides the runs of an arm on a problem, but how many there are."""
        budget, tuning = self.problem_budget(problem), self.tuning_budget(problem)
        shorter: list[Any] = [] if tuning == budget else [tuning.epochs, tuning.seconds]
        shorter += [] if self.tuning.pruner == "none" else [self.tuning.pruner]
        own = arm.at(problem.label).as_dict()
        del own["varied"]
        return {
            **own,
            "problem": [problem.name, dict(problem.options), problem.batch_size],
            "budget": [budget.epochs, budget.seconds, self.evaluations],
            "tuning": [self.tuning.metric, self.tuning.sampler, self.tuning.seed, *shorter],
            "device": self.device,
        }

    @property
    def runs(self) -> int:
        """Number of runs, tuning and final."""
        finals = len(self.arms) * sum(len(self.final_seeds(problem)) for problem in self.problems)
        return finals + sum(self._tuning_runs(problem) for problem in self.problems)

    @property
    def seconds(self) -> float | None:
        """Bound on the training time of all runs together; ``None`` without one."""
        if self.budget.seconds is None:
            return None
        tuning = sum(self._tuning_runs(entry) * (self.tuning_budget(entry).seconds or 0.0) for entry in self.problems)
        finals = len(self.arms) * sum(len(self.final_seeds(problem)) for problem in self.problems)
        return tuning + finals * self.budget.seconds

    def _tuning_runs(self, problem: StudyProblem) -> int:
        return sum(self.trials(arm.at(problem.label)) for arm in self.arms)


def _least(first: float | None, second: Any) -> Any:
    return min((value for value in (first, second) if value is not None), default=None)


def _require_unique(kind: str, labels: list[Any]) -> None:
    if not labels:
        raise ArgumentError(f"a study needs {kind}; it names none")
    folders = [str(label).casefold() for label in labels]  # some disks do not tell A from a
    twice = sorted({label for label, folder in zip(labels, folders, strict=True) if folders.count(folder) > 1})
    if twice:
        by_case = len({str(label).casefold() for label in twice}) < len(twice)
        alike = " (capital or small letters alone are no difference)" if by_case else ""
        raise ArgumentError(f"{kind} must differ, but {', '.join(map(repr, twice))} comes twice{alike}")
