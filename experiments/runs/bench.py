"""What a training step costs, in time and memory, beside one step of ``torch.optim.SGD``.

One process, interleaved rounds. In every round each contestant takes one untimed lead-in step and then one whole period
of its schedule, timed; plain SGD steps are timed right before and right after it, and the ratio is taken within this
triple, so that a drifting machine cancels. The table shows medians over rounds. SGD itself runs as a contestant too:
how far its ratio lies from 1 is the noise of the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ... import build, registry
from ...errors import ArgumentError, near_misses
from ..problems import Data, Problem
from .batches import BatchOrder
from .objectives import closure_of
from .on_screen import FittedTable
from .training_run import Stopwatch

__all__ = [
    "CONTESTANTS",
    "Contestant",
    "Timing",
    "benchmark",
    "benchmark_table",
    "optimizer_of",
    "random_data",
    "tensor_bytes",
]

REFERENCE_STEPS = 3
TORCH_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "torch-sgd": partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
    "torch-adam": partial(torch.optim.Adam, lr=1e-4),
}


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Args:
        label: shown in the table.
        method: registered method, or ``torch-sgd`` or ``torch-adam`` for torch's own.
        options: keywords of the method.
        period: steps until its schedule repeats, >= 1: what a round times.
        fill: untimed steps before the first round, >= 0: until its memory is full.
        target: largest acceptable ratio to the SGD step.
        floor: ratio of the same arithmetic by bare torch calls.
        against: label whose time ``target`` refers to, where that is not SGD.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    period: int = 1
    fill: int = 3
    target: float | None = None
    floor: float | None = None
    against: str | None = None


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("SGD again", "torch-sgd"),
    Contestant("torch Adam", "torch-adam"),
    Contestant("sgdm", "sgdm", target=1.15),
    Contestant("adam", "adam", target=1.15, against="torch Adam"),
    Contestant("kbfgs", "kbfgs", target=3.0, floor=2.5),
    Contestant("kbfgs-l", "kbfgs-l", {"memory": 100}, fill=102, target=2.8, floor=2.3),
    Contestant(
        "kfac empirical, 1/20",
        "kfac",
        {"statistics": "empirical", "statistics_every": 1, "inverses_every": 20, "lr": 0.01},
        period=20,
        fill=21,
        target=2.6,
        floor=2.2,
    ),
    Contestant("mbf, 2/25", "mbf", {"statistics_every": 2, "inverses_every": 25}, 50, 51, target=1.7, floor=1.4),
    Contestant("lw-sgdm, every step", "lw-sgdm", {"curvature_every": 1}, target=2.2, floor=1.9),
    Contestant("lw-sgdm, every 10", "lw-sgdm", {"curvature_every": 10}, 10, 11, target=1.3),
    Contestant("joint-kfac, 1/10", "joint-kfac", {"statistics_every": 1, "inverses_every": 10}, 10, 21),
    Contestant("kfac, 1/20", "kfac", {"statistics_every": 1, "inverses_every": 20, "lr": 0.01}, 20, 21),
    Contestant("soap, 10", "soap", {"basis_every": 10, "lr": 1e-3}, 10, 11),
    Contestant("muon", "muon", {"lr": 1e-3}),
    Contestant("adamw", "adamw"),
)


@dataclass(frozen=True)
class Timing:
    """What was measured for one contestant.

    Args:
        label: of the contestant.
        milliseconds: median time of a step, amortised over a period.
        ratio: median ratio to the SGD steps beside it.
        spread: lower and upper quartile of that ratio.
        state_bytes: bytes of all tensors in the optimizer's state.
        table_bytes: bytes the optimizer's own ``layer_table()`` declares; None for torch's optimizers.
        target: see ``Contestant``.
        floor: see ``Contestant``.
        against: see ``Contestant``.
        compared: the ratio that ``target`` bounds: ``ratio``, or the one to ``against``.
    """

    label: str
    milliseconds: float
    ratio: float
    spread: tuple[float, float]
    state_bytes: int
    table_bytes: int | None
    target: float | None
    floor: float | None
    against: str | None
    compared: float


class _Stepper:
    """A model and an optimizer that take training steps when told to."""

    def __init__(self, contestant: Contestant, problem: Problem, data: Data, batch_size: int) -> None:
        if problem.likelihood is None:
            raise ArgumentError(
                f"steps are timed on losses of a network's output, and {problem.name!r} has residuals; "
                f"'osculate compare --problem {problem.name}' shows milliseconds per step"
            )
        self.model = problem.build_model(0).to(data.train_inputs.device)
        self.optimizer = optimizer_of(contestant.method, self.model, problem.likelihood, **contestant.options)
        self._problem, self._data = problem, data
        self._order = BatchOrder(len(data.train_inputs), batch_size, 0, data.train_inputs.device)

    def run(self, steps: int) -> float:
        """Take ``steps`` steps and return the seconds they took together."""
        batches = [self._order.next() for _ in range(steps)]
        pairs = [(self._data.train_inputs[batch], self._data.train_targets[batch]) for batch in batches]
        closures = [closure_of(self.optimizer, partial(self._loss, *pair)) for pair in pairs]
        clock = Stopwatch(self._data.train_inputs.device)
        clock.start()
        for closure in closures:
            self.optimizer.step(closure)
        clock.pause()
        return clock.seconds

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._problem.loss(self.model(inputs), targets)


def benchmark(
    contestants: tuple[Contestant, ...],
    problem: Problem,
    data: Data,
    rounds: int,
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> list[Timing]:
    """Time all contestants in interleaved rounds.

    Args:
        contestants: at least one.
        problem: whose model is trained.
        data: at least one mini-batch of training samples, on the device to measure.
        rounds: >= 1.
        batch_size: samples in a mini-batch.
        note: told before every round.

    Raises:
        ArgumentError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ArgumentError(f"rounds must be >= 1, got {rounds}")
    reference = _Stepper(Contestant("SGD", "torch-sgd"), problem, data, batch_size)
    reference.run(3)
    steppers = {}
    for contestant in contestants:
        note(f"preparing {contestant.label}")
        steppers[contestant.label] = _Stepper(contestant, problem, data, batch_size)
        steppers[contestant.label].run(contestant.fill)
    times: dict[str, list[tuple[float, float]]] = {contestant.label: [] for contestant in contestants}
    for number in range(rounds):
        note(f"round {number + 1} of {rounds}")
        for contestant in contestants:
            times[contestant.label].append(_one_round(contestant, steppers[contestant.label], reference))
    return [_timing(contestant, steppers[contestant.label].optimizer, times) for contestant in contestants]


def benchmark_table(timings: list[Timing], title: str) -> Table:
    """Return the table for the screen."""
    caption = (
        "Medians of interleaved rounds; in brackets the ratio to torch's Adam; MiB of state, counted and by formula."
    )
    table = FittedTable(title=title, caption=caption, pad_edge=False)
    for heading in ("contestant", "ms/step", "x SGD", "target", "floor", "MiB", "formula"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right", no_wrap=True)
    for timing in timings:
        met = timing.target is None or timing.compared <= timing.target
        target = "" if timing.target is None else f"{'' if met else '[red]'}{timing.target:g}"
        if timing.against is not None and timing.target is not None:
            target += f" ({timing.compared:.2f})"
        table.add_row(
            timing.label,
            f"{timing.milliseconds:.1f}",
            f"{timing.ratio:.2f}",
            target,
            "" if timing.floor is None else f"{timing.floor:g}",
            f"{timing.state_bytes / 2**20:.1f}",
            "" if timing.table_bytes is None else f"{timing.table_bytes / 2**20:.1f}",
        )
    return table


def random_data(problem: Problem, samples: int = 10_000) -> Data:
    """Return uniform random inputs that are their own targets, for timing an autoencoder without its data.

    Args:
        problem: without classes, its model starting with a linear layer.
        samples: how many.

    Raises:
        ArgumentError: the problem's data cannot be replaced by random numbers.
    """
    first = next((module for module in problem.build_model(0).modules() if isinstance(module, nn.Linear)), None)
    if problem.classes is not None or first is None:
        raise ArgumentError(f"random data stand in only for an autoencoder's; give --data-dir for {problem.name!r}")
    inputs = torch.rand(samples, first.in_features, generator=torch.Generator().manual_seed(0))
    return Data(train_inputs=inputs, train_targets=inputs, test_inputs=inputs, test_targets=inputs)


def tensor_bytes(state: object) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples; a tensor that occurs twice counts once."""
    found = {value.data_ptr(): value.nbytes for value in tree_leaves(state) if isinstance(value, Tensor)}
    return sum(found.values())


def optimizer_of(method: str, model: nn.Module, likelihood: str, **options: Any) -> torch.optim.Optimizer:
    """Return a registered method's optimizer, or torch's own.

    Args:
        method: registered, ``torch-sgd`` or ``torch-adam``.
        model: whose parameters it trains.
        likelihood: of the loss.
        **options: keywords of a registered method.

    Raises:
        ArgumentError: the method is unknown, or an option is.
    """
    if method in TORCH_OPTIMIZERS:
        return TORCH_OPTIMIZERS[method](model.parameters())
    if method not in registry.methods():
        near = near_misses(method, [*registry.methods(), *TORCH_OPTIMIZERS])
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ArgumentError(
            f"no method {method!r}; {hint}'osculate methods' lists them, and torch-sgd and torch-adam count too"
        )
    return build(method, model, likelihood=likelihood, seed=0, **options)


def _one_round(contestant: Contestant, stepper: _Stepper, reference: _Stepper) -> tuple[float, float]:
    """Return seconds per step and the ratio to the reference around it."""
    reference.run(1)
    before = reference.run(REFERENCE_STEPS)
    stepper.run(1)
    steps = contestant.period * max(1, round(5 / contestant.period))
    own = stepper.run(steps) / steps
    reference.run(1)
    after = reference.run(REFERENCE_STEPS)
    return own, own / ((before + after) / (2 * REFERENCE_STEPS))


def _timing(
    contestant: Contestant, optimizer: torch.optim.Optimizer, times: Mapping[str, list[tuple[float, float]]]
) -> Timing:
    seconds, ratios = np.array(times[contestant.label]).T
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    other = times.get(contestant.against or "")
    layer_table = getattr(optimizer, "layer_table", None)
    return Timing(
        contestant.label,
        milliseconds=1e3 * float(np.median(seconds)),
        ratio=ratio,
        spread=(low, high),
        state_bytes=tensor_bytes(optimizer.state_dict()),
        table_bytes=None if layer_table is None else sum(row.bytes for row in layer_table()),
        target=contestant.target,
        floor=contestant.floor,
        against=contestant.against,
        compared=float(np.median(ratios / np.array(other)[:, 1])) if other else ratio,
    )
