"""Average, damp, test: what happens to many secant pairs before they update their matrices, in a few operations.

Every structure that learns from secant pairs goes through here, and so does whoever computes a pair again.

The vectors of all layers are rows of one matrix, padded with zeros to a common length: zeros change no dot product, so
the rules see ordinary pairs with a batch axis in front. Only products with each layer's own matrix stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ...curvature.records.statistics import LayerStatistics
from ..averages import Average
from ..linalg import pack, unpack
from ..protocol import Events
from ..state import State
from .damping import DampedPair, PairDamping
from .skipping import SkipRule

__all__ = ["AveragedPair", "average_pairs_", "averaged", "copy_all_", "damped_pairs"]


@dataclass
class AveragedPair(State):
    """Moving averages of s and y, before damping (PAPERS 1.2 item 7)."""

    step: Tensor
    change: Tensor
    weight: float


def copy_all_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Overwrite many tensors in one operation; under ``torch.func.vmap``, which lacks it, one by one."""
    if any(map(torch._C._functorch.is_batchedtensor, values)):
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
    else:
        torch._foreach_copy_(list(targets), list(values))


def averaged(old: Tensor, new: Tensor, usable: Tensor, weight: float, average: Average) -> tuple[Tensor, float]:
    """Take new pairs into averages of one weight; a pair that is not usable leaves its average as it was.

    Args:
        old: (2, L, d) averages of s and y.
        new: (2, L, d) s and y of this step.
        usable: (L,).
        weight: what the averages have gathered.
        average: rule over steps.

    Returns:
        The averages after the step, and their weight.
    """
    keep, add, weight = average.coefficients(weight)
    return torch.where(usable.unsqueeze(-1), torch.add(keep * old, new, alpha=add), old).to(old.dtype), weight


def average_pairs_(
    pairs: Sequence[AveragedPair],
    befores: Sequence[LayerStatistics],
    afters: Sequence[LayerStatistics | None],
    average: Average,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the pairs of one step into their averages: s = mean(h+ - h), y = mean(g+ - g).

    The averages must have gathered the same weight. A non-finite pair never enters.

    Returns:
        Averages (2, L, d), whether each pair was finite (L,), mean gradients before the step (L, d).
    """
    columns: tuple[list[Tensor], ...] = ([], [], [], [])
    for before, after in zip(befores, afters, strict=True):
        assert after is not None and after.mean_preactivation is not None and after.mean_gradient is not None
        assert before.mean_preactivation is not None and before.mean_gradient is not None
        found = (before.mean_preactivation, before.mean_gradient, after.mean_preactivation, after.mean_gradient)
        for column, vector in zip(columns, found, strict=True):
            column.append(vector)
    points = pack([*chain(*columns)]).view(4, len(pairs), -1)
    new = points[2:] - points[:2]
    finite = (new - new).sum((0, 2)) == 0  # x - x is zero for finite x only
    stored = [pair.step for pair in pairs] + [pair.change for pair in pairs]
    values, weight = averaged(pack(stored).view_as(new), new, finite, pairs[0].weight, average)
    copy_all_(stored, unpack(values.reshape(len(stored), -1), [vector.shape[0] for vector in stored]))
    for pair in pairs:
        pair.weight = weight
    return values, finite, points[1]


def damped_pairs(
    averages: Tensor,
    usable: Tensor,
    reference: Tensor,
    product: Callable[[Tensor], Tensor],
    pairs: PairDamping,
    skip: SkipRule,
    damping: float,
) -> tuple[DampedPair, Tensor, Events]:
    """Damp and test averaged pairs.

    Args:
        averages: (2, L, d) s and y.
        usable: (L,) pairs that may be accepted at all.
        reference: (L, d) scale of each layer, for the skip rule.
        product: rows y to rows H y, each with the matrix that its pair will update.
        pairs: damping rule.
        skip: skip rule.
        damping: mu2 of all pairs.

    Returns:
        The damped pairs, which are accepted (L,), and counts for the step report.
    """
    step, change = averages.unbind(0)
    pair = pairs.damp(step, change, product(change), damping)
    accepted = usable & skip.accepts(pair.step, pair.change, reference)
    counts = torch.stack([pair.first, pair.second, ~accepted]).sum(-1).unbind(0)
    return pair, accepted, dict(zip(("damped_first", "damped_second", "rejected_pairs"), counts, strict=True))
