"""Loss and accuracy over whole data sets, and the line of metrics they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..problems import Problem, ResidualProblem

__all__ = ["Metrics", "relative_error", "score"]

_CHUNK = 2000


@dataclass(frozen=True)
class Metrics:
    """One line of ``metrics.jsonl``.

    Args:
        epoch: passes over the training data so far; a fraction between the ends of epochs.
        train_loss: mean loss over the whole training set, weight penalty included (PAPERS 4.3).
        test_loss: mean loss over the test set, no penalty.
        test_accuracy: share of test samples classified rightly, in [0, 1]; None without classes.
        penalty: the weight penalty in ``train_loss``: half the weight decay times the squared norm of the parameters;
            0 where the decay is decoupled.
        seconds: training time so far: warm start included, evaluation, loading and saving excluded.
        warm_start_seconds: the warm start's part of ``seconds``.
        iterations: optimizer steps so far.
        gradient_evaluations: forward-backward passes so far, a method's own included.
        peak_memory_bytes: see ``environment.peak_memory_bytes``.
        valid_loss: mean loss over the validation samples, no penalty; None where nothing is held out.
        valid_accuracy: share of validation samples classified rightly; None without classes or validation samples.
        relative_l2: norm of the error on the test samples over the norm of their targets; None where the problem does
            not ask for it.
        suboptimality: training loss less the least possible one, penalty left out; None where that is unknown.
        events: what the method counted since the line before, such as rejected pairs; only counts above 0.
        layer_steps: step size of every layer at the last step, of methods that choose one per layer.
    """

    epoch: float
    train_loss: float
    test_loss: float
    test_accuracy: float | None
    penalty: float
    seconds: float
    warm_start_seconds: float
    iterations: int
    gradient_evaluations: int
    peak_memory_bytes: int
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    relative_l2: float | None = None
    suboptimality: float | None = None
    events: Mapping[str, int] = field(default_factory=dict)
    layer_steps: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; what there is not (accuracy, validation, events, layer steps, ...) is left out."""
        plain = asdict(self)
        return {name: value for name, value in plain.items() if value is not None and value != {}}

    @property
    def finite(self) -> bool:
        """Whether both losses are finite."""
        return math.isfinite(self.train_loss) and math.isfinite(self.test_loss)


def score(
    model: nn.Module, problem: Problem, inputs: Tensor, targets: Tensor, *, training: bool = False
) -> tuple[float, float | None]:
    """Return the mean loss of ``model`` in evaluation mode over all samples, and the share of right classes, if any.

    Of sequences it is the share of all tokens.

    Args:
        model: left in the mode it was in.
        problem: gives the loss, a mean over samples.
        inputs: (N, ...).
        targets: (N, ...).
        training: whether they are the training samples, which for a problem of residuals are points of equations.

    Cost: one forward pass over N samples; for equations one evaluation of their residuals.
    """
    if training and isinstance(problem, ResidualProblem):
        with torch.enable_grad():
            return float(problem.training_loss(model, inputs, targets).detach()), None
    total, right = torch.zeros(2, dtype=torch.float64, device=inputs.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for part, part_targets in zip(torch.split(inputs, _CHUNK), torch.split(targets, _CHUNK), strict=True):
                output = model(part)
                total += problem.loss(output, part_targets).double() * len(part)
                if problem.classes is not None:
                    right += (output.argmax(dim=-1) == part_targets).sum()
    finally:
        for module, training in modes:
            module.training = training
    accuracy = float(right) / targets.numel() if problem.classes is not None else None
    return float(total) / len(inputs), accuracy


def relative_error(model: nn.Module, problem: Problem, inputs: Tensor, targets: Tensor) -> float | None:
    """Return the norm of the error over the norm of the targets, or None where the problem does not ask for it.

    Args:
        model: a function of its inputs alone.
        problem: may ask for it.
        inputs: (N, ...).
        targets: (N, ...) values.

    Cost: one forward pass over N samples.
    """
    if not problem.relative_error:
        return None
    with torch.no_grad():
        error = torch.cat([model(part) for part in torch.split(inputs, _CHUNK)]) - targets
    return float(error.double().norm() / targets.double().norm())
