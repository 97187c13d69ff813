r"""Scores of runs: pure functions over arrays and frames, with misses that count as infinite.

Quantiles, here and in every table: order statistics :math:`x_{(0)} \le \dots \le x_{(n-1)}` are interpolated linearly
at position :math:`q (n - 1)`; between a finite and an infinite one the quantile is infinite, so a median is finite only
if at least half of the runs (and the upper of the two in the middle) are.

Intervals are percentile intervals of a stratified bootstrap: seeds are drawn with replacement within each stratum, a
stratum being one problem and arm, so that every resample has as many runs of every kind as there were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ...errors import ArgumentError

__all__ = [
    "Interval",
    "bootstrap",
    "higher_is_better",
    "quantile",
    "summarise",
    "time_to_target",
    "value_within",
]

Floats = NDArray[np.float64]
Statistic = Callable[[Sequence[Floats]], Floats]

LEVEL = 0.95
RESAMPLES = 2000


class Interval(NamedTuple):
    """A point estimate with the interval around it; any of the three may be infinite or not a number."""

    point: float
    low: float
    high: float


def higher_is_better(metric: str) -> bool:
    """Whether a metric is to be maximised: accuracies are, losses and times are not."""
    return metric.endswith("accuracy")


def time_to_target(course: pd.DataFrame, clock: str, metric: str, target: float) -> float:
    r"""When a run first meets its target, on one of its clocks.

    Between the last evaluation before and the first at or past the target, the metric is taken as linear in the clock:
    :math:`t = t_{i-1} + (t_i - t_{i-1}) (v_{i-1} - T) / (v_{i-1} - v_i)`. A run that meets it at its first evaluation
    has the clock of that evaluation (for seconds: the warm start). Where the evaluation before is not finite, there is
    nothing to interpolate and :math:`t = t_i`.

    Args:
        course: the run's evaluations in order, one row each.
        clock: column that counts: ``iterations``, ``gradient_evaluations`` or ``seconds``.
        metric: column of the metric; one that is missing is never met.
        target: value to reach: at most it for a loss, at least it for an accuracy.

    Returns:
        The time, or infinity for a miss.
    """
    if metric not in course or clock not in course:
        return math.inf
    sign = -1.0 if higher_is_better(metric) else 1.0
    values = sign * course[metric].to_numpy(dtype=float)
    times, bound = course[clock].to_numpy(dtype=float), sign * target
    reached = np.flatnonzero(values <= bound)
    if not len(reached):
        return math.inf
    after = int(reached[0])
    if after == 0 or not math.isfinite(values[after - 1]):
        return float(times[after])
    share = (values[after - 1] - bound) / (values[after - 1] - values[after])
    return float(times[after - 1] + share * (times[after] - times[after - 1]))


def value_within(course: pd.DataFrame, clock: str, limit: float, metric: str) -> float:
    """The metric at the last evaluation not later than ``limit`` on a clock; not a number if there is none.

    Args:
        course: the run's evaluations in order.
        clock: column that counts.
        limit: last value of the clock to look at.
        metric: column wanted.
    """
    if metric not in course or clock not in course:
        return math.nan
    within = course.loc[course[clock] <= limit, metric]
    return float(within.iloc[-1]) if len(within) else math.nan


def quantile(values: ArrayLike, share: float, axis: int = -1) -> Floats:
    """The quantile of the module's docstring.

    Args:
        values: any shape; may hold infinities. Not-a-number in, not-a-number out.
        share: in [0, 1]; 0.5 is the median.
        axis: along which; at least one entry long.

    Raises:
        ArgumentError: ``share`` is out of range, or the axis is empty.
    """
    sample = np.asarray(values, dtype=float)
    count = sample.shape[axis]
    if not 0 <= share <= 1 or not count:
        raise ArgumentError(f"a quantile needs values and a share in [0, 1], got {count} values and {share}")
    low, high = (np.quantile(sample, share, axis=axis, method=method) for method in ("lower", "higher"))
    with np.errstate(invalid="ignore"):
        between = low + (share * (count - 1)) % 1 * (high - low)
    return np.asarray(np.where(low == high, low, np.where(np.isinf(high) & ~np.isinf(low), high, between)))


def bootstrap(strata: Sequence[ArrayLike], statistic: Statistic, seed: int = 0) -> Interval:
    """Point and 95 % interval of a statistic, runs drawn with replacement within each stratum.

    The ends are order statistics of the resampled values (no interpolation), so that infinite ones are exact.
    ``scipy.stats.bootstrap`` knows neither strata nor infinities.

    Args:
        strata: values of each stratum, (n_s,); for paired data (n_s, p), rows drawn together.
        statistic: of the strata, each (B, n_s) or (B, n_s, p), to (B,): one value per resample.
        seed: of the draws.

    Returns:
        Not-a-number ends where there is no run, and where no stratum has two: nothing tells their spread then.
    """
    samples = [np.asarray(stratum, dtype=float) for stratum in strata]
    if not samples or any(not len(sample) for sample in samples):
        return Interval(math.nan, math.nan, math.nan)
    point = float(statistic([sample[None] for sample in samples])[0])
    if all(len(sample) < 2 for sample in samples):
        return Interval(point, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    draws = [sample[generator.integers(len(sample), size=(RESAMPLES, len(sample)))] for sample in samples]
    ordered = np.sort(statistic(draws))
    tail = (1 - LEVEL) / 2
    low, high = ordered[math.floor(tail * RESAMPLES)], ordered[math.ceil((1 - tail) * RESAMPLES) - 1]
    return Interval(point, float(low), float(high))


def _median(strata: Sequence[Floats]) -> Floats:
    return quantile(strata[0], 0.5)


def summarise(values: ArrayLike) -> dict[str, float]:
    """Median, quartiles and the median's bootstrap interval over seeds.

    Args:
        values: one per run, (n,); misses are infinite (or minus infinity for what is maximised).

    Returns:
        ``median``, ``q25``, ``q75``, ``low``, ``high``; not a number where there is no run.
    """
    sample = np.asarray(values, dtype=float)
    if not len(sample) or np.isnan(sample).any():
        return dict.fromkeys(("median", "q25", "q75", "low", "high"), math.nan)
    interval = bootstrap([sample], _median)
    q25, q75 = float(quantile(sample, 0.25)), float(quantile(sample, 0.75))
    return {"median": interval.point, "q25": q25, "q75": q75, "low": interval.low, "high": interval.high}
