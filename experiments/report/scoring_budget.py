r"""What tuning buys: the best of k trials, drawn without replacement from the n that were run.

With values in order :math:`v_{(1)} \le \dots \le v_{(n)}` (smaller is better),

.. math:: P(\min \le v_{(i)}) = 1 - \binom{n-i}{k} / \binom{n}{k}, \qquad
   E[\min] = \sum_{i=1}^{n-k+1} v_{(i)} \binom{n-i}{k-1} / \binom{n}{k},

exactly, without simulation. A trial that missed has an infinite value; the expectation is infinite as long as k trials
can all miss, which is why median and quartiles stand beside it.

Source: expected best performance at a budget, Sivaprasad et al., arXiv:1910.11758. They resample with replacement; the
formula here is the one for distinct trials, so that k = n gives the best value found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ...errors import ArgumentError

__all__ = ["best_of", "budget_curve"]


def best_of(values: Sequence[float], trials: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribution of the smallest of ``trials`` values drawn without replacement.

    Args:
        values: (n,), smaller is better, infinite for a miss.
        trials: k, 1 <= k <= n.

    Returns:
        The values in order and the probability of each, both (n,).

    Raises:
        ArgumentError: k is out of range.
    """
    count = len(values)
    if not 1 <= trials <= count:
        raise ArgumentError(f"the best of k trials needs 1 <= k <= {count} (the trials that were run), got {trials}")
    total = math.comb(count, trials)
    weights = [math.comb(count - place, trials - 1) / total for place in range(1, count + 1)]
    return np.sort(np.asarray(values, dtype=float)), np.asarray(weights)


def budget_curve(values: Sequence[float]) -> pd.DataFrame:
    """The best of k trials for every k.

    Args:
        values: (n,), smaller is better, infinite for a miss.

    Returns:
        One row per k: ``trials``, ``expected``, ``median``, ``q25``, ``q75`` and ``miss``, the probability that all k
        trials miss. Quantiles are values of trials: the smallest whose probability of being reached is enough.
    """
    rows = []
    for trials in range(1, len(values) + 1):
        ordered, weights = best_of(values, trials)
        finite = np.isfinite(ordered)
        miss = float(weights[~finite].sum())
        expected = math.inf if miss > 0 else float((ordered[finite] * weights[finite]).sum())
        reached = np.cumsum(weights)
        q25, median, q75 = (float(ordered[int(np.searchsorted(reached, share - 1e-12))]) for share in (0.25, 0.5, 0.75))
        rows.append([trials, expected, median, q25, q75, miss])
    return pd.DataFrame(rows, columns=["trials", "expected", "median", "q25", "q75", "miss"])
