"""What the owners of layers are brought of everybody's records, worked out from what the parts declare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...curvature.estimators import Estimator
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import LOOKING_BACK, Needs, Record
from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.factors.factor import accumulate_second_moment
from ..processes.records import Travel
from .blocks import Block

__all__ = ["travels_of_rows", "travels_of_step", "travels_of_warm_start"]

_SIDES = {"inputs": Needs.INPUTS, "outputs": Needs.ROOTS}
_WHOLE = Needs.VECTORS | Needs.MATRIX


def travels_of_step(blocks: Sequence[Block], estimator: Estimator, step: int, warm: bool) -> dict[str, Travel]:
    """By layer, for the statistics and pairs of one step; layers of which no structure takes anything are missing.

    Args:
        blocks: all, whoever owns them.
        estimator: of the method.
        step: its number.
        warm: whether statistics were warm-started.
    """
    found: dict[str, Travel] = {}
    for block in blocks:
        due = block.statistics_due(step, warm)
        needs = block.needs
        if not due:
            needs = needs & (LOOKING_BACK | Needs.INPUTS) if needs & LOOKING_BACK else Needs.NOTHING
        if needs or (due and block.structure.measures):
            _add(found, block, estimator, needs, due)
    return found


def travels_of_warm_start(blocks: Sequence[Block], estimator: Estimator) -> dict[str, Travel]:
    """The same for one mini-batch of the initial pass."""
    found: dict[str, Travel] = {}
    for block in blocks:
        if block.asked.anything:
            _add(found, block, estimator, block.needs & ~LOOKING_BACK, True)
    return found


def travels_of_rows(layers: Iterable[Layer], record: Record) -> dict[str, Travel]:
    """All rows of these records, for whoever takes nothing less."""
    return {layer.name: Travel(record) for layer in layers}


def _add(found: dict[str, Travel], block: Block, estimator: Estimator, needs: Needs, due: bool) -> None:
    """What one block takes, beside what others of its layer take."""
    before = found.get(block.layer.name, Travel())
    if block.alone is not None:
        found[block.layer.name] = before
        return
    structure = block.structure
    takes = structure.takes_moments if "takes_moments" in structure.together and not needs & _WHOLE else {}
    rows, moments, saved = before.rows, dict(before.moments), dict(before.saved)
    left = needs
    for side, need in _SIDES.items():
        if side not in takes or need not in needs:
            continue
        record = estimator.records(need)
        if side in moments and moments[side][0].args[1] != takes[side]:
            rows |= record  # two structures read one layer by different rules
            continue
        left &= ~need
        if due:
            columns = block.seen.matrix_shape[1] if side == "inputs" else block.seen.matrix_shape[0]
            moments[side] = partial(_moment, side, takes[side], estimator, block.storage[0].dtype, columns), columns
            saved[side] = record
    mean_input = before.mean_input or bool(needs & LOOKING_BACK and Needs.INPUTS in needs and "inputs" in takes)
    rows |= estimator.records(left) if left else Record.NOTHING
    found[block.layer.name] = replace(before, rows=rows, moments=moments, saved=saved, mean_input=mean_input)


def _moment(
    side: Any, sharing: Any, estimator: Estimator, dtype: torch.dtype, order: int, record: LayerStatistics
) -> Tensor:
    """The second moment of one process's record."""
    filled = estimator.fill(record) if side == "outputs" else record
    example = filled.roots[0] if side == "outputs" and filled.roots is not None else filled.inputs
    assert example is not None
    result = torch.zeros(order, order, dtype=dtype, device=example.device)
    accumulate_second_moment(result, filled, side, 0.0, 1.0, sharing)
    return result
