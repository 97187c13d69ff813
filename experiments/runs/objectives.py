"""What an optimizer's step evaluates on a problem, a loss or residuals, and which methods a problem cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.records.needs import Needs, Record
from ...errors import ArgumentError
from ...framework.methods.method import Method
from ...framework.optimizer.second_order import SecondOrder
from ...framework.whole_model.method import WholeMethod, whole_methods
from ...framework.whole_model.optimizer import WholeModel
from ..problems import Problem, ResidualProblem
from ..rivals.foreign import ForeignOptimizer

__all__ = ["AnyOptimizer", "chosen_backend", "closure_of", "objective", "require_residuals"]

_RESIDUALS = "residuals"

AnyOptimizer = SecondOrder | WholeModel | ForeignOptimizer
"""What trains a run's model."""


def closure_of(optimizer: torch.optim.Optimizer | ForeignOptimizer, loss: Callable[[], Tensor]) -> Callable[[], Any]:
    """Return what an optimizer's step evaluates: the loss, and its gradients in place of the old ones."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def objective(
    problem: Problem, optimizer: AnyOptimizer, model: nn.Module, inputs: Tensor, targets: Tensor
) -> Callable[[], Any]:
    """Return what a step on a mini-batch evaluates: residuals by name for an optimizer that reads them, else the loss.

    Args:
        problem: gives either.
        optimizer: whose step it is.
        model: its network.
        inputs: (N, ...) of the mini-batch.
        targets: see ``Data``.
    """
    if isinstance(problem, ResidualProblem):
        if isinstance(optimizer, WholeModel) or _reads_residuals(optimizer):
            return problem.residuals(model, inputs, targets)
        return closure_of(optimizer, lambda: problem.training_loss(model, inputs, targets))
    if _reads_residuals(optimizer):
        return lambda: {"targets": model(inputs) - targets}
    return closure_of(optimizer, lambda: problem.loss(model(inputs), targets))


def _reads_residuals(optimizer: AnyOptimizer) -> bool:
    """Whether its step must be given residuals."""
    if isinstance(optimizer, WholeModel):
        return optimizer.method.needs_residuals
    return isinstance(optimizer, SecondOrder) and optimizer.capture.takes_residuals


def chosen_backend(problem: Problem, name: str, method: Method, asked: str | None) -> str:
    """Return who is to measure the curvature of a method on a problem; nothing is built yet.

    Where the loss contains derivatives of the network, inputs and output gradients of layers do not explain it: a
    method that measures layers is given the residuals there, and one that only reads gradients the loss.

    Args:
        problem: on which it is to run.
        name: of the method, for messages.
        method: composed.
        asked: the backend that the run asks for, or ``None``.

    Raises:
        ArgumentError: the curvature would be that of another loss, or residuals are wanted of a problem without.
    """
    if not isinstance(problem, ResidualProblem):
        if asked == _RESIDUALS and not _has_residuals(problem):
            raise ArgumentError(f"backend='residuals' needs residuals, and {_without(problem)}; leave the backend out")
        return asked or "hooks"
    if not _measures_layers(method):
        return asked or "hooks"
    if asked not in (None, _RESIDUALS):
        raise ArgumentError(
            f"backend={asked!r} measures curvature from what goes in and out of layers, and the loss of "
            f"{problem.name!r} contains derivatives of the network, of which these know nothing: the curvature of "
            f"{name!r} would be wrong; leave the backend out, and it is given the residuals, or take a method over the "
            f"whole model "
            f"({', '.join(whole_methods())})"
        )
    return _RESIDUALS


def require_residuals(problem: Problem, name: str, method: WholeMethod) -> None:
    """See that a problem has what a method over the whole model solves for.

    Args:
        problem: on which it is to run.
        name: of the method, for messages.
        method: composed.

    Raises:
        ArgumentError: it needs residuals, and the problem has none.
    """
    if method.needs_residuals and not _has_residuals(problem):
        free = [other for other, entry in whole_methods().items() if not entry.factory().needs_residuals]
        raise ArgumentError(
            f"{name!r} solves for residuals, and {_without(problem)}; take a method for any loss ({', '.join(free)}), "
            "or one with that likelihood, such as joint-kfac"
        )


def _without(problem: Problem) -> str:
    return f"{problem.name!r} has none: its loss is of the likelihood {problem.likelihood}"


def _has_residuals(problem: Problem) -> bool:
    """Whether its loss is half a sum of squares of what it can name."""
    return isinstance(problem, ResidualProblem) or (problem.likelihood == "gaussian" and problem.objective is None)


def _measures_layers(method: Method) -> bool:
    """Whether it reads more than gradients of the loss by the parameters, and products with its Hessian."""
    read = method.curvature.records(method.needs) & ~Record.COUNT
    return bool(read) or bool(method.measures_at(None) & (Needs.SCORES | Needs.BATCH_SCORES))
