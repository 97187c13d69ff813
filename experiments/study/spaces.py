"""Search spaces: which values a setting may take, and the points at which an arm is tried.

All points of an arm are decided before its first run and depend on the space, the number of trials and a seed alone:
neither the number of workers nor the order in which runs end changes what is tried.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import ArgumentError, UnknownNameError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["SAMPLERS", "Choice", "Grid", "LogUniform", "Range", "Uniform", "distributions", "grid_size", "points"]

SAMPLERS = ("quasi-random", "random")


@dataclass(frozen=True)
class _Interval:
    """Numbers between ``low`` and ``high``."""

    kind: ClassVar[str]
    lowest: ClassVar[float]
    low: float
    high: float

    def __post_init__(self) -> None:
        for value in (self.low, self.high):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ArgumentError(f"{self.kind} takes two finite numbers, got {value!r}")
        if not self.lowest < self.low < self.high:
            rule = "low < high" if math.isinf(self.lowest) else f"{self.lowest:g} < low < high"
            raise ArgumentError(f"{self.kind} needs {rule}, got [{self.low}, {self.high}]")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a study file has them."""
        return {self.kind: [self.low, self.high]}

    def distribution(self) -> BaseDistribution:
        """Return the range as Optuna has it."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(float(self.low), float(self.high), log=self.kind == "log")


class Uniform(_Interval):
    """Numbers between ``low`` and ``high``, both finite, ``low < high``."""

    kind, lowest = "uniform", -math.inf


class LogUniform(_Interval):
    """Numbers between ``low`` and ``high`` whose logarithm is uniform, 0 < ``low < high``."""

    kind, lowest = "log", 0.0


@dataclass(frozen=True)
class _Listed:
    """One of several numbers or texts."""

    kind: ClassVar[str]
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ArgumentError(f"{self.kind} needs at least one value")
        for value in self.values:
            if not isinstance(value, bool | int | float | str):
                raise ArgumentError(f"{self.kind} takes numbers and texts, got {value!r}")
        if len(set(self.values)) < len(self.values):
            raise ArgumentError(f"{self.kind} has a value twice: {list(self.values)}")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a study file has them."""
        return {self.kind: list(self.values)}

    def distribution(self) -> BaseDistribution:
        """Return the range as Optuna has it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


class Choice(_Listed):
    """One of several numbers or texts, drawn like a number."""

    kind = "choice"


class Grid(_Listed):
    """One of several numbers or texts; where a space has nothing but grids, their whole product is the space."""

    kind = "grid"


Range = Uniform | LogUniform | Choice | Grid


def grid_size(space: Mapping[str, Range]) -> int | None:
    """Return the number of points of a space that has nothing but grids; ``None`` for any other."""
    if not space or not all(isinstance(entry, Grid) for entry in space.values()):
        return None
    return math.prod(len(entry.values) for entry in space.values() if isinstance(entry, Grid))


def distributions(space: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """Return the space as Optuna has it."""
    return {name: entry.distribution() for name, entry in space.items()}


def points(
    space: Mapping[str, Range], trials: int, sampler: str = "quasi-random", seed: int = 0
) -> list[dict[str, Any]]:
    """Return the settings that are tried, in this order.

    A space of grids gives the points of their product in an order drawn by ``seed`` (Optuna's grid sampler); fewer
    trials than points take the first of them. Any other space gives a scrambled Sobol sequence (Optuna's quasi-random
    sampler) or independent draws. More trials continue the same sequence.

    Args:
        space: ranges by name; an empty one has no points.
        trials: how many at most, >= 0.
        sampler: ``quasi-random`` or ``random``; grids take neither.
        seed: of the sequence, >= 0.

    Raises:
        UnknownNameError: there is no such sampler.
    """
    import optuna

    if sampler not in SAMPLERS:
        raise UnknownNameError("sampler", sampler, SAMPLERS)
    if not space or trials < 1:
        return []
    grids = {name: list(entry.values) for name, entry in space.items() if isinstance(entry, Grid)}
    ranges, found = distributions(space), list[dict[str, Any]]()
    drawing: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Sobol's balance, which holds at powers of two only
        if len(grids) == len(space):
            drawing = optuna.samplers.GridSampler(grids, seed)
        elif sampler == "quasi-random":
            drawing = optuna.samplers.QMCSampler(scramble=True, seed=seed)
        study = optuna.create_study(sampler=drawing)
        for _ in range(min(trials, grid_size(space) or trials)):
            if isinstance(drawing, optuna.samplers.QMCSampler):
                # Asked directly, else its first point is no Sobol point; it does not look at the trial.
                found.append(drawing.sample_relative(study, optuna.trial.create_trial(value=0.0), ranges))
            else:
                found.append(study.ask(ranges).params)
    optuna.logging.set_verbosity(verbosity)
    return found
