"""The training loop: one model, one problem, one method, until a budget is spent.

``measure`` advances a ``TrainingRun`` and yields its metrics; who asks for them decides where they go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ... import build, registry
from ...errors import ArgumentError, NumericalError, require_positive_integer
from ...framework.whole_model.method import WholeEntry, whole_method
from ..problems import Data, Problem
from ..rivals.catalogue import runnable
from ..rivals.foreign import ForeignOptimizer
from ..rivals.rival import Rival
from .batches import move_data
from .config import Budget, RunConfig
from .environment import choose_device
from .evaluation import Metrics
from .objectives import AnyOptimizer, chosen_backend, require_residuals
from .training_run import TrainingRun

__all__ = ["BoundedShare", "EveryEpoch", "Schedule", "measure", "optimizer_for", "prepare"]


class Schedule(Protocol):
    """When a run is evaluated, beside its beginning and its end."""

    def due(self, run: TrainingRun, last: float, cost: float) -> bool:
        """Whether to evaluate now.

        Args:
            run: after a step.
            last: the run's seconds at the last evaluation.
            cost: seconds spent on evaluation since the first one, which is before training.
        """


@dataclass(frozen=True)
class EveryEpoch:
    """Evaluate at the end of every epoch, or more often, at equal distances as far as the number of batches allows.

    Where a problem has an ``interval`` of several epochs, that is what counts as one here.

    Args:
        times: evaluations in an epoch, >= 1.
    """

    times: int = 1

    def __post_init__(self) -> None:
        require_positive_integer("evaluations in an epoch", self.times)

    def due(self, run: TrainingRun, last: float, cost: float) -> bool:
        """Whether a share of an epoch has just ended."""
        batches = run.order.batches_per_epoch * run.problem.interval
        return run.iterations * self.times // batches > (run.iterations - 1) * self.times // batches


@dataclass(frozen=True)
class BoundedShare:
    """Evaluate at ends of epochs as long as evaluation stays a small share of training, and within long epochs too.

    Args:
        share: evaluation time allowed, as a share of training time, > 0.
        longest: seconds of training after which an evaluation is due within an epoch, > 0.
        closest: seconds of training that lie between two evaluations at least, >= 0: epochs may be shorter.
    """

    share: float
    longest: float
    closest: float = 0.0

    def due(self, run: TrainingRun, last: float, cost: float) -> bool:
        """Whether an epoch has ended and ``closest`` has passed, or ``longest`` has, and the share allows it."""
        seconds = run.clock.seconds
        wanted = (run.at_epoch_end and seconds - last >= self.closest) or seconds - last >= self.longest
        return wanted and cost <= self.share * seconds


def prepare(config: RunConfig, problem: Problem, data: Data, budget: Budget | None = None) -> TrainingRun:
    """Build model and optimizer, and move everything to the device.

    Args:
        config: what is run; numbers it leaves open are the problem's for this method, else the method's defaults.
        problem: the problem that ``config`` names.
        data: its data.
        budget: of the run, for learning rates that change over it.

    Raises:
        ArgumentError: a number is out of range, the method is unknown, or there is no such device.
    """
    device, config = choose_device(config.device), config.suited_to(problem.settings)
    data = move_data(data, device)
    model: Any = problem.build_model(config.seed).to(device)
    if data.context:
        model.set_context(*data.context)
    return TrainingRun(config, problem, data, model, optimizer_for(config, problem, model), budget)


def optimizer_for(config: RunConfig, problem: Problem, model: nn.Module) -> AnyOptimizer:
    """Build the optimizer of a run, with the problem's likelihood and without decay where the problem wants none.

    Args:
        config: what is run, the problem's own numbers filled in.
        problem: the problem that ``config`` names.
        model: its network.

    Raises:
        ArgumentError: a number is out of range, a name is unknown, or parts do not fit together or to the network;
            a rival's package is not installed; the method can make no right use of the problem's loss.
    """
    method, arguments = config.composed()
    entry = runnable()[method] if isinstance(method, str) else None
    if isinstance(entry, Rival):
        return ForeignOptimizer(entry, model, arguments, problem.undecayed)
    if isinstance(entry, WholeEntry):
        given = {name: value for name, value in arguments.items() if name in entry.options}
        require_residuals(problem, entry.name, whole_method(entry.name, **given))
        if config.lr_schedule is not None or config.lr_warm_up:
            raise ArgumentError(f"{entry.name!r} searches for the length of every step; it takes no schedule of lr")
        return build(entry.name, model, **arguments)
    options = {} if entry is None else {name: arguments[name] for name in entry.options if name in arguments}
    composed = registry.method(method, **options) if isinstance(method, str) else method
    backend = chosen_backend(problem, config.method, composed, arguments.pop("backend", None))
    likelihood = None if backend == "residuals" else problem.likelihood
    groups = [{"params": list(problem.undecayed), "weight_decay": 0.0}] if problem.undecayed else None
    arguments |= {"likelihood": likelihood, "seed": config.seed, "groups": groups, "backend": backend}
    return build(method, model, **arguments)


def measure(
    run: TrainingRun,
    budget: Budget,
    schedule: Schedule,
    on_step: Callable[[TrainingRun], None] = lambda run: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Metrics]:
    """Train until the budget is spent, and yield the metrics whenever the schedule asks, at the start and at the end.

    A warm start that uses up the budget's seconds is cut there, and no step is taken.

    Args:
        run: a fresh run (it is warm-started first) or one that continues from a checkpoint.
        budget: when to stop.
        schedule: when to evaluate.
        on_step: called after every step.
        stopping: asked after every step and before every mini-batch of the warm start; the run stops where it answers
            yes. One that stops within its warm start yields nothing.

    Yields:
        Metrics; the run stands exactly where they were taken until the next one is asked for.

    Raises:
        NumericalError: the method broke down, or a loss is not finite.
    """
    last, cost = run.clock.seconds, 0.0
    if run.iterations == 0:
        run.warm_start(lambda: stopping() or budget.out_of_time(run.clock.seconds))
        if stopping():
            return
        yield _finite(run.evaluate())
        last = run.clock.seconds
    finished = budget.spent(run.epoch, run.clock.seconds) >= 1 or stopping()
    while not finished:
        run.step()
        on_step(run)
        finished = budget.spent(run.epoch, run.clock.seconds) >= 1 or stopping()
        if finished or schedule.due(run, last, cost):
            run.clock.pause()
            began = time.perf_counter()
            yield _finite(run.evaluate())
            last, cost = run.clock.seconds, cost + time.perf_counter() - began


def _finite(metrics: Metrics) -> Metrics:
    if not metrics.finite:
        raise NumericalError(
            f"after {metrics.iterations} iterations the training loss is {metrics.train_loss} and the test loss "
            f"{metrics.test_loss}; lower the learning rate or raise the damping"
        )
    return metrics
