"""One model in training: its state, one step, one evaluation; without files or a screen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...framework.optimizer.second_order import SecondOrder
from ...framework.whole_model.optimizer import WholeModel
from ...stepsize.constant import ConstantStep
from ..problems import Data, Problem, ResidualProblem
from ..rivals.foreign import evaluated
from .batches import BatchOrder, augmentation_generator
from .config import Budget, RunConfig, WarmStart
from .environment import peak_memory_bytes, reset_peak_memory
from .evaluation import Metrics, relative_error, score
from .objectives import AnyOptimizer, objective
from .schedules import schedule_of

__all__ = ["Stopwatch", "TrainingRun"]


class Stopwatch:
    """Wall-clock seconds of what happens between ``start`` and ``pause``, the device's queue emptied at both."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._total = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Time so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._total + running

    def start(self) -> None:
        """Go on counting; nothing happens where it already counts."""
        if self._since is None:
            self._synchronise()
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting until ``start``."""
        if self._since is not None:
            self._synchronise()
            self._total, self._since = self.seconds, None

    def reset(self, seconds: float) -> None:
        """Stand paused at ``seconds``."""
        self._total, self._since = seconds, None

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class TrainingRun:
    """A model in training, with all that decides how it goes on.

    Args:
        config: what is run.
        problem: gives the loss.
        data: training and test samples, on the run's device.
        model: on the run's device.
        optimizer: of the model's parameters.
        budget: of the run, for learning rates that change over it; ``None``: they stand still.
    """

    def __init__(
        self,
        config: RunConfig,
        problem: Problem,
        data: Data,
        model: nn.Module,
        optimizer: AnyOptimizer,
        budget: Budget | None = None,
    ) -> None:
        self.config = config
        self.problem = problem
        self.data = data
        self.model = model
        self.optimizer = optimizer
        self.device = data.train_inputs.device
        samples = len(data.train_inputs)
        self.order = BatchOrder(samples, config.batch_size or problem.batch_size or samples, config.seed, self.device)
        self.schedule = schedule_of(config, budget, self.order.batches_per_epoch)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.clock = Stopwatch(self.device)
        points = isinstance(problem, ResidualProblem)
        # All points in their order: a method may remember residuals by their place.
        self._as_they_lie = points and self.order.batch_size == samples
        if points and problem.augmentation is not None and not self._as_they_lie:
            raise ArgumentError("all points are drawn anew at every step; leave the batch size out, or resample=False")
        self.iterations = 0
        self.warm_start_seconds = 0.0
        self.warm_start_batches = 0
        self.last_loss: Tensor | None = None
        self._optimum = None if problem.optimum is None else problem.optimum(data)
        self._events: dict[str, Tensor | int] = {}
        torch.manual_seed(config.seed)
        reset_peak_memory(self.device)

    @property
    def composed(self) -> SecondOrder:
        """The optimizer, of a method that is composed of parts.

        Raises:
            ArgumentError: it is over the whole model, or another package's, so nothing of layers can be examined.
        """
        if isinstance(self.optimizer, WholeModel):
            raise ArgumentError(
                f"{self.config.method!r} works on all parameters at once: it has no layers that could be examined one "
                "by one; take a method of parts, such as adam"
            )
        if not isinstance(self.optimizer, SecondOrder):
            raise ArgumentError(
                f"{self.config.method!r} is the optimizer of the package {self.optimizer.rival.distribution}: it has "
                "no parts and records nothing that could be examined; take a method of osculate's own"
            )
        return self.optimizer

    @property
    def epoch(self) -> float:
        """Passes over the training data so far; a whole number exactly at the end of each."""
        return self.iterations / self.order.batches_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last batch of an epoch has just been used."""
        return self.iterations > 0 and self.iterations % self.order.batches_per_epoch == 0

    def warm_start(self, halted: Callable[[], bool] = lambda: False) -> None:
        """Run the method's initial pass over the training data, if it has one and the configuration wants it.

        Args:
            halted: asked before every mini-batch; the pass ends early where it answers yes, and
                ``warm_start_batches`` tells how far it came.
        """
        if self.config.warm_start is WarmStart.NONE or not self.optimizer.has_warm_start:
            return
        optimizer = self.composed
        self.clock.start()
        passes = self._warm_start_passes(halted)
        first = next(passes, None)
        if first is not None:  # a warm start without a single mini-batch is an error, a run that is out of time is not
            optimizer.warm_start(itertools.chain([first], passes))
        self.clock.pause()
        self.warm_start_seconds = self.clock.seconds

    def _warm_start_passes(self, halted: Callable[[], bool]) -> Iterator[Callable[[], Any]]:
        size, inputs = self.order.batch_size, self.data.train_inputs
        for number in range(self.order.batches_per_epoch):
            if halted():
                return
            yield partial(self.model, inputs[number * size : (number + 1) * size])
            self.warm_start_batches = number + 1

    def step(self) -> None:
        """Take one optimizer step on the next mini-batch; the clock runs."""
        self.clock.start()
        index: Tensor | slice = self.order.next()
        if self._as_they_lie:
            index = slice(None)
        inputs = self.data.train_inputs[index]
        same = self.data.train_targets is self.data.train_inputs
        targets = inputs if same else self.data.train_targets[index]
        if self.problem.augmentation is not None:
            generator = augmentation_generator(self.config.seed, self.iterations)
            inputs = self.problem.augmentation(inputs, generator)
        if self.schedule is not None:
            factor = self.schedule.factor(self.iterations, self.clock.seconds)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = factor * rate
        loss = self.optimizer.step(objective(self.problem, self.optimizer, self.model, inputs, targets))
        self.iterations += 1
        self.last_loss = None if loss is None else loss.detach()
        report = self.optimizer.last_report
        counts: dict[str, Tensor | int] = {**report.events, "rescues": report.rescues, "shortened": report.shortened}
        for name, count in counts.items():  # tensors stay on the device until the next evaluation
            self._events[name] = self._events.get(name, 0) + count

    def evaluate(self) -> Metrics:
        """Pause the clock and return the metrics at this point."""
        self.clock.pause()
        data, valid_loss, valid_accuracy = self.data, None, None
        with evaluated(self.optimizer, self.model, self._inputs) as (model, penalty):
            train_loss, _ = score(model, self.problem, data.train_inputs, data.train_targets, training=True)
            test_loss, test_accuracy = score(model, self.problem, data.test_inputs, data.test_targets)
            found = relative_error(model, self.problem, data.test_inputs, data.test_targets)
            if data.valid_inputs is not None and data.valid_targets is not None:
                valid_loss, valid_accuracy = score(model, self.problem, data.valid_inputs, data.valid_targets)
        events = {name: int(count) for name, count in sorted(self._events.items()) if int(count)}
        self._events.clear()
        return Metrics(
            epoch=int(self.epoch) if self.epoch.is_integer() else round(self.epoch, 6),
            train_loss=train_loss + penalty,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            penalty=penalty,
            seconds=self.clock.seconds,
            warm_start_seconds=self.warm_start_seconds,
            iterations=self.iterations,
            gradient_evaluations=int(self.optimizer.gradient_evaluations),
            peak_memory_bytes=peak_memory_bytes(self.device),
            valid_loss=valid_loss,
            valid_accuracy=valid_accuracy,
            relative_l2=found,
            suboptimality=None if self._optimum is None else train_loss - self._optimum,
            events=events,
            layer_steps=self._layer_steps(),
        )

    def _inputs(self) -> Iterator[Tensor]:
        """Mini-batches of the training inputs as they lie."""
        return iter(torch.split(self.data.train_inputs, self.order.batch_size))

    def _layer_steps(self) -> dict[str, float]:
        """Step sizes of the last step, fetched at once; empty where all layers share the learning rate."""
        sizes = self.optimizer.last_report.step_sizes
        optimizer = self.optimizer
        if not sizes or not isinstance(optimizer, SecondOrder) or isinstance(optimizer.method.step_size, ConstantStep):
            return {}
        joined = torch.stack(
            [torch.as_tensor(size, dtype=torch.float64, device=self.device) for size in sizes.values()]
        )
        return dict(zip(sizes, joined.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue bit for bit."""
        on_cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.state_dict(),
            "random_state": torch.get_rng_state(),
            "device_random_state": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "iterations": self.iterations,
            "seconds": self.clock.seconds,
            "warm_start_seconds": self.warm_start_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.load_state_dict(state["order"])
        torch.set_rng_state(state["random_state"].cpu())
        if state["device_random_state"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_random_state"].cpu(), self.device)
        self.iterations = int(state["iterations"])
        self.warm_start_seconds = float(state["warm_start_seconds"])
        self.clock.reset(float(state["seconds"]))
