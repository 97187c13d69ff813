"""What a composition asks of whom at which step, worked out once and again only when something changes.

A session asks its plan instead of the parts: parts are frozen, so their answers are too. Only the step number, and
whether statistics were warm-started, decide which of a few answers is in force.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs, Record
from ..methods.method import Method
from .blocks import Block
from .recording import records_for_step

__all__ = ["Plan", "StepPlan"]


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    Attributes:
        records: by layer, what the backend records.
        due: of every block, whether its statistics are updated.
        samples_labels: whether some layer needs a backward for sampled labels.
        records_gradients: whether some record holds gradients of the user's loss.
        products: whether Hessian products are needed.
    """

    records: Mapping[str, Record]
    due: tuple[bool, ...]
    samples_labels: bool
    records_gradients: bool
    products: bool


class Plan:
    """The answers of one composition on one set of blocks.

    Args:
        method: the composition.
        blocks: all blocks.
        layers: all layers.
    """

    def __init__(self, method: Method, blocks: Sequence[Block], layers: Sequence[Layer]):
        self.method, self.blocks, self.layers = method, blocks, layers
        self.needs = [block.part.needs for block in blocks]
        self._last: tuple[Any, Any] = (None, None)
        self._known: dict[tuple[tuple[bool, ...], Needs], StepPlan] = {}

    def at(self, step: int, warm: bool) -> StepPlan:
        """What step ``step`` does; steps on which the same is due share one answer."""
        if self._last[0] == (step, warm):
            last: StepPlan = self._last[1]
            return last
        due = tuple([block.statistics_due(step, warm) for block in self.blocks])
        measures = self.method.measures_at(step)
        found = self._known.get((due, measures))
        if found is None:
            records = records_for_step(self.blocks, self.layers, self.method, step, warm)
            products = Needs.PRODUCTS in measures or (
                Needs.PRODUCTS in self.method.asks
                and any(is_due and Needs.MATRIX in need for is_due, need in zip(due, self.needs, strict=True))
            )
            found = self._known[due, measures] = StepPlan(
                records,
                due,
                any(record & (Record.SAMPLED | Record.SAMPLED_PARAMETERS) for record in records.values()),
                any(record & (Record.GRADIENTS | Record.MEANS) for record in records.values()),
                products,
            )
        self._last = ((step, warm), found)
        return found
