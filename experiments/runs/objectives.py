"""What an optimizer's step evaluates on a problem, a loss or residuals, and which methods a problem cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import registry
from ...curvature.records.needs import Needs, Record
from ...errors import ArgumentError
from ...framework.methods.method import Method
from ...framework.optimizer.second_order import SecondOrder
from ...framework.whole_model.method import WholeMethod, whole_methods
from ...framework.whole_model.optimizer import WholeModel
from ..problems import Problem, ResidualProblem
from ..rivals.foreign import ForeignOptimizer

__all__ = ["AnyOptimizer", "closure_of", "objective", "require_served"]

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
    """Return what a step on a mini-batch evaluates: residuals by name for a method over the whole model, else the loss.

    Args:
        problem: gives either.
        optimizer: whose step it is.
        model: its network.
        inputs: (N, ...) of the mini-batch.
        targets: see ``Data``.
    """
    whole = isinstance(optimizer, WholeModel)
    if isinstance(problem, ResidualProblem):
        if whole:
            return problem.residuals(model, inputs, targets)
        return closure_of(optimizer, lambda: problem.training_loss(model, inputs, targets))
    if isinstance(optimizer, WholeModel) and optimizer.method.needs_residuals:
        return lambda: {"targets": model(inputs) - targets}
    return closure_of(optimizer, lambda: problem.loss(model(inputs), targets))


def require_served(problem: Problem, name: str, method: Method | WholeMethod) -> None:
    """See that a method can make right use of what a problem evaluates; nothing is built yet.

    Args:
        problem: on which it is to run.
        name: of the method, for messages.
        method: composed.

    Raises:
        ArgumentError: it measures layers, and the problem's loss contains derivatives of the network; or it needs
            residuals, and the problem has none.
    """
    if isinstance(method, WholeMethod):
        if method.needs_residuals and not _has_residuals(problem):
            free = [other for other, entry in whole_methods().items() if not entry.factory().needs_residuals]
            raise ArgumentError(
                f"{name!r} solves for residuals, and {problem.name!r} has none: its loss is of the likelihood "
                f"{problem.likelihood}; take a method for any loss ({', '.join(free)}), or one with that likelihood, "
                "such as joint-kfac"
            )
    elif isinstance(problem, ResidualProblem) and _measures_layers(method):
        plain = [other for other, entry in registry.methods().items() if not _measures_layers(entry.factory())]
        raise ArgumentError(
            f"{name!r} measures curvature from the inputs and output gradients of layers, and the loss of "
            f"{problem.name!r} contains derivatives of the network, of which these know nothing: the curvature would "
            f"be wrong. Take a method over the whole model ({', '.join(whole_methods())}), which is given the "
            f"residuals, or one that reads gradients alone ({', '.join(plain)})"
        )


def _has_residuals(problem: Problem) -> bool:
    """Whether its loss is half a sum of squares of what it can name."""
    return isinstance(problem, ResidualProblem) or (problem.likelihood == "gaussian" and problem.objective is None)


def _measures_layers(method: Method) -> bool:
    """Whether it reads more than gradients of the loss by the parameters."""
    read = method.curvature.records(method.needs) & ~Record.COUNT
    return bool(read) or bool(method.measures_at(None)) or Needs.PRODUCTS in method.asks
