"""Guards: accept or shorten a step after looking back at the same mini-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from ..checking import require_fields
from ..curvature.records.needs import Needs
from ..errors import require_interval, require_positive_integer

__all__ = ["Armijo", "Backtrack", "Guard", "Level", "NoGuard", "Nonmonotone", "Trial"]


@dataclass(frozen=True)
class Trial:
    """A step that was tried.

    Attributes:
        before: objective before the step: the mini-batch loss; for guards that ask for slopes with the penalty of
            coupled weight decay, which the step descends too.
        after: the same after it.
        slope: change of the objective to first order for the whole proposed step, < 0 where it descends; ``None``
            unless the guard's needs contain ``Needs.SLOPES``.
        fraction: t in (0, 1], the fraction of the proposed step that was tried.
    """

    before: float
    after: float
    slope: float | None = None
    fraction: float = 1.0


class Guard(Protocol):
    """Decides from the mini-batch loss before and after the step.

    A step that is refused is taken back to the fraction ``shrink`` of itself and tried again, up to ``attempts`` times;
    then it is dropped whole. ``accepts`` is asked once per trial, ``record`` is told of the trial that stays, and of
    that one alone. All six names must be there, also where a guard keeps no state and asks for no slopes:

        attempts, shrink, needs = 5, 0.5, Needs.NOTHING
        def init(self): return None
        def accepts(self, state, trial): return trial.after < trial.before
        def record(self, state, trial): pass

    A loss that is not finite must be refused, one below an accepted one accepted.
    """

    @property
    def attempts(self) -> int:
        """How often a step may be shortened; 0 switches the look-back for the guard off."""

    @property
    def shrink(self) -> float:
        """Factor on the step per attempt."""

    @property
    def needs(self) -> Needs:
        """``Needs.SLOPES`` for guards that judge by the slope, else ``NOTHING``."""

    def init(self) -> Any:
        """Fresh state, or ``None`` for guards that judge every step for itself.

        A state has ``to_dict()``, whose values are numbers and tensors, and ``load_dict(values)``: it is saved and
        loaded with the optimizer. Guards stand above the layers and work on plain numbers, so there is no ``like``.
        """

    def accepts(self, state: Any, trial: Trial) -> bool:
        """Whether the step stays. Does not change the state: the same trial has the same verdict twice."""

    def record(self, state: Any, trial: Trial) -> None:
        """Take a step that stays into the state."""


class _Stateless:
    """Guards that judge every step for itself."""

    needs = Needs.NOTHING

    def init(self) -> None:
        """No state."""
        return

    def record(self, state: None, trial: Trial) -> None:
        """Nothing."""


@dataclass(frozen=True)
class NoGuard(_Stateless):
    """Every step stays."""

    attempts = 0
    shrink = 1.0

    def accepts(self, state: None, trial: Trial) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class Backtrack(_Stateless):
    """Shorten the step while the loss of its own mini-batch rises beyond a factor.

    Quasi-Newton pairs of one layer say nothing about the other layers, so layers that move together can overshoot
    together although every single H is tame; the mini-batch loss, which the look-back measures anyway, is the first
    quantity that shows it. One comparison per step, which synchronises with the device; one lean pass per shortening.

    Args:
        growth: > 1; a step is shortened when loss after > growth * loss before, or when the loss is not finite.
        shrink: in (0, 1), factor on the step per attempt.
        attempts: >= 1; after that many the step is taken back whole.
    """

    growth: float = 1.1
    shrink: float = 0.5
    attempts: int = 8

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("growth", self.growth, 1.0, math.inf, closed="(]")
        require_interval("shrink", self.shrink, 0.0, 1.0, closed="()")
        require_positive_integer("attempts", self.attempts)

    def accepts(self, state: None, trial: Trial) -> bool:
        """Finite and not above the factor; a loss <= 0 has no meaningful ratio and only needs to be finite."""
        return math.isfinite(trial.after) and (trial.before <= 0.0 or trial.after <= self.growth * trial.before)


@dataclass(frozen=True)
class Armijo(_Stateless):
    """Sufficient decrease: f(theta + t delta) <= f(theta) + c t <grad f, delta> (Armijo 1966; Nocedal and Wright, 3.4).

    f is the mini-batch loss with the penalty of coupled weight decay, delta the proposed step of all layers together. A
    step whose slope is not negative (momentum against the gradient of this mini-batch, a direction of negative
    curvature) has no sufficient decrease: it stays only if f does not rise. So f never rises on its own mini-batch.
    One comparison per step, which synchronises with the device; one lean pass per shortening.

    Args:
        c: in (0, 1), the part of the predicted decrease that must be seen.
        shrink: in (0, 1), factor on the step per attempt.
        attempts: >= 1; after that many the step is taken back whole.
    """

    c: float = 1e-4
    shrink: float = 0.5
    attempts: int = 10
    needs = Needs.SLOPES

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("c of a sufficient-decrease test", self.c, 0.0, 1.0, closed="()")
        require_interval("shrink", self.shrink, 0.0, 1.0, closed="()")
        require_positive_integer("attempts", self.attempts)

    def accepts(self, state: None, trial: Trial) -> bool:
        """The condition, with a slope above zero counted as zero."""
        return _decreases(trial, trial.before, self.c)


@dataclass
class Level:
    """The level that a non-monotone guard compares with: a weighted mean of accepted objectives, and its weight."""

    value: float = 0.0
    weight: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Both numbers."""
        return {"value": self.value, "weight": self.weight}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take them."""
        self.value, self.weight = float(values["value"]), float(values["weight"])


@dataclass(frozen=True)
class Nonmonotone:
    """Sufficient decrease against a mean of past objectives.

    f(theta + t delta) <= max(C, f(theta)) + c t <grad f, delta>, with f and delta as for ``Armijo``. C is the mean of
    Zhang and Hager (SIAM J. Optim. 14 (2004), Algorithm 1.1): Q <- eta Q + 1, C <- C + (f - C) / Q with the accepted f,
    from C = f of the first step, Q = 1. In full-batch mode C >= f(theta) always, and this is their rule. Between
    mini-batches f jumps for reasons that no step answers for, so a mini-batch on which f lies above C is compared with
    itself (ours). Slopes that are not negative count as zero, as for ``Armijo``.

    Args:
        memory: eta in [0, 1); 0 is ``Armijo``.
        c: in (0, 1), as for ``Armijo``.
        shrink: in (0, 1), factor on the step per attempt.
        attempts: >= 1; after that many the step is taken back whole.
    """

    memory: float = 0.85
    c: float = 1e-4
    shrink: float = 0.5
    attempts: int = 10
    needs = Needs.SLOPES

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("memory", self.memory, 0.0, 1.0)
        require_interval("c of a sufficient-decrease test", self.c, 0.0, 1.0, closed="()")
        require_interval("shrink", self.shrink, 0.0, 1.0, closed="()")
        require_positive_integer("attempts", self.attempts)

    def init(self) -> Level:
        """Nothing seen."""
        return Level()

    def accepts(self, state: Level, trial: Trial) -> bool:
        """The condition."""
        level = max(state.value, trial.before) if state.weight else trial.before
        return _decreases(trial, level, self.c)

    def record(self, state: Level, trial: Trial) -> None:
        """Average the objective of a step that stays."""
        if not state.weight:
            state.value, state.weight = trial.before, 1.0
        state.weight = self.memory * state.weight + 1.0
        state.value += (trial.after - state.value) / state.weight


def _decreases(trial: Trial, level: float, c: float) -> bool:
    """Whether ``after`` is finite and lies below a level by c times the decrease to first order."""
    assert trial.slope is not None
    if not (math.isfinite(trial.after) and math.isfinite(trial.slope)):
        return False
    return trial.after <= level + c * trial.fraction * min(trial.slope, 0.0)
