"""What a study will cost, before anybody commits to it: the first steps of every arm on every problem, timed.

Times are taken twice, by the clock on the wall and by the processor's time of the thread that computes. On a machine
with nothing else to do they agree; on a busy one the wall's are longer, and their ratio says by how much. So the answer
is a range: what the study takes if nothing else runs, and if the machine stays as busy as it is.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...errors import OsculateError
from ...framework.optimizer.second_order import SecondOrder
from ...framework.whole_model.optimizer import WholeModel
from ...preconditioners.protocol import Schedule
from ..problems import Data, Problem, get_problem
from ..report.tables import screen_table
from ..runs.batches import data_checksum
from ..runs.config import Budget
from ..runs.environment import prepare_process
from ..runs.evaluation import Metrics
from ..runs.on_screen import say
from ..runs.records import RunFolder
from ..runs.training import prepare
from ..runs.training_run import TrainingRun
from .definition import Arm, Study, StudyProblem
from .display import duration
from .ledger import FINAL, TUNE
from .worker import processors

__all__ = ["Cost", "estimate", "show_estimate", "study_seconds"]

_FEWEST_STEPS = 6
_FEWEST_SECONDS = 0.3
_MOST_SECONDS = 10.0
"""Steps of an arm are timed until there are enough of every kind, or until this has passed."""

_MOST_POINTS = 3
"""Points of a space that are tried, where one after the other breaks down."""

_CHANCE = 1.1
"""How far the two clocks, or two estimates, are apart by chance."""

_PROCESSORS = Path("/proc/stat")
_LONGEST_PERIOD = 10_000
_LONGEST_START = 10.0
_WIND_UP = 1.0
"""Seconds in which the parent waits for its workers, and they for it."""


@dataclass(frozen=True)
class Cost:
    """What one arm's runs on one problem take, in seconds of a process that has the processor for itself.

    Args:
        warm_start: the method's initial pass over the data; 0 without one.
        step: one optimizer step, the mean once the first, dearer ones are over; NaN if the method broke down in them.
        evaluation: losses on all samples and the checkpoint, the share in one epoch where a problem is evaluated less
            often.
        batches: steps in an epoch.
        setup: data, network and optimizer, before the first step.
        first: what the first steps take beyond ``step`` each, all together (K-FAC inverts at every one of them).
        eager: how many they are.
        busy: seconds on the wall per second of the processor while this was timed, >= 1 but for chance.
        broke: steps taken before it broke down; ``None``: it did not.
        spent: seconds until then, beside ``setup`` and ``warm_start``.
        reason: why it broke down.
        lost: points of its space that broke down before this one.
    """

    warm_start: float
    step: float
    evaluation: float
    batches: int
    setup: float = 0.0
    first: float = 0.0
    eager: int = 0
    busy: float = 1.0
    broke: int | None = None
    spent: float = 0.0
    reason: str = ""
    lost: int = 0

    def run(self, budget: Budget, evaluations: int = 1, slow: float = 1.0) -> float:
        """Seconds of a run with everything; where the arm broke down, those until then.

        Args:
            budget: its epochs and seconds of training.
            evaluations: in an epoch, beside the first one.
            slow: how many times as long everything takes.
        """
        if self.broke is not None:
            return slow * (self.setup + self.evaluation + self.warm_start + self.spent)
        epoch, dearer = slow * self.batches * self.step, slow * self.first
        steps = math.inf if budget.epochs is None else budget.epochs * self.batches
        begun = slow * self.warm_start + (dearer if steps > self.eager else dearer * steps / max(1, self.eager))
        training = begun + epoch * (math.inf if budget.epochs is None else budget.epochs)
        if budget.seconds is not None:
            training = min(training, budget.seconds)
        passed = max(0.0, training - begun) / epoch
        return training + slow * (self.setup + self.evaluation * (1 + evaluations * passed))


def estimate(study: Study, data_dir: Path | None, threads: int) -> Iterator[tuple[StudyProblem, Arm, Cost]]:
    """Time the first steps of every arm on every problem.

    Where an arm is tuned and its first point breaks down, the next ones are tried.

    Args:
        study: checked.
        data_dir: where the data sets lie, or ``None``.
        threads: of one operation, as the workers will have.
    """
    prepare_process(threads)
    for entry in study.problems:
        problem = get_problem(entry.name, **entry.options)
        problem.load(data_dir)  # downloads and caches, once
        timer = _Timer(study.device)
        with timer:
            data = problem.load(data_dir)
            data_checksum(data)
        loading = timer.own
        for arm in (arm.at(entry.label) for arm in study.arms):
            points = study.points(arm)[:_MOST_POINTS] or [{}]
            for lost, point in enumerate(points):
                cost = _cost(arm.config(entry, point, study.seeds[0], study.device), study, problem, data)
                if cost.broke is None or lost + 1 == len(points):
                    break
            yield entry, arm, dataclasses.replace(cost, setup=cost.setup + loading, lost=lost)


@dataclass
class _Timer:
    """Seconds on the wall, and of the processor; on a device that computes by itself both are the wall's."""

    device: str
    wall: float = 0.0
    own: float = 0.0
    all_wall: float = 0.0
    all_own: float = 0.0
    _began: tuple[float, float] = field(default=(0.0, 0.0), init=False)

    def _now(self) -> tuple[float, float]:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
            return time.perf_counter(), time.perf_counter()
        return time.perf_counter(), time.thread_time()

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *error: object) -> None:
        wall, own = self._now()
        self.wall, self.own = wall - self._began[0], own - self._began[1]
        self.all_wall += self.wall
        self.all_own += self.own


def _cost(config: Any, study: Study, problem: Problem, data: Data) -> Cost:
    timer = _Timer(study.device)
    with timer:
        run = prepare(config, problem, data)
    setup, batches = timer.own, run.order.batches_per_epoch
    schedules = _schedules(run)
    times: dict[tuple[bool, ...], list[float]] = {}
    spent, broke, reason = 0.0, None, ""
    wanted = {_kind(schedules, step) for step in range(1, 1 + sum(_course(schedules)))}
    try:
        run.warm_start(lambda: run.warm_start_batches >= _FEWEST_STEPS)
        while not _enough(run, times, wanted, spent):
            with timer:
                run.step()
                run.clock.pause()
            spent += timer.own
            if run.iterations > 1:  # the first one makes what all others find
                times.setdefault(_kind(schedules, run.iterations - 1), []).append(timer.own)
    except Exception as error:  # as in a run of a study, where it is the method's own miss
        broke, reason = run.iterations, str(error) if isinstance(error, OsculateError) else repr(error)
    with timer, tempfile.TemporaryDirectory() as folder:
        metrics = run.evaluate()
        RunFolder(Path(folder)).save_checkpoint(run.state_dict())
    if broke is None and not metrics.finite:
        broke, reason = run.iterations, _not_finite(metrics)
    if not isinstance(run.optimizer, WholeModel):  # which places nothing on the model
        run.optimizer.close()
    busy = max(1.0, timer.all_wall / max(timer.all_own, 1e-9))
    step, first, eager = math.nan, 0.0, 0
    if broke is None:
        means = {kind: sum(values) / len(values) for kind, values in times.items()}
        step, first, eager = _mean_step(schedules, means)
    evaluation = timer.own / problem.interval
    warm_start = run.warm_start_seconds * batches / max(1, run.warm_start_batches)
    return Cost(warm_start / busy, step, evaluation, batches, setup, first, eager, busy, broke, spent, reason)


def _not_finite(metrics: Metrics) -> str:
    return f"the training loss is {metrics.train_loss}, the test loss {metrics.test_loss}"


def _enough(run: TrainingRun, times: Mapping[Any, list[float]], wanted: set[tuple[bool, ...]], spent: float) -> bool:
    """Whether steps of every kind have been timed, and not for too short a time."""
    timed = sum(map(len, times.values()))
    if timed < _FEWEST_STEPS - 1:
        return False
    return spent > _MOST_SECONDS or (spent > _FEWEST_SECONDS and wanted <= times.keys())


def _schedules(run: TrainingRun) -> list[Schedule]:
    """When the parts of a method renew what they keep; none where a method does the same at every step."""
    found: list[Schedule] = []

    def look(value: Any) -> None:
        if isinstance(value, Schedule):
            found.append(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for entry in dataclasses.fields(value):
                look(getattr(value, entry.name))
        elif isinstance(value, Mapping):
            for inner in value.values():
                look(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner)

    if isinstance(run.optimizer, SecondOrder):
        look(run.optimizer.method)
    return list(dict.fromkeys(found))


def _kind(schedules: list[Schedule], step: int) -> tuple[bool, ...]:
    return tuple(due for entry in schedules for due in (entry.statistics_due(step, True), entry.inverses_due(step)))


def _course(schedules: list[Schedule]) -> tuple[int, int]:
    """How many steps at the beginning are dearer, and after how many the rest repeats itself."""
    eager = max((1 + max(entry.eager, entry.first) for entry in schedules), default=1)
    period = math.lcm(*(number for entry in schedules for number in (entry.statistics, entry.inverses or 1)))
    return eager, min(period, _LONGEST_PERIOD)


def _mean_step(schedules: list[Schedule], means: Mapping[tuple[bool, ...], float]) -> tuple[float, float, int]:
    """Mean step once the dearer ones are over, what those take beyond it together, and how many they are."""
    eager, period = _course(schedules)
    dearest = max(means.values())  # for a kind that was not seen in time
    kinds = Counter(_kind(schedules, step) for step in range(eager, eager + period))
    step = sum(count * means.get(kind, dearest) for kind, count in kinds.items()) / period
    return step, sum(means.get(_kind(schedules, number), dearest) - step for number in range(eager)), eager


def study_seconds(study: Study, costs: Mapping[tuple[str, str], Cost], workers: int, slow: float, lost: str) -> float:
    """Return how long all runs take, every worker taking the next one that may start.

    Args:
        study: checked.
        costs: by the labels of problem and arm.
        workers: processes, >= 1.
        slow: how many times as long everything takes.
        lost: of a tuned arm of which a point broke down, whether ``most`` of the others do, a ``share`` as large as
            among the points that were tried, or ``few``.
    """
    waiting: list[tuple[tuple[str, str], str, int, float]] = []
    for problem in study.problems:
        for arm in (arm.at(problem.label) for arm in study.arms):
            key = (problem.label, arm.label)
            cost, trials = costs[key], study.trials(arm)
            whole = cost.run(study.tuning_budget(problem), study.evaluations, slow)
            broken = dataclasses.replace(cost, broke=0).run(study.tuning_budget(problem), slow=slow)
            falls = {"most": trials - 1, "few": cost.lost, "share": round(trials * cost.lost / (cost.lost + 1))}[lost]
            falls = min(falls, trials) if cost.lost and cost.broke is None else 0
            waiting += [(key, TUNE, index, broken if index < falls else whole) for index in range(trials)]
            final = cost.run(study.problem_budget(problem), study.evaluations, slow)
            if trials and cost.broke is not None:
                final = 0.0  # no setting is left to run
            finals = range(len(study.final_seeds(problem)))
            waiting += [(key, FINAL, index, _limited(study, final)) for index in finals]
    waiting.sort(key=lambda job: (job[1] == FINAL, job[2]))
    return _makespan(waiting, workers)


def _limited(study: Study, seconds: float) -> float:
    return seconds if study.limit is None else min(seconds, study.limit)


def _makespan(waiting: list[tuple[tuple[str, str], str, int, float]], workers: int) -> float:
    """When the last worker is through, a final run not being begun before the tuning of its arm is over."""
    free = [0.0] * workers
    tuned: dict[tuple[str, str], float] = {}
    for key, phase, _, seconds in waiting:
        begins = heapq.heappop(free)
        begins = max(begins, tuned.get(key, 0.0)) if phase == FINAL else begins
        heapq.heappush(free, begins + seconds)
        if phase == TUNE:
            tuned[key] = max(tuned.get(key, 0.0), begins + seconds)
    return max(free)


@dataclass(frozen=True)
class _Clock:
    """Seconds that the processors have worked and idled since the machine started; zeros where nothing tells.

    Args:
        worked: by all processors that this process may use.
        passed: worked or not.
        own: of this process.
    """

    worked: float
    passed: float
    own: float

    @staticmethod
    def now() -> _Clock:
        """Read them from where Linux has them."""
        worked = passed = 0.0
        with suppress(OSError, ValueError, AttributeError):
            tick = os.sysconf("SC_CLK_TCK")
            mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            for line in _PROCESSORS.read_text(encoding="ascii").splitlines():
                name, *counts = line.split()
                if name in mine:  # user, nice, system, idle, waiting for a disk, ...
                    ticks = [int(count) for count in counts[:8]]
                    passed += sum(ticks) / tick
                    worked += (sum(ticks) - ticks[3] - ticks[4]) / tick
        return _Clock(worked, passed, time.process_time())


def _others(before: _Clock, after: _Clock, busy: float) -> float:
    """How many processors' worth of work others want: what was seen of it, or what they took from this process."""
    count = processors()
    passed, worked, own = after.passed - before.passed, after.worked - before.worked, after.own - before.own
    seen = count * max(0.0, worked - own) / passed if passed > 0 else 0.0
    return max(seen, count * busy - 1.0 if busy > _CHANCE else 0.0)


def _slow_downs(busy: float, others: float, workers: int, threads: int) -> tuple[float, float]:
    """How many times as long a run takes with all workers if nothing else runs, and if the rest stays as it is."""
    alone = max(1.0, workers * threads / processors())
    return alone, max(alone, busy, (workers * threads + others) / processors())


def show_estimate(study: Study, data_dir: Path | None, workers: int, threads: int, console: Console) -> None:
    """Print the costs, and how long the whole study takes with so many workers, from least to most."""
    before, costs = _Clock.now(), dict[tuple[str, str], Cost]()
    with console.status("timing the first steps of every arm"):
        for problem, arm, cost in estimate(study, data_dir, threads):
            costs[problem.label, arm.label] = cost
    begun = 2 * min(before.own, _LONGEST_START) + _WIND_UP  # the parent's imports, and the workers' at the same time
    busy = sum(cost.busy for cost in costs.values()) / max(1, len(costs))
    alone, crowded = _slow_downs(busy, _others(before, _Clock.now(), busy), workers, threads)
    usual = math.sqrt(alone * crowded)
    rows = [_row(study, problem, arm, costs, usual) for problem in study.problems for arm in study.arms]
    columns = ("problem", "arm", "ms/step", "one run", "runs", "together")
    title = "cost, from the first steps of every arm"
    console.print(screen_table(title, rows, {name: name for name in columns}, digits=3))
    for (where, label), cost in costs.items():
        if cost.broke is not None:
            say(console, f"{label} on {where} breaks down after {cost.broke} step(s): {cost.reason}")
    cases = ((alone, "most"), (usual, "share"), (crowded, "few"))
    least, middle, most = (slow * begun + study_seconds(study, costs, workers, slow, lost) for slow, lost in cases)
    said = f"about {duration(middle)} with {workers} worker(s), evaluation counted"
    say(console, f"{said}: {duration(least)} if nothing else runs here")
    if most > _CHANCE * least:
        say(console, f"and {duration(most)} if the machine stays as busy as it is now")
    tuned = ", is pruned" if study.tuning.pruner != "none" else ""
    say(console, f"assumed: every run takes its whole budget; one that breaks down later{tuned} ends earlier")


def _row(
    study: Study, problem: StudyProblem, arm: Arm, costs: Mapping[tuple[str, str], Cost], slow: float
) -> dict[str, Any]:
    cost, own = costs[problem.label, arm.label], arm.at(problem.label)
    trials, seeds = study.trials(own), len(study.final_seeds(problem))
    row = {"problem": problem.label, "arm": arm.label, "one run": "breaks down", "runs": trials + seeds}
    if cost.broke is not None:
        return row
    final = cost.run(study.problem_budget(problem), study.evaluations, slow)
    tuning = cost.run(study.tuning_budget(problem), study.evaluations, slow)
    together = seeds * final + trials * tuning
    return row | {"ms/step": 1000 * slow * cost.step, "one run": duration(final), "together": duration(together)}
