"""What a study will cost, before anybody commits to it: a few steps of every arm on every problem, timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...errors import NumericalError
from ...framework.whole_model.optimizer import WholeModel
from ..problems import Data, Problem, get_problem
from ..report.tables import screen_table
from ..runs.config import Budget
from ..runs.environment import prepare_process
from ..runs.on_screen import say
from ..runs.training import prepare
from .definition import Arm, Study, StudyProblem
from .display import duration

__all__ = ["Cost", "estimate", "show_estimate"]

_STEPS = 5


@dataclass(frozen=True)
class Cost:
    """What one arm's runs on one problem take, in seconds of one process.

    Args:
        warm_start: the method's initial pass over the data; 0 without one.
        step: one optimizer step, the median of a few; NaN if the method broke down in them.
        evaluation: losses on all samples, its share in one epoch where a problem is evaluated less often.
        batches: steps in an epoch.
    """

    warm_start: float
    step: float
    evaluation: float
    batches: int

    def run(self, budget: Budget, evaluations: int = 1) -> float:
        """Seconds of a run with everything.

        Args:
            budget: its epochs and seconds of training.
            evaluations: in an epoch, beside the first one.
        """
        epoch = self.batches * self.step
        training = self.warm_start + epoch * (math.inf if budget.epochs is None else budget.epochs)
        if budget.seconds is not None:
            training = min(training, budget.seconds)
        passed = max(0.0, training - self.warm_start) / epoch
        return training + self.evaluation * (1 + evaluations * passed)


def estimate(study: Study, data_dir: Path | None, threads: int) -> Iterator[tuple[StudyProblem, Arm, Cost]]:
    """Time the first steps of every arm on every problem; a method's first steps are often its dearest.

    Args:
        study: checked.
        data_dir: where the data sets lie, or ``None``.
        threads: of one operation, as the workers will have.
    """
    prepare_process(threads)
    for entry in study.problems:
        problem = get_problem(entry.name, **entry.options)
        data = problem.load(data_dir)
        for arm in (arm.at(entry.label) for arm in study.arms):
            yield entry, arm, _cost(study, entry, arm, problem, data)


def _cost(study: Study, entry: StudyProblem, arm: Arm, problem: Problem, data: Data) -> Cost:
    point = (study.points(arm) or [{}])[0]
    run = prepare(arm.config(entry, point, study.seeds[0], study.device), problem, data)
    batches = run.order.batches_per_epoch
    run.warm_start(lambda: run.warm_start_batches >= _STEPS)
    warm_start = run.warm_start_seconds * batches / max(1, run.warm_start_batches)
    steps: list[float] = []
    try:
        for _ in range(1 + _STEPS):
            before = run.clock.seconds
            run.step()
            run.clock.pause()
            steps.append(run.clock.seconds - before)
    except NumericalError:
        steps = [math.nan]
    began = time.perf_counter()
    run.evaluate()
    spent = time.perf_counter() - began
    if not isinstance(run.optimizer, WholeModel):  # which places nothing on the model
        run.optimizer.close()
    return Cost(warm_start, statistics.median(steps[1:] or steps), spent / problem.interval, batches)


def show_estimate(study: Study, data_dir: Path | None, workers: int, threads: int, console: Console) -> None:
    """Print the costs, and how long the whole study takes with so many workers."""
    rows = []
    total = 0.0
    with console.status("timing the first steps of every arm"):
        for problem, arm, cost in estimate(study, data_dir, threads):
            final = cost.run(study.problem_budget(problem), study.evaluations)
            tuning = cost.run(study.tuning_budget(problem), study.evaluations)
            trials, seeds = study.trials(arm), len(study.final_seeds(problem))
            together = seeds * final + trials * tuning
            row = {"problem": problem.label, "arm": arm.label, "one run": "breaks down", "runs": trials + seeds}
            if not math.isnan(together):
                total += together
                row |= {"ms/step": 1000 * cost.step, "one run": duration(final), "together": duration(together)}
            rows.append(row)
    columns = ("problem", "arm", "ms/step", "one run", "runs", "together")
    title = "cost, from the first steps of every arm"
    console.print(screen_table(title, rows, {name: name for name in columns}, digits=3))
    say(
        console,
        f"about {duration(total / workers)} with {workers} worker(s), evaluation counted, if nothing else runs here",
    )
