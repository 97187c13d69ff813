"""Monitors: inequalities that are examined while an optimizer runs, in any loop.

A monitor is a frozen dataclass with one verb, ``examine``; it reads one step and returns readings. Which of them are
theorems and which are rules of thumb is said in each docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ...curvature.declarations import FactorDeclarations, PairDampingDeclarations, declared
from ...errors import require_interval
from ...framework.optimizer.blocks import Block, full_precision
from ...framework.optimizer.report import StepReport
from ..theorem import Inequality
from .readings import Reading
from .updates import Update

__all__ = ["Descent", "Moment", "Monitor", "PairCurvature", "RelativeStep", "SecantEquation", "StepSizeCurvature"]


@dataclass(frozen=True)
class Moment:
    """One step, as monitors see it.

    Attributes:
        report: of the step.
        blocks: of the optimizer, after the step.
        origin: parameters before the step by block key; empty unless a monitor declares ``reads_moves``.
        find_updates: computes the quasi-Newton updates of the step; called at most once.
    """

    report: StepReport
    blocks: tuple[Block, ...]
    origin: Mapping[str, tuple[Tensor, ...]]
    find_updates: Callable[[], list[Update]]

    @cached_property
    def updates(self) -> list[Update]:
        """Every quasi-Newton update of the step."""
        return self.find_updates()

    def moves(self, block: Block) -> list[Tensor]:
        """How far the parameters of a block went, whatever took them there."""
        pairs = zip(block.parameters, self.origin[block.key], strict=True)
        return [full_precision(new.detach()) - full_precision(old) for new, old in pairs]

    def slope(self) -> float | None:
        """Change of the data loss to first order along the whole move; ``None`` where a gradient is missing."""
        total = 0.0
        for block in self.blocks:
            gradients = [parameter.grad for parameter in block.parameters]
            for move, gradient in zip(self.moves(block), gradients, strict=True):
                if gradient is not None:
                    total += float(torch.sum(move.double() * gradient.double()))
                elif bool(move.any()):
                    return None
        return total


class Monitor(Protocol):
    """What :func:`osculate.analysis.watch` takes.

    ``reads_moves = True`` asks for a copy of the parameters before every examined step; ``reads_updates = True`` for
    copies of the quasi-Newton states.
    """

    def examine(self, moment: Moment) -> Iterator[Reading]:
        """Readings of one step; none where the monitor does not apply."""


@dataclass(frozen=True)
class SecantEquation:
    """H+ y = s for every pair that was used: the definition of a quasi-Newton update.

    Measured as |H+ y - s| / (|H+|_F |y| + |s|), its backward error.

    Args:
        tolerance: largest error, in (0, 1); ``None``: the root of the unit of rounding (3e-4 in float32).
    """

    tolerance: float | None = None
    reads_updates = True

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            require_interval("tolerance", self.tolerance, 0.0, 1.0, closed="()")

    def examine(self, moment: Moment) -> Iterator[Reading]:
        """One reading per update."""
        for update in moment.updates:
            if not update.accepted:
                continue
            residual = torch.linalg.vector_norm(update.after @ update.change - update.step)
            scale = torch.linalg.matrix_norm(update.after) * torch.linalg.vector_norm(update.change)
            error = float(residual / (scale + torch.linalg.vector_norm(update.step)))
            bound = update.epsilon**0.5 if self.tolerance is None else self.tolerance
            yield _reading(moment, self, update.place, "|H+ y - s| relative", error, bound)


@dataclass(frozen=True)
class PairCurvature:
    """s'y >= c s's for every pair that was used, with the c that the damping of the pair promises (PAPERS 1.4, D2).

    Args:
        floor: another c >= 0; ``None``: what the rule promises through ``curvature_floor``, and 0 for a rule without
            one. With ``floor`` one sees what *another* rule would have had to correct.
    """

    floor: float | None = None
    reads_updates = True

    def __post_init__(self) -> None:
        if self.floor is not None:
            require_interval("floor", self.floor, 0.0, float("inf"), closed="[)")

    def examine(self, moment: Moment) -> Iterator[Reading]:
        """One reading per update."""
        for update in moment.updates:
            if not update.accepted:
                continue
            bound = self._bound(update)
            square = float(torch.dot(update.step, update.step))
            curvature = float(torch.dot(update.step, update.change)) / square if square else float("nan")
            lengths = torch.linalg.vector_norm(update.step) * torch.linalg.vector_norm(update.change)
            rounding = 64.0 * update.epsilon * float(lengths) / square if square else 0.0
            tolerance = 1e-9 + (rounding / bound if bound else rounding)
            yield _reading(moment, self, update.place, "s'y / s's >= c", curvature, bound, ">=", tolerance)

    def _bound(self, update: Update) -> float:
        if self.floor is not None:
            return self.floor
        pairs = declared(update.factor, FactorDeclarations).pairs
        promise = None if pairs is None else declared(pairs, PairDampingDeclarations).curvature_floor
        if promise is not None:
            return float(promise(update.damping))
        # y = (A + damping I) s with A semi-definite
        return update.damping if update.second_moment is not None else 0.0


@dataclass(frozen=True)
class Descent:
    """The step goes downhill, and the loss of its own mini-batch has not grown by more than a factor.

    No theorem for methods with momentum: the direction then answers to earlier mini-batches too. The loss is known only
    for methods that look back.

    Args:
        growth: largest loss after the step relative to that before it, > 0. For losses > 0.
    """

    growth: float = 1.0
    reads_moves = True

    def __post_init__(self) -> None:
        require_interval("growth", self.growth, 0.0, float("inf"), closed="()")

    def examine(self, moment: Moment) -> Iterator[Reading]:
        """Two readings."""
        slope = moment.slope()
        if slope is not None:
            yield _reading(moment, self, "", "slope along the step <= 0", slope, 0.0)
        report = moment.report
        if report.loss is not None and report.loss_after is not None:
            bound, tolerance = self.growth * float(report.loss), 8.0 * _epsilon(report.loss)
            yield _reading(moment, self, "", "loss after the step", float(report.loss_after), bound, "<=", tolerance)


@dataclass(frozen=True)
class StepSizeCurvature:
    """The step is not too long for the curvature along it: p'Hp <= limit (-g'p).

    p'Hp is the second difference 2 (f(theta + p) - f(theta) - g'p) on the same mini-batch, so it is known only for
    methods that look back, and holds the mean curvature along the step. The ratio is 1 for an exact line search on a
    quadratic and 2 where the loss comes out as high as it was: a run whose ratio stays above 2 diverges.

    Args:
        limit: > 0.
    """

    limit: float = 2.0
    reads_moves = True

    def __post_init__(self) -> None:
        require_interval("limit", self.limit, 0.0, float("inf"), closed="()")

    def examine(self, moment: Moment) -> Iterator[Reading]:
        """One reading, where the step goes downhill at all."""
        report, slope = moment.report, moment.slope()
        if slope is None or not slope < 0.0 or report.loss is None or report.loss_after is None:
            return
        curvature = 2.0 * (float(report.loss_after) - float(report.loss) - slope)
        rounding = 16.0 * _epsilon(report.loss) * abs(float(report.loss)) / -slope
        ratio, tolerance = curvature / -slope, 1e-9 + rounding / self.limit
        yield _reading(moment, self, "", "p'Hp / -g'p", ratio, self.limit, "<=", tolerance)


@dataclass(frozen=True)
class RelativeStep:
    """No step moves a layer by more than a share of its norm. A rule of thumb, for every method.

    Args:
        limit: largest |p_l| / |theta_l|, > 0.
    """

    limit: float = 0.5
    reads_moves = True

    def __post_init__(self) -> None:
        require_interval("limit", self.limit, 0.0, float("inf"), closed="()")

    def examine(self, moment: Moment) -> Iterator[Reading]:
        """One reading per block that is not zero before the step."""
        for block in moment.blocks:
            before = _norm(full_precision(value) for value in moment.origin[block.key])
            if before > 0.0:
                share = _norm(moment.moves(block)) / before
                yield _reading(moment, self, block.key, "|p| / |theta|", share, self.limit)


def _norm(values: Iterator[Tensor] | list[Tensor]) -> float:
    return float(torch.stack([value.double().square().sum() for value in values]).sum().sqrt())


def _epsilon(loss: Tensor | float) -> float:
    """Unit of rounding of a loss."""
    return torch.finfo(loss.dtype).eps if isinstance(loss, Tensor) else torch.finfo(torch.float64).eps


def _reading(
    moment: Moment,
    monitor: object,
    layer: str,
    name: str,
    measured: float,
    bound: float,
    direction: str = "<=",
    tolerance: float = 1e-9,
) -> Reading:
    entry = Inequality(name, measured, bound, ">=" if direction == ">=" else "<=", tolerance=tolerance)
    return Reading(moment.report.step, type(monitor).__name__, layer, entry)
