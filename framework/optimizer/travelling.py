"""What the owners of layers are brought of everybody's records, worked out from what the parts declare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
        known = moments.get(side)
        if isinstance(known, SecondMoment) and known.sharing != takes[side]:
            rows |= record  # two structures read one layer by different rules
            continue
        left &= ~need
        if due:
            order = block.seen.matrix_shape[1] if side == "inputs" else block.seen.matrix_shape[0]
            moments[side] = SecondMoment(side, takes[side], estimator, block.storage[0].dtype, order)
            saved[side] = record
    mean_input = before.mean_input or bool(needs & LOOKING_BACK and Needs.INPUTS in needs and "inputs" in takes)
    rows |= estimator.records(left) if left else Record.NOTHING
    found[block.layer.name] = replace(before, rows=rows, moments=moments, saved=saved, mean_input=mean_input)


@dataclass(frozen=True)
class SecondMoment:
    """Of one side of a layer; see :class:`~..processes.records.Moment`.

    Attributes:
        side: ``"inputs"`` or ``"outputs"``.
        sharing: the structure's rule.
        estimator: of the method, which says what the rows at the outputs are.
        dtype: of the structure's state.
        order: d.
    """

    side: Any
    sharing: Any
    estimator: Estimator
    dtype: torch.dtype
    order: int

    def __call__(self, record: LayerStatistics) -> Tensor:
        """The second moment of one process's record."""
        filled = self.estimator.fill(record) if self.side == "outputs" else record
        example = filled.roots[0] if self.side == "outputs" and filled.roots is not None else filled.inputs
        assert example is not None
        result = self.zeros(example.device)
        accumulate_second_moment(result, filled, self.side, 0.0, 1.0, self.sharing)
        return result

    def zeros(self, device: torch.device) -> Tensor:
        """Of nothing."""
        return torch.zeros(self.order, self.order, dtype=self.dtype, device=device)
