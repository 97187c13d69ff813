"""Looking back: the second evaluation of the same mini-batch, the guard, and the secant pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...curvature.backends.capture import Record
from ...curvature.estimators import records_for_pairs
from ...curvature.records.statistics import LOOKING_BACK, LayerStatistics, Needs
from ...errors import ArgumentError
from ...preconditioners.looking_back import observe_steps
from ...preconditioners.protocol import Events
from ...stepsize.guard import Trial
from ..changes import Points, changing_layers
from .closure import Closure, Snapshot, frozen, preserved, run_closure

if TYPE_CHECKING:
    from .second_order import SecondOrder
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
    """The look-back phase of one optimizer. Does nothing at steps that do not need it."""

    def __init__(self, optimizer: SecondOrder):
        self.optimizer = optimizer
        self.state = optimizer.method.guard.init()
        self._before: Snapshot | None = None
        self._differentiates = False
        self._parameters: list[tuple[Tensor, Tensor]] = []
        self._points = Points({}, {})
        self._slope: Tensor | None = None
        self._penalty: Tensor | float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Saved state of the guard; empty for guards without one."""
        return {} if self.state is None else dict(self.state.to_dict())

    def load_dict(self, values: Mapping[str, Any]) -> None:
        """Load it."""
        if self.state is not None:
            self.state.load_dict(dict(values))

    def prepare(self) -> None:
        """Remember random state and buffers before the first evaluation."""
        active = self.optimizer.method.looks_back_at(self.optimizer._step)
        self._before = Snapshot.take(self.optimizer.model) if active else None

    def remember(self, proposal: Proposal) -> None:
        """What a guard and structures compare with; and the parameters: to subtract a huge step is not exact."""
        guard = self.optimizer.method.guard
        moved = [parameter for move in proposal.moves for parameter in move.parameters] if guard.attempts > 0 else []
        self._parameters = [(parameter, parameter.detach().clone()) for parameter in moved]
        layers = changing_layers(self.optimizer.blocks) if self._before is not None else []
        self._points = Points.before(layers, {id(parameter): saved for parameter, saved in self._parameters})
        sloped = guard.attempts > 0 and Needs.SLOPES in guard.needs
        self._slope = proposal.slope(self.optimizer.method.weight_decay) if sloped else None
        self._penalty = self.optimizer.penalty() if sloped else 0.0

    def run(
        self, closure: Closure, loss: Tensor | None, before: Mapping[str, LayerStatistics], proposal: Proposal
    ) -> Outcome | None:
        """Evaluate again, shorten the step while the guard refuses it, and let the structures observe it."""
        if self._before is None or loss is None:
            return None
        guard, fraction, shortened = self.optimizer.method.guard, 1.0, 0
        whole: Tensor | None = None
        while True:
            loss_after, after = self._evaluate(closure)
            whole = loss_after if whole is None else whole
            if guard.attempts == 0 or self._accepts(loss, loss_after, fraction):
                break
            shortened += 1
            for parameter, saved in self._parameters:
                parameter.copy_(saved)
            if shortened == guard.attempts:
                self._parameters, self._points = [], Points({}, {})
                self._adapt_damping(loss, whole, proposal)
                return Outcome(loss, {}, shortened, 0.0)
            fraction *= guard.shrink
            self.optimizer._take(proposal, fraction)
        events = self._observe(self._points.into(before), after)
        self._parameters, self._points = [], Points({}, {})
        self._adapt_damping(loss, whole, proposal)
        return Outcome(loss_after, events, shortened, fraction)

    def _accepts(self, loss: Tensor, loss_after: Tensor, fraction: float) -> bool:
        """Ask the guard, and let it take in a step that stays. One synchronisation."""
        guard = self.optimizer.method.guard
        if self._slope is None:
            trial = Trial(float(loss), float(loss_after), None, fraction)
        else:
            numbers = (loss + self._penalty, loss_after + self.optimizer.penalty(), self._slope)
            values = torch.stack([number.double() for number in numbers]).tolist()
            trial = Trial(values[0], values[1], values[2], fraction)
        accepted = guard.accepts(self.state, trial)
        if accepted:
            guard.record(self.state, trial)
        return accepted

    def _adapt_damping(self, loss: Tensor, loss_after: Tensor, proposal: Proposal) -> None:
        """Let an adaptive damping rule judge the whole proposed step. One synchronisation where it is due."""
        rule = self.optimizer.method.adaptive_damping
        if rule is None or proposal.predicted is None:
            return
        numbers = torch.stack([(loss - loss_after).double(), proposal.predicted.double()]).tolist()
        if self.optimizer.method.guard.attempts == 0 and not math.isfinite(numbers[0]):
            return  # nobody shortens this step: it will be undone, and lambda with it
        for group in self.optimizer.param_groups:
            group["damping"] = rule.adapted(float(group["damping"]), *numbers)

    def _evaluate(self, closure: Closure) -> tuple[Tensor, dict[str, LayerStatistics]]:
        """One lean pass: parameter gradients only where they are paired; gradients and buffers end up as they were."""
        optimizer = self.optimizer
        needs: dict[str, Needs] = {}
        for block in optimizer.blocks:
            if block.part.needs & LOOKING_BACK:
                needs[block.layer.name] = needs.get(block.layer.name, Needs.NOTHING) | block.part.needs
        # Frozen are only layers whose outputs the capture lets need a gradient: a loss without any has no backward.
        lean = [layer for layer in optimizer.layers if Needs.CHANGES not in needs.get(layer.name, Needs.CHANGES)]
        parameters = [p for layer in lean for p in layer.parameters.values()]
        wanted = {name: records_for_pairs(need) for name, need in needs.items()}
        try:
            loss, points = self._closure_again(closure, wanted, [] if self._differentiates else parameters)
        except RuntimeError as error:
            if self._differentiates or "does not require grad" not in str(error):
                raise
            self._differentiates = True  # torch.autograd.grad in the closure, by parameters, beside its backward
            loss, points = self._closure_again(closure, wanted, [])
        return optimizer.ranks.mean(loss), points.into(optimizer.collect())

    def _closure_again(
        self, closure: Closure, wanted: Mapping[str, Record], constants: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Points]:
        """The closure from the state before the step, with these parameters held constant."""
        optimizer = self.optimizer
        assert self._before is not None
        optimizer.capture.clear()
        optimizer.capture.arm(wanted, "look back")
        optimizer.gradient_evaluations += 1
        with preserved(optimizer.model), frozen(constants):
            self._before.restore(optimizer.model)
            with optimizer.ranks.silent():
                loss = run_closure(closure)
            return loss, Points.after(changing_layers(optimizer.blocks), optimizer._inverse_scale, optimizer.ranks)

    def _observe(self, before: Mapping[str, LayerStatistics], after: Mapping[str, LayerStatistics]) -> Events:
        observed: list[tuple[Any, ...]] = []
        for block in self.optimizer.blocks:
            record = before.get(block.layer.name)
            if record is None or not block.part.needs & LOOKING_BACK:
                continue
            later = after.get(block.layer.name)
            if later is None or later.samples != record.samples:
                found = "nothing" if later is None else f"{later.samples} samples"
                raise ArgumentError(
                    f"layer {block.layer.name!r} saw {record.samples} samples before the step and {found} after it: "
                    "the closure must evaluate the same mini-batch each time it is called (take the batch outside it)"
                )
            observed.append((block.part, block.state, record, later, self.optimizer.sides(block)))
        return observe_steps(*zip(*observed, strict=True)) if observed else {}
