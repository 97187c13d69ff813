r"""Comparisons of two arms seed by seed: the same initial parameters, the same order of the data.

The effect of an arm against a reference is the ratio of their values on one seed, :math:`v_s / v^{ref}_s`, below 1
where the arm is better (for what is maximised: the ratio of error rates, :math:`(1 - v_s) / (1 - v^{ref}_s)`). A miss
is infinite; where both miss neither is ahead, and the ratio is 1. Per problem the effect is the median over seeds; over
problems the geometric mean of those medians. Intervals draw seeds with replacement within each problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest

from .scoring import Interval, bootstrap, quantile

__all__ = ["Values", "as_costs", "combined_effect", "compare_pairs", "paired_ratios"]

Values = Mapping[int, float]
"""One value per seed, >= 0, smaller is better, infinite for a miss."""

Floats = NDArray[np.float64]


def paired_ratios(arm: Values, reference: Values) -> Floats:
    """Ratio arm : reference on every seed that both have, in the order of the seeds.

    Returns:
        (seeds,), in [0, inf]; 1 where both are infinite or both 0.
    """
    shared = sorted(arm.keys() & reference.keys())
    own = np.array([arm[seed] for seed in shared], dtype=float)
    other = np.array([reference[seed] for seed in shared], dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = own / other
    return np.asarray(np.where(own == other, 1.0, ratios))


def _geometric_mean_of_medians(strata: Sequence[Floats]) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.stack([np.log(quantile(stratum, 0.5)) for stratum in strata])
        mean = logarithms.mean(axis=0)
    # A win by a factor of infinity on one problem and a miss on another do not cancel to anything finite: a miss rules.
    return np.asarray(np.exp(np.where(np.isposinf(logarithms).any(axis=0), math.inf, mean)))


def combined_effect(ratios: Sequence[Floats]) -> Interval:
    """Effect over problems, with its interval.

    Args:
        ratios: of every problem, (seeds of the problem,); problems without a pair are left out.

    Returns:
        Geometric mean over problems of the median ratio; infinite where the arm misses on a problem in the median.
    """
    return bootstrap([entry for entry in ratios if len(entry)], _geometric_mean_of_medians)


def compare_pairs(arm: Values, reference: Values) -> dict[str, float]:
    """One arm against another on one problem.

    Returns:
        ``pairs``, ``wins``, ``ties``, ``losses`` of the arm; ``ratio`` (median) with ``low`` and ``high``; ``p``, the
        two-sided exact sign test of wins against losses. With n pairs p is at least 2^(1 - n): five seeds cannot go
        below 0.06.
    """
    ratios = paired_ratios(arm, reference)
    wins, losses = int((ratios < 1).sum()), int((ratios > 1).sum())
    effect = combined_effect([ratios])
    chance = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return {
        "pairs": len(ratios),
        "wins": wins,
        "ties": len(ratios) - wins - losses,
        "losses": losses,
        "ratio": effect.point,
        "low": effect.low,
        "high": effect.high,
        "p": chance if len(ratios) else math.nan,
    }


def as_costs(values: pd.Series, maximised: bool) -> pd.Series:
    """Values that are to be minimised, from a metric: error rates for what is maximised."""
    return 1.0 - values if maximised else values
