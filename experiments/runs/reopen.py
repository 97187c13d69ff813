"""Opening a finished run again: its model, data, optimizer and mini-batches, for measurements."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from ...analysis.quality.exact_blocks import Probe
from ...errors import ArgumentError
from ..problems import Data, Problem, ResidualProblem, get_problem
from ..problems.problem import PUBLISHED
from .config import RunConfig, WarmStart
from .records import RunFolder
from .training import prepare
from .training_run import TrainingRun

__all__ = ["copy_of", "probes", "reopen", "saved_config"]


_OPTIONAL = ("parts", "lr_schedule", "lr_warm_up")
"""Fields that a configuration has only where they were given."""


def saved_config(folder: RunFolder, device: str | None = None) -> RunConfig:
    """The configuration of the run in a folder.

    Args:
        folder: of the run.
        device: another device than the run's own, or ``None``.

    Raises:
        ArgumentError: if there is no run, or its configuration is not one.
    """
    if not folder.config_file.is_file():
        raise ArgumentError(f"{str(folder.path)!r} holds no run; name a folder that 'osculate train' wrote")
    saved = folder.read_config()
    try:
        given = {entry.name: saved[entry.name] for entry in fields(RunConfig) if entry.name not in _OPTIONAL}
        given["device"] = device or saved["device"]
        given["warm_start"] = WarmStart(saved["warm_start"])
        options = {name: _number(value) for name, value in saved["method_options"].items()}
        given["method_options"] = dict(PUBLISHED.get(saved["method"], {})) | options
        return RunConfig(**given, **{name: saved[name] for name in _OPTIONAL if name in saved})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(f"{folder.path} holds no complete configuration of a run ({error})") from error


def reopen(
    folder: RunFolder, data_dir: Path | None, source: Path | None = None, device: str | None = None
) -> TrainingRun:
    """The run as it stood at a checkpoint; nothing is written.

    Args:
        folder: of the run.
        data_dir: where the data sets lie; None downloads or generates them.
        source: one of the checkpoints that the run kept; ``None``: its last, or its beginning if it broke down before
            it wrote one.
        device: another device than the run's own, or ``None``.

    Raises:
        ArgumentError: if there is no run, or its checkpoint is missing or cannot be read.
    """
    config = saved_config(folder, device)
    problem = get_problem(config.problem, **config.problem_options)
    run = prepare(config, problem, problem.load(data_dir))
    if source is not None or folder.checkpoint_file.exists():
        run.load_state_dict(folder.load_checkpoint(run.device, source))
    elif any(line["iterations"] for line in folder.read_metrics()):  # else the beginning would pass for the end
        raise ArgumentError(f"{folder.checkpoint_file} is missing, though the run took steps; train it again")
    return run


def probes(problem: Problem, data: Data, samples: int, count: int) -> list[Probe]:
    """Mini-batches for measurements: the first samples of the training data, then the next ones, and so on.

    Args:
        problem: gives loss and likelihood.
        data: of the problem.
        samples: in each mini-batch, >= 1.
        count: how many, >= 1; the data are begun again where they end.

    Raises:
        ArgumentError: if a number is not positive, or the loss is none of the network's output.
    """
    if isinstance(problem, ResidualProblem):
        raise ArgumentError(
            f"the loss of {problem.name!r} is one of residuals with derivatives of the network; what is measured here "
            "needs a loss of the network's output, such as that of sine-regression"
        )
    if samples < 1 or count < 1:
        raise ArgumentError(f"samples and mini-batches must be >= 1, got {samples} and {count}")
    size = min(samples, len(data.train_inputs))
    whole = max(1, len(data.train_inputs) // size)
    parts = [slice(size * (index % whole), size * (index % whole + 1)) for index in range(count)]
    return [Probe(data.train_inputs[p], data.train_targets[p], problem.loss, problem.likelihood) for p in parts]


def copy_of(run: TrainingRun) -> nn.Module:
    """A model of the run's kind with its parameters and buffers, free of its optimizer."""
    model = run.problem.build_model(run.config.seed).to(run.device)
    model.load_state_dict(run.model.state_dict())
    return model


def _number(value: Any) -> Any:
    """An infinity, which JSON holds as a word."""
    return float(value) if value in ("inf", "-inf", "nan") and not math.isfinite(float(value)) else value
