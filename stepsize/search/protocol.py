"""What a search sees of the problem: an objective along steps from where the parameters are, and a model of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

__all__ = ["LocalModel", "Objective", "Search", "SearchOutcome"]


class Objective(Protocol):
    """The loss of one mini-batch as a function of a step (P,) from where the parameters are.

    Every call evaluates the user's closure once.
    """

    def loss(self, step: Tensor) -> float:
        """The loss after a step; infinity where it is not finite."""

    def residuals(self, step: Tensor) -> Tensor:
        """(V,) residuals after a step; entries need not be finite."""

    def loss_and_gradient(self, step: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient (P,) after a step; infinity and zeros where they are not finite."""


class LocalModel(Protocol):
    """What is known at the present point."""

    loss: float
    gradient: Tensor
    """(P,) of the loss."""
    scale: float
    """What damping is measured in: the largest eigenvalue of the curvature; 1 where none is damped."""

    def direction(self, damping: float) -> Tensor:
        """The step (P,) that minimises the model with this damping (in units of the curvature)."""

    def predicted(self, step: Tensor) -> float:
        """By how much the undamped model falls along a step, > 0 where it falls."""

    def correction(self, second: Tensor, damping: float) -> Tensor:
        """The step (P,) that cancels residuals of ``second`` (V,), to first order."""

    def change(self, step: Tensor) -> Tensor:
        """(V,) change of the residuals along a step, to first order."""

    @property
    def residuals(self) -> Tensor:
        """(V,) residuals here."""


@dataclass(frozen=True)
class SearchOutcome:
    """What a search has found.

    Attributes:
        step: (P,) to be taken; ``None``: none lowers the loss, the parameters stay.
        loss: after it, or the present one.
        evaluations: calls of the objective.
        gradient: (P,) of the loss after it, where the search has it.
        numbers: for the report: damping, gain ratio, length, ...
    """

    step: Tensor | None
    loss: float
    evaluations: int
    gradient: Tensor | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


class Search(Protocol):
    """A rule for how far to go.

    A state has ``to_dict()`` (numbers and tensors) and ``load_dict(values)``; ``None`` for rules that keep nothing.
    """

    needs_residuals: bool
    """Whether it works for sums over residuals only."""

    def init(self) -> Any:
        """Fresh state."""

    def run(self, state: Any, objective: Objective, model: LocalModel, damping: float) -> SearchOutcome:
        """A step from here.

        Args:
            state: its own, changed in place.
            objective: of the mini-batch.
            model: of the objective.
            damping: of the parameter group, relative to ``model.scale``: where a rule of its own begins, and what all
                others use.
        """
