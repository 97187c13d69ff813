"""Levenberg and Marquardt's search: damping is the length of the step, and follows how well the model predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ...checking import require_fields
from ...errors import require_interval, require_positive_integer
from .protocol import LocalModel, Objective, SearchOutcome

__all__ = ["Bend", "Geodesic", "LevenbergMarquardtSearch", "Straight"]


class Bend(Protocol):
    """How a step follows the curvature of the residuals."""

    def bend(self, step: Tensor, objective: Objective, model: LocalModel, damping: float) -> tuple[Tensor, float, int]:
        """The bent step, how large the bend is relative to the step, and evaluations made."""

    @property
    def limit(self) -> float:
        """The largest bend that a step may have."""


@dataclass(frozen=True)
class Straight:
    """Steps are straight."""

    limit = math.inf

    def bend(self, step: Tensor, objective: Objective, model: LocalModel, damping: float) -> tuple[Tensor, float, int]:
        """As it is."""
        return step, 0.0, 0


@dataclass(frozen=True)
class Geodesic:
    """The step v and half of its geodesic acceleration a: theta + v + a / 2 (Transtrum, Machta and Sethna,
    arXiv:1010.1449; Transtrum and Sethna, arXiv:1201.5885, section 5).

    (A'A + lambda I) a = -A' r'', with r'' the second derivative of the residuals along v, by one evaluation of them at
    theta + probe v. The valleys of networks are narrow and bent: straight steps along them are short, and on the
    Poisson equation of ``poisson-2d`` they need some thirty times as many.

    Args:
        limit: > 0, the largest 2 |a| / |v| that is trusted; more asks for more damping. Theirs: 0.75.
        probe: in (0, 1), where r'' is measured. Theirs: 0.1.
    """

    limit: float = 0.75
    probe: float = 0.1

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("limit", self.limit, 0.0, math.inf, closed="(]")
        require_interval("probe", self.probe, 0.0, 1.0, closed="()")

    def bend(self, step: Tensor, objective: Objective, model: LocalModel, damping: float) -> tuple[Tensor, float, int]:
        """One evaluation of the residuals and one solve."""
        there = objective.residuals(self.probe * step)
        second = (2.0 / self.probe) * ((there - model.residuals) / self.probe - model.change(step))
        acceleration = model.correction(second, damping)
        size = float(2.0 * acceleration.norm() / step.norm().clamp(min=1e-300))
        return step + 0.5 * acceleration, size, 1


@dataclass
class DampingState:
    """lambda relative to the curvature's scale; ``None`` before the first step."""

    damping: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The number."""
        return {"damping": self.damping}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take it."""
        self.damping = None if values["damping"] is None else float(values["damping"])


@dataclass(frozen=True)
class LevenbergMarquardtSearch:
    """Solve with a damping, try, and judge by rho = actual / predicted decrease (Levenberg 1944, Marquardt 1963).

    A step that does not lower the loss, or bends too much, is tried again with ``raised`` times the damping, for a
    solve and an evaluation each. One that predicts well lets the next begin with ``lowered`` times the damping.

    Args:
        bend: whether steps follow the curvature of the residuals.
        raised: > 1.
        lowered: in (0, 1).
        good: in (0, 1): rho from which on damping falls. Below ``fair`` it rises.
        fair: in [0, good].
        attempts: >= 1, after that many the parameters stay where they are: at the rounding of the loss.
        smallest: > 0, of the damping relative to the largest eigenvalue; below the square of the rounding unit it would
            do nothing.
    """

    bend: Bend = field(default_factory=Geodesic)
    raised: float = 2.0
    lowered: float = 0.2
    good: float = 0.6
    fair: float = 0.2
    attempts: int = 40
    smallest: float = 1e-30
    needs_residuals = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("raised", self.raised, 1.0, math.inf, closed="()")
        require_interval("lowered", self.lowered, 0.0, 1.0, closed="()")
        require_interval("good", self.good, 0.0, 1.0, closed="()")
        require_interval("fair", self.fair, 0.0, self.good, closed="[]")
        require_positive_integer("attempts", self.attempts)
        require_interval("smallest", self.smallest, 0.0, 1.0, closed="()")

    def init(self) -> DampingState:
        """Damping is that of the parameter group."""
        return DampingState()

    def run(self, state: DampingState, objective: Objective, model: LocalModel, damping: float) -> SearchOutcome:
        """Try dampings until one lowers the loss."""
        relative = damping if state.damping is None else state.damping
        evaluations, ratio = 0, math.nan
        for _ in range(self.attempts):
            absolute = relative * model.scale
            straight = model.direction(absolute)
            step, size, extra = self.bend.bend(straight, objective, model, absolute)
            evaluations += extra
            if math.isfinite(size) and size <= self.bend.limit:
                evaluations += 1
                loss, predicted = objective.loss(step), model.predicted(straight)
                ratio = (model.loss - loss) / predicted if predicted > 0.0 else -math.inf
                if loss < model.loss:
                    factor = self.lowered if ratio > self.good else 1.0 if ratio >= self.fair else self.raised
                    state.damping = max(relative * factor, self.smallest)
                    return SearchOutcome(step, loss, evaluations, numbers={"damping": absolute, "gain": ratio})
                relative *= self.raised
            else:
                relative *= self.raised if size < 2.0 * self.bend.limit else self.raised**2
        state.damping = None  # other data, or a loss at its rounding: begin anew
        return SearchOutcome(None, model.loss, evaluations, numbers={"damping": relative * model.scale, "gain": ratio})
