"""Line searches: how far along one direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checking import require_fields
from ...errors import require_interval, require_positive_integer
from .protocol import LocalModel, Objective, SearchOutcome

__all__ = ["FullStep", "GridSearch", "HagerZhang", "StrongWolfe"]


class _OnALine:
    """Searches without a state along ``model.direction``."""

    needs_residuals = False

    def init(self) -> None:
        """No state."""
        return


@dataclass(frozen=True)
class FullStep(_OnALine):
    """The direction times a constant, unless the loss is not finite there.

    Args:
        length: > 0.
    """

    length: float = 1.0

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("length", self.length, 0.0, math.inf, closed="()")

    def run(self, state: None, objective: Objective, model: LocalModel, damping: float) -> SearchOutcome:
        """One evaluation."""
        step = self.length * model.direction(damping * model.scale)
        loss = objective.loss(step)
        if not math.isfinite(loss):
            return SearchOutcome(None, model.loss, 1)
        return SearchOutcome(step, loss, 1, numbers={"length": self.length})


@dataclass(frozen=True)
class GridSearch(_OnALine):
    """The best of a geometric grid of lengths: 1, 1/2, 1/4, ... as energy natural gradient descent takes its steps
    (Mueller and Zeinhofer, ICML 2023, arXiv:2302.13163).

    The grid is walked from the largest length, and left when the loss has risen twice after a length that was better
    than none. Good for directions without damping, along which the loss may be finite only near the start.

    Args:
        points: >= 1, of the grid; the shortest step is 2^(1 - points) of the direction.
        longest: > 0, the first length.
    """

    points: int = 31
    longest: float = 1.0

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("points", self.points)
        require_interval("longest", self.longest, 0.0, math.inf, closed="()")

    def run(self, state: None, objective: Objective, model: LocalModel, damping: float) -> SearchOutcome:
        """At most one evaluation per point."""
        direction = model.direction(damping * model.scale)
        best, chosen, rises, evaluations = model.loss, 0.0, 0, 0
        for point in range(self.points):
            length = self.longest * 2.0**-point
            loss = objective.loss(length * direction)
            evaluations += 1
            if loss < best:
                best, chosen, rises = loss, length, 0
            elif chosen:
                rises += 1
                if rises == 2:
                    break
        if not chosen:
            return SearchOutcome(None, model.loss, evaluations)
        return SearchOutcome(chosen * direction, best, evaluations, numbers={"length": chosen})


@dataclass(frozen=True)
class _Point:
    """A length that was tried."""

    length: float
    loss: float
    slope: float
    gradient: Tensor


class _Line:
    """The objective along one direction, with the number of evaluations."""

    def __init__(self, objective: Objective, direction: Tensor, model: LocalModel):
        self.objective, self.direction, self.evaluations = objective, direction, 0
        self.start = _Point(0.0, model.loss, float(model.gradient @ direction), model.gradient)

    def at(self, length: float) -> _Point:
        """Loss and slope there."""
        self.evaluations += 1
        loss, gradient = self.objective.loss_and_gradient(length * self.direction)
        return _Point(length, loss, float(gradient @ self.direction) if math.isfinite(loss) else math.nan, gradient)

    def outcome(self, point: _Point | None) -> SearchOutcome:
        """A step to a point, if there is one."""
        if point is None:
            return SearchOutcome(None, self.start.loss, self.evaluations)
        return SearchOutcome(
            point.length * self.direction, point.loss, self.evaluations, point.gradient, {"length": point.length}
        )


def _downhill(model: LocalModel, damping: float) -> Tensor:
    """The model's direction, or minus the gradient where that does not descend (a spoilt inverse)."""
    direction = model.direction(damping * model.scale)
    if bool(torch.isfinite(direction).all()) and float(model.gradient @ direction) < 0.0:
        return direction
    return -model.gradient


def _cubic_minimum(one: _Point, other: _Point) -> float:
    """Where the cubic through both losses and slopes is smallest, or the middle where there is no such place."""
    first = one.slope + other.slope - 3.0 * (one.loss - other.loss) / (one.length - other.length)
    square = first * first - one.slope * other.slope
    if not square >= 0.0:
        return 0.5 * (one.length + other.length)
    second = math.copysign(math.sqrt(square), other.length - one.length)
    below = other.slope - one.slope + 2.0 * second
    if below == 0.0:
        return 0.5 * (one.length + other.length)
    return other.length - (other.length - one.length) * (other.slope + second - first) / below


@dataclass(frozen=True)
class StrongWolfe(_OnALine):
    """A length with f(t) <= f(0) + c1 t f'(0) and |f'(t)| <= c2 |f'(0)|, by bracketing and cubic interpolation (Nocedal
    and Wright, Numerical Optimization, 2nd edition, algorithms 3.5 and 3.6).

    Where the decrease is below the rounding of f, differences of losses are noise: a point whose loss is equal to the
    start's within ``rounding`` is judged by its slope alone (Hager and Zhang's approximate condition), so that the
    search does not end one square root short of what the gradient can tell.

    Args:
        decrease: c1 in (0, 0.5).
        slope: c2 in (c1, 1).
        attempts: >= 1, evaluations in all.
        rounding: >= 0, of the loss, relative.
    """

    decrease: float = 1e-4
    slope: float = 0.9
    attempts: int = 40
    rounding: float = 1e-14

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("decrease", self.decrease, 0.0, 0.5, closed="()")
        require_interval("slope", self.slope, self.decrease, 1.0, closed="()")
        require_positive_integer("attempts", self.attempts)
        require_interval("rounding", self.rounding, 0.0, 1.0)

    def run(self, state: None, objective: Objective, model: LocalModel, damping: float) -> SearchOutcome:
        """At most ``attempts`` evaluations, each with its gradient."""
        line = _Line(objective, _downhill(model, damping), model)
        start = low = line.start
        high: _Point | None = None
        trial = 1.0
        while line.evaluations < self.attempts:
            point = line.at(trial)
            if self._ends(start, point):
                return line.outcome(point)
            rises = low is not start and point.loss >= low.loss and not self._rounds(low, point)
            if not math.isfinite(point.loss) or self._too_high(start, point) or rises:
                high = point
            else:
                ahead = 1.0 if high is None else high.length - point.length
                if point.slope * ahead >= 0.0:
                    high = low
                low = point
            trial = 2.0 * trial if high is None else _between(low, high)
            if trial > 1e10 or (high is not None and trial in (low.length, high.length)):
                break
        return line.outcome(low if low.loss < start.loss else None)

    def _too_high(self, start: _Point, point: _Point) -> bool:
        return point.loss > start.loss + self.decrease * point.length * start.slope and not self._rounds(start, point)

    def _rounds(self, one: _Point, other: _Point) -> bool:
        return abs(other.loss - one.loss) <= self.rounding * abs(one.loss)

    def _ends(self, start: _Point, point: _Point) -> bool:
        if not math.isfinite(point.loss) or self._too_high(start, point):
            return False
        return abs(point.slope) <= self.slope * abs(start.slope)


def _between(low: _Point, high: _Point) -> float:
    """A length inside of a bracket: the cubic's minimum, kept away from both ends."""
    width = high.length - low.length
    if not (math.isfinite(high.loss) and math.isfinite(high.slope)):
        return low.length + 0.1 * width
    found = _cubic_minimum(low, high)
    first, last = sorted((low.length + 0.1 * width, low.length + 0.9 * width))
    return min(max(found, first), last)


@dataclass(frozen=True)
class HagerZhang(_OnALine):
    """A length with the approximate Wolfe conditions (2 delta - 1) f'(0) >= f'(t) >= sigma f'(0) and
    f(t) <= f(0) + eps |f(0)| (Hager and Zhang, SIAM J. Optim. 16 (2005), section 4; ACM TOMS 32 (2006), algorithm 851).

    Judged by slopes, which keep their digits where differences of losses have lost theirs: good to the rounding of the
    gradient. Brackets are shrunk by the secant rule on both ends, by halves where it is slow.

    Args:
        delta: in (0, 0.5).
        sigma: in [delta, 1).
        rounding: >= 0, eps, of the loss, relative.
        attempts: >= 1, evaluations in all.
    """

    delta: float = 0.1
    sigma: float = 0.9
    rounding: float = 1e-10
    attempts: int = 50

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("delta", self.delta, 0.0, 0.5, closed="()")
        require_interval("sigma", self.sigma, self.delta, 1.0)
        require_interval("rounding", self.rounding, 0.0, 1.0)
        require_positive_integer("attempts", self.attempts)

    def run(self, state: None, objective: Objective, model: LocalModel, damping: float) -> SearchOutcome:
        """At most ``attempts`` evaluations, each with its gradient."""
        line = _Line(objective, _downhill(model, damping), model)
        ceiling = line.start.loss + self.rounding * abs(line.start.loss)
        accepts = self._acceptor(line.start, ceiling)
        low, high, trial = line.start, None, 1.0
        while line.evaluations < self.attempts:
            point = line.at(trial)
            if accepts(point):
                return line.outcome(point)
            if math.isfinite(point.loss) and point.loss <= ceiling and point.slope < 0.0:
                low = point
            else:
                high = point
            if high is None:
                trial = 5.0 * trial
                if trial > 1e10:
                    break
                continue
            trial = self._secant(low, high)
            if trial in (low.length, high.length):
                break
        best = low if low.length and low.loss < line.start.loss else None
        return line.outcome(best)

    def _acceptor(self, start: _Point, ceiling: float) -> Callable[[_Point], bool]:
        def accepts(point: _Point) -> bool:
            if not math.isfinite(point.loss) or point.slope < self.sigma * start.slope:
                return False
            wolfe = point.loss <= start.loss + self.delta * point.length * start.slope
            approximate = point.slope <= (2.0 * self.delta - 1.0) * start.slope and point.loss <= ceiling
            return wolfe or approximate

        return accepts

    def _secant(self, low: _Point, high: _Point) -> float:
        """Where the line through both slopes is zero; the middle where the far end lies high with a falling slope."""
        width = high.length - low.length
        if not math.isfinite(high.loss):
            return low.length + 0.1 * width
        if high.slope <= 0.0:
            return low.length + 0.5 * width
        found = (low.length * high.slope - high.length * low.slope) / (high.slope - low.slope)
        return min(max(found, low.length + 0.05 * width), high.length - 0.05 * width)
