r"""Whether and when a target is reached: intervals without assumptions, and the rule of a public league.

**Order statistics.** With n runs in order, :math:`x_{(1)} \le \dots \le x_{(n)}`, the quantile q of their distribution
lies in :math:`[x_{(l)}, x_{(u)}]` with probability at least :math:`P(l \le B < u)`, B binomial with n and q: exactly
that for a distribution without atoms, and no less with them, so that misses may be infinite. Both tails are cut at
2.5 % at most; where n is too small for that (five or fewer runs for a median) the interval is the range of all runs,
and its coverage is told.

**The rule.** The optimization track of modded-nanogpt (github.com/KellerJordan/modded-nanogpt,
``records/track_3_optimization/README.md``, rule 3, read in 2026) takes a result where
:math:`(T - \bar v) \sqrt n \ge z \sigma` with :math:`\sigma = 0.0013` known from many runs and
:math:`P(Z > z) = 0.001`: z = 3.09, 0.004 together. Every run that was begun counts in the mean. Where no sigma is known
it is the runs' own standard deviation, and z the quantile of Student's distribution with n - 1 degrees of freedom: the
one-sided t-test that the league's main track prints (``ttest_1samp(..., alternative='less')``). Runs may be stopped at
one step for all, the first at which the rule holds; never each at its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from ...errors import ArgumentError
from .scoring import LEVEL, higher_is_better, quantile

__all__ = ["CHANCE", "OrderInterval", "TargetRule", "first_step", "order_interval", "pair_rule", "target_rule"]

CHANCE = 0.001
"""What the league allows for a result that holds by chance."""


class OrderInterval(NamedTuple):
    """A quantile, its interval between order statistics, and the probability that the interval has it."""

    point: float
    low: float
    high: float
    coverage: float


class TargetRule(NamedTuple):
    """The rule on some runs: ``margin`` (T - mean) sqrt(n) against ``needed`` z sigma, and the one-sided p-value."""

    mean: float
    sigma: float
    margin: float
    needed: float
    p: float
    passes: bool


def order_interval(values: ArrayLike, share: float = 0.5, level: float = LEVEL) -> OrderInterval:
    """A quantile and its interval between order statistics.

    Args:
        values: one per run, (n,), n >= 1; misses are infinite.
        share: of the quantile, in (0, 1).
        level: wanted probability, in (0, 1).

    Raises:
        ArgumentError: a share or a level is out of range, or there is no run.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    count = len(ordered)
    if not count or not 0 < share < 1 or not 0 < level < 1:
        raise ArgumentError(f"an interval needs runs, a share and a level in (0, 1), got {count}, {share} and {level}")
    below = stats.binom.cdf(np.arange(count + 1), count, share)  # P(B <= k)
    tail = (1 - level) / 2
    lower = max((place for place in range(1, count + 1) if below[place - 1] <= tail), default=1)
    upper = min((place for place in range(1, count + 1) if 1 - below[place - 1] <= tail), default=count)
    coverage = float(below[upper - 1] - below[lower - 1])
    return OrderInterval(
        float(quantile(ordered, share)), float(ordered[lower - 1]), float(ordered[upper - 1]), coverage
    )


def target_rule(
    values: Sequence[float], target: float, sigma: float | None = None, chance: float = CHANCE
) -> TargetRule:
    """The league's rule: whether the mean of all runs is below a target beyond chance.

    Args:
        values: one per run, smaller is better, a miss infinite.
        target: T.
        sigma: standard deviation of a run, where it is known from elsewhere; ``None``: the runs' own, with Student's
            quantile. One run has none, and never passes without a known one.
        chance: probability of passing with a mean that is T, in (0, 1).

    Raises:
        ArgumentError: ``sigma`` or ``chance`` is out of range.
    """
    if not 0 < chance < 1 or (sigma is not None and not 0 < sigma < math.inf):
        raise ArgumentError(f"the rule needs a chance in (0, 1) and a positive sigma, got {chance} and {sigma}")
    sample = np.asarray(values, dtype=float)
    if not len(sample) or not np.isfinite(sample).all():
        mean = float(sample.mean()) if len(sample) else math.nan
        return TargetRule(mean, math.nan, -math.inf if len(sample) else math.nan, math.nan, 1.0, passes=False)
    mean, count = float(sample.mean()), len(sample)
    margin = (target - mean) * math.sqrt(count)
    if sigma is None and count < 2:
        return TargetRule(mean, math.nan, margin, math.nan, math.nan, passes=False)
    law = stats.norm() if sigma is not None else stats.t(count - 1)
    spread = float(sample.std(ddof=1)) if sigma is None else sigma
    needed = float(law.isf(chance)) * spread
    p = float(law.sf(margin / spread)) if spread else (1.0 if margin < 0 else 0.0)
    return TargetRule(mean, spread, margin, needed, p, passes=margin >= needed)


def pair_rule(first: Sequence[float], second: Sequence[float], gain: float, sigma: float) -> float:
    """The league's comparison of two results: the drop of the mean, per square root of 1/n1 + 1/n2, in sigmas.

    Args:
        first: values of the new result, smaller is better.
        second: of the old one.
        gain: what the new result's smaller number of steps is worth in the metric (the league: 0.0045 per 100 steps).
        sigma: standard deviation of a run, > 0.

    Returns:
        z: at least 3.09 where the new result is better beyond one chance in a thousand.
    """
    drop = float(np.mean(second) - np.mean(first)) + gain
    return drop / math.sqrt(1 / len(first) + 1 / len(second)) / sigma


def first_step(courses: Sequence[pd.DataFrame], metric: str, target: float, chance: float = CHANCE) -> float:
    """The first number of steps at which the rule holds for all runs together; infinite where it never does.

    Args:
        courses: evaluations of every run in order.
        metric: column that the target is set for.
        target: at most it for a loss, at least it for an accuracy.
        chance: see :func:`target_rule`.
    """
    if not courses or any(metric not in course for course in courses):
        return math.inf
    sign = -1.0 if higher_is_better(metric) else 1.0
    found = [course.drop_duplicates("iterations").set_index("iterations")[metric] for course in courses]
    joined = pd.concat(found, axis="columns", join="inner").sort_index()
    for step, row in zip(joined.index, joined.to_numpy(dtype=float), strict=True):
        if not np.isnan(row).any() and target_rule(list(sign * row), sign * target, chance=chance).passes:
            return float(step)
    return math.inf
