"""A problem small enough that a whole run takes a moment."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from osculate.experiments.commands import bounded, compare_structures
from osculate.experiments.commands import show as catalogue
from osculate.experiments.commands import train as commands
from osculate.experiments.data.augmentation import Augmentation
from osculate.experiments.problems import Data
from osculate.experiments.runs import comparison, reopen, runs, training, training_run
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class TinyProblem:
    """Classes of random points; with dropout, so that the random state matters; breaks down on demand."""

    name: str = "tiny"
    summary: str = "random points"
    likelihood: str = "categorical"
    batch_size: int = 16
    epochs: int = 2
    classes: int | None = 3
    samples: int = 70
    break_after: float = math.inf
    calls: int = 0
    augmentation: Augmentation | None = None
    undecayed: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    optimum: Callable[[Data], float] | None = None
    floor: float | None = None
    landmarks: Mapping[str, float] = field(default_factory=dict)
    objective: None = None
    interval: int = 1
    relative_error: bool = False

    def build_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += output.requires_grad
        return functional.cross_entropy(output, target) * (math.inf if self.calls > self.break_after else 1.0)

    def load(self, data_dir: Path | None) -> Data:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(self.samples + 20, 5, generator=generator)
        targets = inputs[:, :3].argmax(dim=1)
        cut = self.samples
        return Data(inputs[:cut], targets[:cut], inputs[cut:], targets[cut:])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TinyProblem:
    """The problem every name stands for while the test runs."""
    problem = TinyProblem()

    def get_problem(name: str, **options: Any) -> TinyProblem:
        return problem

    for module in (runs, comparison, catalogue, commands, bounded, compare_structures, reopen):
        monkeypatch.setattr(module, "get_problem", get_problem)
    return problem


@pytest.fixture
def second_per_evaluation(tiny: TinyProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for runs that goes on by one second with every gradient of ``tiny``, and never else."""
    clock = SimpleNamespace(perf_counter=lambda: float(tiny.calls))
    for module in (training, training_run):
        monkeypatch.setattr(module, "time", clock)
