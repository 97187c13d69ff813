r"""Performance profiles: how often an arm is within a factor of the best.

With :math:`t_{p,a}` the median time-to-target of arm a on problem p and
:math:`r_{p,a} = t_{p,a} / \min_b t_{p,b}`, the profile of a is :math:`\rho_a(\tau) = |\{p : r_{p,a} \le \tau\}| / P`.
Its score is :math:`\frac{1}{\tau_{\max} - 1} \int_1^{\tau_{\max}} \rho_a(\tau) d\tau` with :math:`\tau_{\max} = 4`,
in [0, 1]: 1 for the arm that is the best everywhere, 0 for one that is never within a factor of four. The integral is
exact, no grid: a ratio r adds :math:`\max(0, \tau_{\max} - r) / (\tau_{\max} - 1) / P`.

Source: Dolan and More, Mathematical Programming 91 (2002), for the profile; AlgoPerf (arXiv:2306.07179) for its
integral up to 4. A problem that no arm solves counts against all of them, as a ratio of infinity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .scoring import Interval, bootstrap, quantile

__all__ = ["LARGEST_RATIO", "profile", "profile_score", "profile_scores", "ratios_to_best"]

LARGEST_RATIO = 4.0

Floats = NDArray[np.float64]


def ratios_to_best(times: Floats) -> Floats:
    """Ratio of every arm's time to the best one of its problem.

    Args:
        times: (..., problems, arms), >= 0, infinite for a miss.

    Returns:
        Same shape, >= 1; infinite for a miss. Where the best time is 0, arms with 0 have 1 and the others infinity.
    """
    best = times.min(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = times / best
    return np.asarray(np.where(np.isinf(times), math.inf, np.where(times == best, 1.0, ratios)))


def profile(ratios: Floats, factors: Floats) -> Floats:
    """Share of problems within each factor of the best.

    Args:
        ratios: of one arm, (problems,).
        factors: (F,), >= 1.

    Returns:
        (F,), in [0, 1], non-decreasing along increasing factors.
    """
    return np.asarray((ratios[None, :] <= factors[:, None]).mean(axis=1))


def profile_score(ratios: Floats) -> Floats:
    """Integral of the profile from 1 to 4, divided by 3.

    Args:
        ratios: (..., problems).

    Returns:
        (...), in [0, 1].
    """
    return np.asarray((np.clip(LARGEST_RATIO - ratios, 0.0, None) / (LARGEST_RATIO - 1.0)).mean(axis=-1))


def profile_scores(times: Mapping[tuple[str, str], Sequence[float]]) -> pd.DataFrame:
    """Scores of all arms, with stratified bootstrap intervals.

    Args:
        times: time-to-target of every run by (problem, arm), misses infinite. An arm without a run on a problem
            missed it.

    Returns:
        One row per arm, best first: ``arm``, ``score``, ``low``, ``high``, ``problems`` and ``solved`` (how many
        problems have a finite median).
    """
    problems, arms = (list(dict.fromkeys(key[place] for key in times)) for place in (0, 1))
    keys = [(problem, arm) for problem in problems for arm in arms]
    strata = [np.asarray(times.get(key) or [math.inf], dtype=float) for key in keys]

    def medians(samples: Sequence[Floats]) -> Floats:
        """(B, problems, arms)."""
        return np.stack([quantile(sample, 0.5) for sample in samples], axis=-1).reshape(-1, len(problems), len(arms))

    rows = []
    solved = np.isfinite(medians([stratum[None] for stratum in strata])[0]).sum(axis=0) if keys else []
    for index, arm in enumerate(arms):

        def score(samples: Sequence[Floats], index: int = index) -> Floats:
            return profile_score(ratios_to_best(medians(samples))[..., index])

        interval: Interval = bootstrap(strata, score)
        rows.append([arm, *interval, len(problems), int(solved[index])])
    frame = pd.DataFrame(rows, columns=["arm", "score", "low", "high", "problems", "solved"])
    return frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
