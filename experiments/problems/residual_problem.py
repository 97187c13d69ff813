"""A problem whose loss is that of residuals: equations that a network is to satisfy at points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...curvature.residuals.residual import Residual, ResidualClosure, read_residuals, total_loss
from .problem import Problem

__all__ = ["Equation", "Layout", "Redrawn", "ResidualProblem"]

Equation = Callable[[nn.Module, Tensor], Tensor]
"""Residuals (N, components) of a network at points (N, d), with derivatives of the network or without."""

Layout = Callable[[torch.Generator], Tensor]
"""Draws all points (N, d), those of the first equation first, by a generator on the CPU."""


@dataclass(frozen=True)
class Redrawn:
    """All points drawn anew, in the place of an augmentation.

    Args:
        layout: draws them.
    """

    layout: Layout

    def __str__(self) -> str:
        """In words."""
        return "all points are drawn anew at every step"

    def __call__(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Return other points of the same equations, in the same order."""
        return self.layout(generator).to(points)


@dataclass(frozen=True, kw_only=True)
class ResidualProblem(Problem):
    """Equations at points, and a solution that is known.

    The training inputs are points (N, d), and the training targets say which equation holds at each, (N,) numbers of
    ``equations`` in their order. The loss is the sum over equations of half the mean square of their residuals. The
    test inputs are points at which the solution is known, the test targets its values (M, 1); the test loss is half the
    mean squared error against it.

    Args:
        equations: by name. An equation that no point of a mini-batch belongs to is left out of it.
    """

    equations: Mapping[str, Equation]

    def residuals(self, model: nn.Module, points: Tensor, kinds: Tensor) -> ResidualClosure:
        """Return the closure that evaluates the residuals at points, by the names of the equations.

        Args:
            model: the network.
            points: (N, d), N >= 1.
            kinds: (N,) numbers of equations.
        """
        chosen = {name: points[kinds == number] for number, name in enumerate(self.equations)}
        held = {name: part for name, part in chosen.items() if len(part)}
        return lambda: {name: Residual(self.equations[name](model, part)) for name, part in held.items()}

    def training_loss(self, model: nn.Module, points: Tensor, kinds: Tensor) -> Tensor:
        """Return the loss at points, with its graph, shape ()."""
        return total_loss(read_residuals(self.residuals(model, points, kinds)()))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Half the mean squared error against the solution, shape ()."""
        return 0.5 * (output - target).square().sum() / len(output)
