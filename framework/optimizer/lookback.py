"""Looking back: the second evaluation of the same mini-batch, the guard, and the secant pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.estimators import records_for_pairs
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import LOOKING_BACK, Needs, Record
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError
from ...preconditioners.looking_back import observe_steps
from ...preconditioners.protocol import Events
from ...stepsize.guard import Trial
from .blocks import Block, full_precision
from .closure import Closure, Snapshot, frozen, preserved, run_closure
from .distributed import Ranks
from .session import Session
from .stepping import Proposal

__all__ = ["LookBack", "Outcome"]


def changing_layers(blocks: Sequence[Block]) -> list[Layer]:
    """Layers with a structure that pairs the parameters themselves."""
    found = {block.layer.name: block.layer for block in blocks if Needs.CHANGES in block.part.needs}
    return list(found.values())


@dataclass(frozen=True)
class Points:
    """Where some layers stand, in full precision.

    Attributes:
        parameters: by layer name, one per parameter.
        gradients: of the user's loss without its scale, the same; zeros for parameters that are frozen or were not
            reached.
    """

    parameters: Mapping[str, Tensors]
    gradients: Mapping[str, Tensors]

    @classmethod
    def before(cls, layers: Sequence[Layer], copies: Mapping[int, Tensor]) -> Points:
        """Ahead of the step: copies of the parameters; gradients as the optimizer steps with them, not copied.

        Args:
            layers: which.
            copies: of parameters that somebody has copied already, by their ids.
        """
        parameters = {
            layer.name: tuple(
                full_precision(copies[id(p)] if id(p) in copies else p.detach().clone())
                for p in layer.parameters.values()
            )
            for layer in layers
        }
        return cls(parameters, {layer.name: _gradients(layer) for layer in layers})

    @classmethod
    def after(cls, layers: Sequence[Layer], inverse_scale: Tensor | None, ranks: Ranks) -> Points:
        """Right after the second backward, whose gradients nobody has unscaled or exchanged. Nothing is copied."""
        found: dict[str, Tensors] = {}
        for layer in layers:
            own = _gradients(layer)
            if inverse_scale is not None:
                own = tuple(value * inverse_scale for value in own)
            found[layer.name] = tuple(ranks.mean(value) for value in own)
        parameters = {
            layer.name: tuple(full_precision(p.detach()) for p in layer.parameters.values()) for layer in layers
        }
        return cls(parameters, found)

    def into(self, records: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        """Records with the parameters and gradients of their layers; those of other layers as they are."""
        return {
            name: replace(entry, parameters=self.parameters[name], gradients=self.gradients[name])
            if name in self.parameters
            else entry
            for name, entry in records.items()
        }


def _gradients(layer: Layer) -> Tensors:
    """One per parameter, zeros where there is none."""
    return tuple(
        full_precision(p.grad if p.requires_grad and p.grad is not None else torch.zeros_like(p)).detach()
        for p in layer.parameters.values()
    )


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

    def __init__(self, optimizer: Session):
        self.optimizer = optimizer
        self._before: Snapshot | None = None
        self._differentiates = False
        self._parameters: list[tuple[Tensor, Tensor]] = []
        self._points = Points({}, {})
        self._slope: Tensor | None = None
        self._penalty: Tensor | float = 0.0

    def prepare(self) -> None:
        """Remember random state and buffers before the first evaluation."""
        active = self.optimizer.method.looks_back_at(self.optimizer._step)
        self._before = Snapshot.take(self.optimizer.model) if active else None

    def remember(self, proposal: Proposal) -> None:
        """What a guard and structures compare with; and the parameters: to subtract a huge step is not exact."""
        guard = self.optimizer.method.guard
        moved = [parameter for move in proposal.moves for parameter in move.parameters] if guard.attempts > 0 else []
        copies = [torch.empty_like(parameter.detach()) for parameter in moved]
        if moved:
            torch._foreach_copy_(copies, moved)
        self._parameters = list(zip(moved, copies, strict=True))
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
            torch._foreach_copy_([entry for entry, _ in self._parameters], [saved for _, saved in self._parameters])
            if shortened == guard.attempts:
                self._parameters, self._points = [], Points({}, {})
                self._adapt_damping(loss, whole, proposal)
                return Outcome(loss, {}, shortened, 0.0)
            fraction *= guard.shrink
            self.optimizer.take(proposal, fraction)
        events = self._observe(self._points.into(before), after)
        self._parameters, self._points = [], Points({}, {})
        self._adapt_damping(loss, whole, proposal)
        return Outcome(loss_after, events, shortened, fraction)

    def _accepts(self, loss: Tensor, loss_after: Tensor, fraction: float) -> bool:
        """Ask the guard, and let it take in a step that stays. One synchronisation."""
        guard = self.optimizer.method.guard
        if self._slope is None:
            before, after = torch.stack([loss.double(), loss_after.double()]).tolist()
            trial = Trial(before, after, None, fraction)
        else:
            numbers = (loss + self._penalty, loss_after + self.optimizer.penalty(), self._slope)
            values = torch.stack([number.double() for number in numbers]).tolist()
            trial = Trial(values[0], values[1], values[2], fraction)
        accepted = guard.accepts(self.optimizer.guard_state, trial)
        if accepted:
            guard.record(self.optimizer.guard_state, trial)
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
                loss = run_closure(closure, optimizer.device)
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
