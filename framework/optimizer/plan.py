"""What a composition asks of whom at which step, worked out once and again only when something changes.

A session asks its plan instead of the parts: parts are frozen, so their answers are too. Only the step number, and
whether statistics were warm-started, decide which of a few answers is in force.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...curvature.estimators import records_for_pairs
from ...curvature.layers.layer import Layer
from ...curvature.layers.sharding import is_sharded
from ...curvature.records.needs import Needs, Record
from ...preconditioners.structures.identity import Stateless
from ...stepsize.constant import ConstantStep
from ..methods.method import Method
from ..processes.records import Travel
from .blocks import Block
from .recording import records_for_step
from .team import Team
from .travelling import travels_of_step

__all__ = ["Plan", "SecondLook", "StepPlan"]


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    Attributes:
        records: by layer, what the backend records.
        due: of every own block, whether its statistics are updated.
        inverses: own blocks whose inverses are recomputed at once.
        lagging: own blocks whose inverses are begun, to be used some steps later.
        samples_labels: whether some layer needs a backward for sampled labels.
        measures_scores: whether the step-size or damping rule measures curvature with sampled labels.
        records_gradients: whether some record holds gradients of the user's loss.
        products: whether Hessian products are needed.
        waits: of every own block, whether its statistics are updated after the second evaluation only.
        looks_back: whether the mini-batch is evaluated again after the step.
        risky: whether the step can break down after its states have been written.
        travels: by layer, what its owner is brought of the records of all processes; empty in one process.
    """

    records: Mapping[str, Record]
    due: tuple[bool, ...]
    inverses: tuple[Block, ...]
    lagging: tuple[Block, ...]
    samples_labels: bool
    measures_scores: bool
    records_gradients: bool
    products: bool
    waits: tuple[bool, ...]
    looks_back: bool
    risky: bool
    travels: Mapping[str, Travel]


@dataclass(frozen=True)
class SecondLook:
    """What the evaluation after a step is for.

    Attributes:
        records: by layer, what the backend records of it.
        constants: parameters that need no gradient then.
        changing: layers with a structure that pairs the parameters themselves.
    """

    records: Mapping[str, Record]
    constants: Sequence[nn.Parameter]
    changing: Sequence[Layer]


class Plan:
    """The answers of one composition on one set of blocks.

    Args:
        method: the composition.
        blocks: all blocks.
        layers: all layers.
        own: the blocks whose states this process has; ``None``: all, in one process.
    """

    def __init__(
        self, method: Method, blocks: Sequence[Block], layers: Sequence[Layer], own: Sequence[Block] | None = None
    ):
        self.method, self.all_blocks, self.layers = method, blocks, layers
        self.alone, self.blocks = own is None, blocks if own is None else own
        self.needs_closure = method.needs_closure
        self._varies = method.adaptive_damping is not None or bool(method.measures_at(None))
        clocks = dict.fromkeys((block.part.schedule, block.born) for block in blocks)
        self._clocks = list(clocks)
        places = {clock: index for index, clock in enumerate(clocks)}
        self._clock_of = [places[block.part.schedule, block.born] for block in self.blocks]
        self._own = [any(block is mine for mine in self.blocks) for block in blocks]
        self.second_look = self._second_look()
        self._all = (True,) * len(self.blocks)
        self._forget()

    def _forget(self) -> None:
        self._last: tuple[Any, Any] = (None, None)
        self._known: dict[Any, StepPlan] = {}
        self._teams: dict[tuple[bool, ...], Team] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the answers: teams hold views of the blocks' memory, which a copy would not share."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_last", "_known", "_teams")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy."""
        self.__dict__.update(state)
        self._forget()

    def at(self, step: int, warm: bool) -> StepPlan:
        """What step ``step`` does; steps on which the same is due share one answer."""
        if self._last[0] == (step, warm):
            last: StepPlan = self._last[1]
            return last
        times = []
        for schedule, born in self._clocks:
            age = step - born
            late = schedule.lag > 0 and schedule.lags(age)
            times.append((schedule.statistics_due(age, warm and not born), schedule.inverses_due(age), late))
        varies = (self.method.measures_at(step), self.method.looks_back_at(step)) if self._varies else None
        key = (tuple(times), varies)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._worked_out(step, warm, [times[clock] for clock in self._clock_of])
        self._last = ((step, warm), found)
        return found

    def _worked_out(self, step: int, warm: bool, times: Sequence[tuple[bool, bool, bool]]) -> StepPlan:
        method, measures = self.method, self.method.measures_at(step)
        due = tuple(statistics for statistics, _, _ in times)
        inverting = [(block, late) for block, (_, now, late) in zip(self.blocks, times, strict=True) if now]
        inverting = [(block, late) for block, late in inverting if _inverts(block)]
        records = records_for_step(self.all_blocks, self.layers, method, step, warm)
        matrices = any(block.asked.matrix and block.statistics_due(step, warm) for block in self.all_blocks)
        looks_back = method.looks_back_at(step)
        return StepPlan(
            records,
            due,
            tuple(block for block, late in inverting if not late),
            tuple(block for block, late in inverting if late),
            any(record & (Record.SAMPLED | Record.SAMPLED_PARAMETERS) for record in records.values()),
            bool(measures & (Needs.SCORES | Needs.BATCH_SCORES)),
            any(record & (Record.GRADIENTS | Record.MEANS) for record in records.values()),
            Needs.PRODUCTS in measures or (Needs.PRODUCTS in method.asks and matrices),
            tuple(
                looks_back and block.structure.waits and not inverses and not method.balances_eigenvalues
                for block, (_, inverses, _) in zip(self.blocks, times, strict=True)
            ),
            looks_back,
            (looks_back and method.guard.attempts == 0) or not isinstance(method.step_size, ConstantStep),
            {} if self.alone else travels_of_step(self.all_blocks, method.curvature, step, warm),
        )

    def own_part(self, present: tuple[bool, ...]) -> tuple[bool, ...]:
        """Of the own blocks, what is told of all.

        Args:
            present: of every block of all processes.
        """
        return tuple(value for value, mine in zip(present, self._own, strict=True) if mine)

    def team(self, present: tuple[bool, ...]) -> Team:
        """The blocks that take part in a step.

        Args:
            present: of every block, whether it does.
        """
        found = self._teams.get(present)
        if found is None:
            chosen = [block for block, is_present in zip(self.blocks, present, strict=True) if is_present]
            places = [place for place, is_present in enumerate(present) if is_present]
            found = self._teams[present] = Team(chosen, places)
        return found

    @property
    def everyone(self) -> Team:
        """All blocks."""
        return self.team(self._all)

    def _second_look(self) -> SecondLook:
        needs: dict[str, Needs] = {}
        for block in self.all_blocks:
            if block.asked.looks_back:
                needs[block.layer.name] = needs.get(block.layer.name, Needs.NOTHING) | block.needs
        # Frozen are only layers whose outputs the capture lets need a gradient: a loss without any has no backward.
        lean = [layer for layer in self.layers if Needs.CHANGES not in needs.get(layer.name, Needs.CHANGES)]
        if any(is_sharded(value) for layer in self.layers for value in layer.parameters.values()):
            lean = []  # what stands for them in the graph is made once, with the flag that they have then
        return SecondLook(
            {name: records_for_pairs(need) for name, need in needs.items()},
            [parameter for layer in lean for parameter in layer.parameters.values()],
            [layer for layer in self.layers if Needs.CHANGES in needs.get(layer.name, Needs.NOTHING)],
        )


def _inverts(block: Block) -> bool:
    """Whether a block may ask for a matrix at all."""
    asks: Any = type(block.part).matrices
    return asks is not Stateless.matrices
