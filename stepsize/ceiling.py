"""A guard with a memory of the loss: many small rises cannot add up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..checking import require_fields
from ..curvature.records.needs import Needs
from ..errors import require_interval, require_positive_integer
from .guard import Trial

__all__ = ["Ceiling", "LowestMean"]


@dataclass
class LowestMean:
    """A weighted mean of the losses before accepted steps, its weight, and the lowest that it has been."""

    value: float = 0.0
    weight: float = 0.0
    lowest: float = math.inf

    def to_dict(self) -> dict[str, float]:
        """The three numbers."""
        return {"value": self.value, "weight": self.weight, "lowest": self.lowest}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take them."""
        self.value, self.weight = float(values["value"]), float(values["weight"])
        self.lowest = float(values["lowest"])


@dataclass(frozen=True)
class Ceiling:
    """Shorten the step while it lifts the loss of its own mini-batch above a ceiling. Ours.

    :class:`.Backtrack` compares a step with the loss before it, so a learning rate that is too large may lift the loss
    by the factor ``growth`` at every step, without end. Here a step that lifts the loss is compared with

        min(f(theta), lowest mean so far) * growth

    where the means are those of Zhang and Hager (SIAM J. Optim. 14 (2004), Algorithm 1.1), Q <- eta Q + 1,
    C <- C + (f - C) / Q, over the losses before the steps that stayed. A step that lifts nothing always stays, so a
    mini-batch on which the loss is higher than on others is compared with itself. In full-batch mode the loss never
    rises above ``growth`` times the lowest mean, over any number of steps; no slope is needed, as it is for
    :class:`.Nonmonotone`. One comparison per step, which synchronises with the device; one lean pass per shortening.

    Args:
        growth: > 1; ``inf`` only refuses a loss that is not finite.
        memory: eta in [0, 1); 0: no mean, the lowest loss of a mini-batch (better than 0.9 in 8 of 12 trials).
        shrink: in (0, 1), factor on the step per attempt.
        attempts: >= 1; after that many the step is taken back whole.
    """

    growth: float = 1.1
    memory: float = 0.0
    shrink: float = 0.5
    attempts: int = 8
    needs = Needs.NOTHING

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("growth", self.growth, 1.0, math.inf, closed="(]")
        require_interval("memory", self.memory, 0.0, 1.0)
        require_interval("shrink", self.shrink, 0.0, 1.0, closed="()")
        require_positive_integer("attempts", self.attempts)

    def init(self) -> LowestMean:
        """Nothing seen."""
        return LowestMean()

    def accepts(self, state: LowestMean, trial: Trial) -> bool:
        """Finite, and not lifted above the ceiling; a level <= 0 has no meaningful ratio and lifts are let pass."""
        if not math.isfinite(trial.after):
            return False
        level = min(trial.before, state.lowest)
        return trial.after <= trial.before or level <= 0.0 or trial.after <= self.growth * level

    def record(self, state: LowestMean, trial: Trial) -> None:
        """Average the loss before a step that stays."""
        state.weight = self.memory * state.weight + 1.0
        state.value += (trial.before - state.value) / state.weight
        state.lowest = min(state.lowest, state.value)
