"""Sharing rules: what a Kronecker factor makes of a map that is applied at many positions, or called several times.

Rows of inputs a(n, c, p) and of gradients g(n, c, p) belong to sample n, call c of its module (or of a module that
shares the weight) and position p inside the call. The gradient of sample n is the sum of g a' over calls and positions;
one Kronecker product cannot hold all of its square, and the rules differ in the cross terms that they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...curvature.records.statistics import LayerStatistics
from ...errors import ArgumentError

__all__ = ["Expand", "Reduce", "Sharing", "Sum"]


class Sharing(Protocol):
    """Rows whose second moments are the two factors."""

    def inputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        """Rows (rows, d_in) without the homogeneous 1, and the factor from the sum of their outer products to A."""

    def outputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        """Rows (rows, d_out), and the factor from the sum of their outer products to G."""


@dataclass(frozen=True)
class Expand:
    """Every call and position is a sample of its own: no cross terms.

    A is the mean over samples of the sum over positions of a a', G the mean over samples and positions of g g': the
    convention of the K-BFGS code (PAPERS 1.6), and KFAC-expand of arXiv:2311.00636v2 (equation 22) up to a number that
    moves from one factor to the other.
    """

    def inputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        """All rows."""
        return statistics.input_rows(), statistics.input_weight

    def outputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        """All rows."""
        rows, factor = _roots(statistics)
        return rows, factor**2 / statistics.rows


@dataclass(frozen=True)
class Reduce:
    """Calls and positions of a sample are reduced first: the mean of the inputs, the sum of the gradients.

    KFAC-reduce of arXiv:2311.00636v2 (equation 24): exact where the network averages or sums the positions behind a
    linear map, and cheaper in the products by the number of positions.
    """

    def inputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        """One row per sample (and group)."""
        rows = _per_position(statistics.input_rows(), statistics, statistics.layer.groups)
        return rows.mean(1).flatten(0, 1), statistics.input_weight

    def outputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        """One row per sample (and root)."""
        rows, factor = _roots(statistics)
        return _per_position(rows, statistics, 1).sum(1).flatten(0, 1), factor**2 / statistics.samples


@dataclass(frozen=True)
class Sum:
    """Positions inside a call are reduced as in :class:`Reduce`; calls are samples of their own as in :class:`Expand`.

    For modules that are called several times, or share a weight, each call on a whole sequence or image.
    """

    def inputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        """One row per sample and call (and group)."""
        rows = _per_position(statistics.input_rows(), statistics, statistics.layer.groups)
        means = [piece.mean(1) for piece in rows.split(list(_calls(statistics)), 1)]
        return torch.stack(means, 1).flatten(0, 2), statistics.input_weight

    def outputs(self, statistics: LayerStatistics) -> tuple[Tensor, float]:
        """One row per sample and call (and root)."""
        rows, factor = _roots(statistics)
        calls = _calls(statistics)
        sums = [piece.sum(1) for piece in _per_position(rows, statistics, 1).split(list(calls), 1)]
        return torch.stack(sums, 1).flatten(0, 2), factor**2 / (statistics.samples * len(calls))


def _roots(statistics: LayerStatistics) -> tuple[Tensor, float]:
    assert statistics.roots is not None
    return statistics.roots


def _calls(statistics: LayerStatistics) -> Sequence[int]:
    return statistics.calls or (statistics.positions,)


def _per_position(rows: Tensor, statistics: LayerStatistics, groups: int) -> Tensor:
    """Rows as (samples (times roots), positions, groups, d).

    Raises:
        ArgumentError: if the calls have no samples, or micro-batches no positions, in common.
    """
    if statistics.ragged:
        raise ArgumentError(
            f"layer {statistics.layer.name!r} was called on different numbers of samples or positions, so nothing can "
            "be reduced within a sample; use the sharing rule Expand(), or pad the micro-batches to one length"
        )
    result: Tensor = rows.unflatten(0, (-1, statistics.positions, groups))
    return result
