"""What a training step costs, in time and memory, beside one step of ``torch.optim.SGD``.

One process, interleaved rounds. In every round each contestant takes one untimed lead-in step and then one whole period
of its schedule, timed; plain SGD steps are timed right before and right after it, and the ratio is taken within this
triple, so that a drifting machine cancels. The table shows medians over rounds. SGD itself runs as a contestant too:
how far its ratio lies from 1 is the noise of the measurement.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ... import build
from ...errors import ArgumentError
from ..problems import Data, Problem
from .batches import BatchOrder

__all__ = ["CONTESTANTS", "Contestant", "Timing", "benchmark", "benchmark_table", "random_data", "tensor_bytes"]

REFERENCE_STEPS = 3
SAMPLES = 10_000


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
        self.model = problem.build_model(0).to(data.train_inputs.device)
        self.optimizer: torch.optim.Optimizer = _optimizer(contestant, problem, self.model)
        self._problem, self._data = problem, data
        self._order = BatchOrder(len(data.train_inputs), batch_size, 0, data.train_inputs.device)

    def run(self, steps: int) -> float:
        """Take ``steps`` steps and return the seconds they took together."""
        batches = [self._order.next() for _ in range(steps)]
        pairs = [(self._data.train_inputs[batch], self._data.train_targets[batch]) for batch in batches]
        self._synchronise()
        began = time.perf_counter()
        for inputs, targets in pairs:
            self.optimizer.step(self._closure(inputs, targets))
        self._synchronise()
        return time.perf_counter() - began

    def _closure(self, inputs: Tensor, targets: Tensor) -> Callable[[], float]:
        def closure() -> Any:
            self.optimizer.zero_grad()
            loss = self._problem.loss(self.model(inputs), targets)
            loss.backward()
            return loss

        return closure

    def _synchronise(self) -> None:
        if self._data.train_inputs.device.type == "cuda":
            torch.cuda.synchronize(self._data.train_inputs.device)


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
    return _summarise(contestants, steppers, times)


def benchmark_table(timings: list[Timing], title: str) -> Table:
    """Return the table for the screen."""
    caption = (
        "Medians of interleaved rounds; in brackets the ratio to torch's Adam; MiB of state, counted and by formula."
    )
    table = Table(title=title, caption=caption, pad_edge=False)
    for heading in ("contestant", "ms/step", "x SGD", "target", "floor", "MiB", "formula"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right", no_wrap=True)
    for timing in timings:
        table.add_row(*_cells(timing))
    return table


def random_data(problem: Problem, samples: int = SAMPLES, seed: int = 0) -> Data:
    """Return uniform random inputs that are their own targets, for timing an autoencoder without its data.

    Args:
        problem: without classes, its model starting with a linear layer.
        samples: how many.
        seed: of the numbers.

    Raises:
        ArgumentError: the problem's data cannot be replaced by random numbers.
    """
    first = next((module for module in problem.build_model(0).modules() if isinstance(module, nn.Linear)), None)
    if problem.classes is not None or first is None:
        raise ArgumentError(f"random data stand in only for an autoencoder's; give --data-dir for {problem.name!r}")
    inputs = torch.rand(samples, first.in_features, generator=torch.Generator().manual_seed(seed))
    return Data(train_inputs=inputs, train_targets=inputs, test_inputs=inputs, test_targets=inputs)


def tensor_bytes(state: object, seen: set[int] | None = None) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples; a tensor that occurs twice counts once."""
    seen = set() if seen is None else seen
    if isinstance(state, Tensor):
        if state.data_ptr() in seen:
            return 0
        seen.add(state.data_ptr())
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(tensor_bytes(value, seen) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(tensor_bytes(value, seen) for value in state)
    return 0


def _optimizer(contestant: Contestant, problem: Problem, model: nn.Module) -> torch.optim.Optimizer:
    if contestant.method == "torch-sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if contestant.method == "torch-adam":
        return torch.optim.Adam(model.parameters(), lr=1e-4)
    return build(contestant.method, model, likelihood=problem.likelihood, seed=0, **contestant.options)


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


def _summarise(
    contestants: tuple[Contestant, ...],
    steppers: Mapping[str, _Stepper],
    times: Mapping[str, list[tuple[float, float]]],
) -> list[Timing]:
    seconds = {label: statistics.median(own for own, _ in rows) for label, rows in times.items()}
    ratios = {label: [ratio for _, ratio in rows] for label, rows in times.items()}
    timings = []
    for contestant in contestants:
        own, optimizer = ratios[contestant.label], steppers[contestant.label].optimizer
        ratio = statistics.median(own)
        other = ratios.get(contestant.against or "")
        compared = statistics.median(a / b for a, b in zip(own, other, strict=True)) if other else ratio
        timing = Timing(
            contestant.label,
            milliseconds=1e3 * seconds[contestant.label],
            ratio=ratio,
            spread=_quartiles(own),
            state_bytes=tensor_bytes(optimizer.state_dict()),
            table_bytes=_declared_bytes(optimizer),
            target=contestant.target,
            floor=contestant.floor,
            against=contestant.against,
            compared=compared,
        )
        timings.append(timing)
    return timings


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _declared_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    layer_table = getattr(optimizer, "layer_table", None)
    return None if layer_table is None else sum(row.bytes for row in layer_table())


def _cells(timing: Timing) -> list[str]:
    met = timing.target is None or timing.compared <= timing.target
    target = "" if timing.target is None else f"{'' if met else '[red]'}{timing.target:g}"
    if timing.against is not None and timing.target is not None:
        target += f" ({timing.compared:.2f})"
    return [
        timing.label,
        f"{timing.milliseconds:.1f}",
        f"{timing.ratio:.2f}",
        target,
        "" if timing.floor is None else f"{timing.floor:g}",
        f"{timing.state_bytes / 2**20:.1f}",
        "" if timing.table_bytes is None else f"{timing.table_bytes / 2**20:.1f}",
    ]
