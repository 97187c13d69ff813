"""Looking back: the second evaluation of the same mini-batch, the guard, and the secant pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..curvature.capture import Record
from ..curvature.statistics import LayerStatistics, Needs
from ..errors import ArgumentError
from ..preconditioners.protocol import Events
from .evaluation import Closure, Snapshot, frozen, preserved, run_closure

if TYPE_CHECKING:
    from .optimizer import SecondOrder
    from .stepping import Proposal

__all__ = ["LookBack", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What looking back found, and the fraction of the proposed step that stays."""

    loss: Tensor | None
    events: Events
    shortened: int
    fraction: float = 1.0

    def scaled(self, step_sizes: Mapping[str, float | Tensor]) -> Mapping[str, float | Tensor]:
        """Step sizes as they were applied in the end."""
        return step_sizes if not self.shortened else {name: self.fraction * size for name, size in step_sizes.items()}


class LookBack:
    """The look-back phase of one optimizer. Does nothing for methods that do not need it."""

    def __init__(self, optimizer: SecondOrder):
        self.optimizer = optimizer
        self.active = optimizer.method.looks_back
        self._before: Snapshot | None = None
        self._parameters: list[tuple[Tensor, Tensor]] = []

    def prepare(self) -> None:
        """Remember random state and buffers before the first evaluation."""
        self._before = Snapshot.take(self.optimizer.model) if self.active else None

    def remember(self, proposal: Proposal) -> None:
        """Copy the parameters before a step that a guard may shorten: subtracting a huge step again is not exact."""
        guarded = self.optimizer.method.guard.attempts > 0
        moved = [parameter for move in proposal.moves for parameter in move.parameters] if guarded else []
        self._parameters = [(parameter, parameter.detach().clone()) for parameter in moved]

    def run(
        self, closure: Closure, loss: Tensor | None, before: Mapping[str, LayerStatistics], proposal: Proposal
    ) -> Outcome | None:
        """Evaluate again, shorten the step while the guard refuses it, and let the structures observe it."""
        if not self.active or loss is None:
            return None
        guard, fraction, shortened = self.optimizer.method.guard, 1.0, 0
        reference = float(loss) if guard.attempts else 0.0
        while True:
            loss_after, after = self._evaluate(closure)
            if guard.attempts == 0 or guard.accepts(reference, float(loss_after)):
                break
            shortened += 1
            for parameter, saved in self._parameters:
                parameter.copy_(saved)
            if shortened == guard.attempts:
                self._parameters = []
                return Outcome(loss, {}, shortened, 0.0)
            fraction *= guard.shrink
            self.optimizer._take(proposal, fraction)
        self._parameters = []
        return Outcome(loss_after, self._observe(before, after), shortened, fraction)

    def _evaluate(self, closure: Closure) -> tuple[Tensor, dict[str, LayerStatistics]]:
        """One lean pass: no parameter gradient is computed, gradients and buffers end up as they were."""
        optimizer = self.optimizer
        assert self._before is not None
        served = [block.layer for block in optimizer.blocks if Needs.PAIRS in block.part.needs]
        optimizer.capture.clear()
        optimizer.capture.arm({layer.name: Record.MEANS for layer in served}, "look back")
        optimizer.gradient_evaluations += 1
        # Only layers whose outputs the capture makes need a gradient: a loss without any could not run backward.
        with preserved(optimizer.model), frozen([p for layer in served for p in layer.parameters.values()]):
            self._before.restore(optimizer.model)
            loss = run_closure(closure)
        return loss, optimizer.collect()

    def _observe(self, before: Mapping[str, LayerStatistics], after: Mapping[str, LayerStatistics]) -> Events:
        events: Events = {}
        for block in self.optimizer.blocks:
            record = before.get(block.layer.name)
            if record is None or Needs.PAIRS not in block.part.needs:
                continue
            later = after.get(block.layer.name)
            if later is None or later.samples != record.samples:
                found = "nothing" if later is None else f"{later.samples} samples"
                raise ArgumentError(
                    f"layer {block.layer.name!r} saw {record.samples} samples before the step and {found} after it: "
                    "the closure must evaluate the same mini-batch each time it is called (take the batch outside it)"
                )
            sides = self.optimizer.sides(block)
            for name, count in block.part.observe_step(block.state, record, later, sides).items():
                value = count.long()
                events[name] = events[name] + value if name in events else value
        return events
