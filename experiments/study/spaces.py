"""Search spaces: which values a setting may take, and the points at which an arm is tried.

All points of an arm are decided before its first run and depend on the space, the number of trials and a seed alone:
neither the number of workers nor the order in which runs end changes what is tried.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, UnknownNameError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

__all__ = ["SAMPLERS", "Choice", "Grid", "LogUniform", "Range", "Uniform", "distributions", "grid_size", "points"]

SAMPLERS = ("quasi-random", "random")


@dataclass(frozen=True)
class Uniform:
    """Numbers between ``low`` and ``high``, both finite, ``low < high``."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_numbers("uniform", (self.low, self.high))
        if not self.low < self.high:
            raise ArgumentError(f"uniform needs low < high, got [{self.low}, {self.high}]")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a study file has them."""
        return {"uniform": [self.low, self.high]}


@dataclass(frozen=True)
class LogUniform:
    """Numbers between ``low`` and ``high`` whose logarithm is uniform, 0 < ``low < high``."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_numbers("log", (self.low, self.high))
        if not 0 < self.low < self.high:
            raise ArgumentError(f"log needs 0 < low < high, got [{self.low}, {self.high}]")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a study file has them."""
        return {"log": [self.low, self.high]}


@dataclass(frozen=True)
class Choice:
    """One of several numbers or texts, drawn like a number."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        _require_values("choice", self.values)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a study file has them."""
        return {"choice": list(self.values)}


@dataclass(frozen=True)
class Grid:
    """One of several numbers or texts; where a space has nothing but grids, their whole product is the space."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        _require_values("grid", self.values)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a study file has them."""
        return {"grid": list(self.values)}


Range = Uniform | LogUniform | Choice | Grid


def _require_numbers(name: str, values: Sequence[object]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ArgumentError(f"{name} takes two finite numbers, got {value!r}")


def _require_values(name: str, values: Sequence[object]) -> None:
    if not values:
        raise ArgumentError(f"{name} needs at least one value")
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise ArgumentError(f"{name} takes numbers and texts, got {value!r}")
    if len(set(values)) < len(values):
        raise ArgumentError(f"{name} has a value twice: {list(values)}")


def grid_size(space: Mapping[str, Range]) -> int | None:
    """Return the number of points of a space that has nothing but grids; ``None`` for any other."""
    if not space or not all(isinstance(entry, Grid) for entry in space.values()):
        return None
    return math.prod(len(entry.values) for entry in space.values() if isinstance(entry, Grid))


def distributions(space: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """Return the space as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, BaseDistribution] = {}
    for name, entry in space.items():
        match entry:
            case Uniform(low, high):
                found[name] = FloatDistribution(float(low), float(high))
            case LogUniform(low, high):
                found[name] = FloatDistribution(float(low), float(high), log=True)
            case Choice(values) | Grid(values):
                found[name] = CategoricalDistribution(values)
    return found


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
    found: list[dict[str, Any]] = []
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Sobol's balance, which holds at powers of two only
        study = optuna.create_study(sampler=_sampler(space, sampler, seed))

        def draw(trial: optuna.Trial) -> float:
            found.append(_drawn(study, trial, space))
            return 0.0

        study.optimize(draw, n_trials=min(trials, grid_size(space) or trials))
    optuna.logging.set_verbosity(verbosity)
    return found


def _drawn(study: optuna.Study, trial: optuna.Trial, space: Mapping[str, Range]) -> dict[str, Any]:
    import optuna

    ranges = distributions(space)
    if isinstance(study.sampler, optuna.samplers.QMCSampler):  # asked directly, else its first point is no Sobol point
        return study.sampler.sample_relative(study, trial, ranges)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, entry in ranges.items():
        if isinstance(entry, optuna.distributions.CategoricalDistribution):
            values[name] = trial.suggest_categorical(name, entry.choices)
        elif isinstance(entry, optuna.distributions.FloatDistribution):
            values[name] = trial.suggest_float(name, entry.low, entry.high, log=entry.log)
    return values


def _sampler(space: Mapping[str, Range], sampler: str, seed: int) -> Any:
    import optuna

    if grid_size(space) is not None:
        return optuna.samplers.GridSampler({k: list(v.values) for k, v in space.items() if isinstance(v, Grid)}, seed)
    if sampler == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.QMCSampler(scramble=True, seed=seed)
