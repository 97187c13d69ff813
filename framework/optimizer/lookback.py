"""Looking back: the second evaluation of the same mini-batch, the guard, and the secant pairs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.layers.layer import Layer
from ...curvature.layers.sharding import is_sharded, whole
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError
from ...preconditioners.looking_back import observe_steps
from ...preconditioners.protocol import Events
from ...stepsize.guard import Trial
from ..processes.ranks import Ranks
from ..processes.records import Travel
from .blocks import full_precision
from .closure import Closure, Snapshot, preserved, run_closure
from .observing import observe_waiting
from .precision import UNSCALED_TWICE
from .report import StepReport
from .session import Session
from .stepping import Proposal
from .team import MiniBatch

__all__ = ["LookBack", "Outcome"]


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
                full_precision(copies[id(p)] if id(p) in copies else whole(p.detach()).clone())
                for p in layer.parameters.values()
            )
            for layer in layers
        }
        return cls(parameters, {layer.name: _gradients(layer) for layer in layers})

    @classmethod
    def after(cls, layers: Sequence[Layer], inverse_scale: Tensor | None, ranks: Ranks) -> Points:
        """Right after the second backward, whose gradients nobody has unscaled or exchanged. Nothing is copied.

        Gradients of sharded parameters are exchanged by whoever shards them.
        """
        found: dict[str, Tensors] = {}
        for layer in layers:
            own = _gradients(layer)
            if inverse_scale is not None:
                own = tuple(value * inverse_scale for value in own)
            given = layer.parameters.values()
            found[layer.name] = tuple(
                value if is_sharded(p) else ranks.mean(value) for p, value in zip(given, own, strict=True)
            )
        parameters = {
            layer.name: tuple(full_precision(whole(p.detach())) for p in layer.parameters.values()) for layer in layers
        }
        return cls(parameters, found)

    def into(self, records: Mapping[str, LayerStatistics]) -> Mapping[str, LayerStatistics]:
        """Records with the parameters and gradients of their layers; those of other layers as they are."""
        if not self.parameters:
            return records
        return {
            name: entry.with_fields(parameters=self.parameters[name], gradients=self.gradients[name])
            if name in self.parameters
            else entry
            for name, entry in records.items()
        }


def _gradients(layer: Layer) -> Tensors:
    """One per parameter, zeros where there is none."""
    return tuple(
        full_precision(whole(p.grad if p.requires_grad and p.grad is not None else torch.zeros_like(p))).detach()
        for p in layer.parameters.values()
    )


_NOWHERE = Points({}, {})


@dataclass(frozen=True)
class Outcome:
    """What looking back found, and the fraction of the proposed step that stays."""

    loss: Tensor | None
    events: Events
    shortened: int
    fraction: float = 1.0

    def into(self, report: StepReport) -> StepReport:
        """The report of the step as it was proposed, with what became of it."""
        sizes = report.step_sizes
        if self.shortened:
            sizes = {name: self.fraction * size for name, size in sizes.items()}
        events = {**report.events, **self.events} if self.events else report.events
        return replace(report, loss_after=self.loss, step_sizes=sizes, events=events, shortened=self.shortened)


def require_same_data(before: Sequence[Tensors], after: Sequence[Tensors]) -> None:
    """Check that two evaluations of a closure gave the model the same tensors. Synchronises if they are other objects.

    Small differences are let pass: adversarial inputs depend on the parameters.

    Raises:
        ArgumentError: if they did not.
    """
    same = len(before) == len(after) and all(
        len(old) == len(new) and all(a is b or _nearly(a, b) for a, b in zip(old, new, strict=True))
        for old, new in zip(before, after, strict=True)
    )
    if not same:
        raise ArgumentError(
            "the closure gave the model other data when it was called again: it must evaluate the same mini-batch each "
            "time (take the batch, and what numpy's or python's random numbers make of it, outside of the closure)"
        )


def _nearly(one: Tensor, other: Tensor) -> bool:
    """Whether most of two tensors is the same: another mini-batch differs by about its own size."""
    if one.shape != other.shape or not one.numel():
        return one.shape[:1] != other.shape[:1]  # another number of samples is told layer by layer
    if one.is_floating_point() or one.is_complex():
        return bool((one - other).norm() <= 0.2 * one.norm())
    return bool((one != other).float().mean() <= 0.2)


class LookBack:
    """The look-back phase of one optimizer, at the steps that have one."""

    def __init__(self, session: Session):
        self._session = weakref.ref(session)  # no circle: an optimizer that nobody holds is gone, and its hooks with it
        self._before: Snapshot | None = None
        self._guard: dict[str, Any] | None = None
        self._damping: list[Any] = []
        self._differentiates = False
        self._data: list[Tensors] = []
        self._parameters: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._points = _NOWHERE
        self._slope: Tensor | None = None
        self._penalty: Tensor | float = 0.0

    @property
    def session(self) -> Session:
        """Whose steps these are."""
        session = self._session()
        assert session is not None
        return session

    def prepare(self) -> None:
        """Remember random state and buffers before the first evaluation."""
        self._before, session = Snapshot.take(self.session.modules), self.session
        session.capture.data = [] if session.looks_closely else None
        self._guard = None if session.guard_state is None else deepcopy(dict(session.guard_state.to_dict()))
        self._damping = [group["damping"] for group in session.param_groups]

    def remember(self, proposal: Proposal, parameters: list[Tensor], copies: list[Tensor]) -> None:
        """What a guard and structures compare with; and the parameters: to subtract a huge step is not exact.

        Args:
            proposal: the step that will be taken.
            parameters: all that it moves.
            copies: of these.
        """
        method, changing = self.session.method, self.session.plan.second_look.changing
        if any(is_sharded(parameter) for layer in changing for parameter in layer.parameters.values()):
            copies = []  # of pieces: whole parameters are gathered again
        if method.guard.attempts > 0:
            self._parameters, self._copies = parameters, copies
            if Needs.SLOPES in method.guard.needs:
                self._slope = proposal.slope(method.weight_decay, self.session.together)
                self._penalty = self.session.penalty()
        if changing:
            saved = dict(zip(map(id, parameters), copies, strict=bool(copies)))
            self._points = Points.before(changing, saved)

    def forget(self) -> None:
        """Let go of what was remembered: the step is over."""
        self._before, self._points, self._slope = None, _NOWHERE, None
        self.session.capture.data, self._data = None, []
        self._parameters, self._copies = [], []
        self._guard, self._damping = None, []

    def take_back(self) -> None:
        """Undo what this phase has written beside parameters and blocks."""
        if self._guard is not None:
            self.session.guard_state.load_dict(self._guard)
        for group, value in zip(self.session.param_groups, self._damping, strict=False):
            group["damping"] = value

    def rewind(self) -> None:
        """Random state and buffers as they were before the first evaluation."""
        if self._before is not None:
            self._before.restore()

    def run(self, closure: Closure, batch: MiniBatch, proposal: Proposal) -> Outcome:
        """Evaluate again, shorten the step while the guard refuses it, and let the structures observe it."""
        guard, loss, fraction, shortened = self.session.method.guard, batch.loss, 1.0, 0
        assert loss is not None
        self._data = self.session.capture.data or []
        whole: Tensor | None = None
        while True:
            loss_after, after = self._evaluate(closure)
            whole = loss_after if whole is None else whole
            if guard.attempts == 0 or self._accepts(loss, loss_after, fraction):
                break
            shortened += 1
            torch._foreach_copy_(self._parameters, self._copies)
            if shortened == guard.attempts:
                observe_waiting(batch)
                self._adapt_damping(loss, whole, proposal)
                return Outcome(loss, {}, shortened, 0.0)
            fraction *= guard.shrink
            proposal.take(fraction, self.session.method.weight_decay)
        events = self._observe(batch, self._points.into(batch.statistics), after)
        self._adapt_damping(loss, whole, proposal)
        return Outcome(loss_after, events, shortened, fraction)

    def _accepts(self, loss: Tensor, loss_after: Tensor, fraction: float) -> bool:
        """Ask the guard, and let it take in a step that stays. One synchronisation."""
        guard, slope = self.session.method.guard, None
        if self._slope is None:
            before, after = torch.stack([loss.double(), loss_after.double()]).tolist()
        else:
            numbers = (loss + self._penalty, loss_after + self.session.penalty(), self._slope)
            before, after, slope = torch.stack([number.double() for number in numbers]).tolist()
        trial = Trial(before, after, slope, fraction)
        accepted = guard.accepts(self.session.guard_state, trial)
        if accepted:
            guard.record(self.session.guard_state, trial)
        return accepted

    def _adapt_damping(self, loss: Tensor, loss_after: Tensor, proposal: Proposal) -> None:
        """Let an adaptive damping rule judge the whole proposed step. One synchronisation where it is due."""
        rule = self.session.method.adaptive_damping
        if rule is None or proposal.predicted is None:
            return
        numbers = torch.stack([(loss - loss_after).double(), proposal.predicted.double()]).tolist()
        if self.session.method.guard.attempts == 0 and not math.isfinite(numbers[0]):
            return  # nobody shortens this step: it will be undone, and lambda with it
        for group in self.session.param_groups:
            group["damping"] = rule.adapted(float(group["damping"]), *numbers)

    def _evaluate(self, closure: Closure) -> tuple[Tensor, Mapping[str, LayerStatistics]]:
        """One lean pass: parameter gradients only where they are paired; gradients and buffers end up as they were."""
        session, together = self.session, self.session.together
        with nullcontext() if together is None else together.announcing(session.blocks, False):
            loss, points = self._pass(closure)
            found = session.collect()
            if session.capture.data is not None:
                require_same_data(self._data, session.capture.data)
                session.capture.data = None
            if together is not None:
                meeting = together.meet(loss.new_zeros(()), found, session.all_reached, None)
        if together is not None:
            looking = {name: Travel() for name in session.plan.second_look.records}
            found = together.weighed(found, meeting.samples, session.capture)
            found = together.statistics(found, looking, meeting)
        return session.ranks.mean(loss), points.into(found)

    def _pass(self, closure: Closure) -> tuple[Tensor, Points]:
        """The closure again, with as many parameters held constant as it lets be."""
        constants = () if self._differentiates else self.session.plan.second_look.constants
        try:
            return self._closure_again(closure, constants)
        except RuntimeError as error:
            if self._differentiates or "does not require grad" not in str(error):
                raise
            self._differentiates = True  # torch.autograd.grad in the closure, by parameters, beside its backward
            return self._closure_again(closure, ())

    def _closure_again(self, closure: Closure, constants: Sequence[nn.Parameter]) -> tuple[Tensor, Points]:
        """The closure from the state before the step, with these parameters held constant."""
        session, look = self.session, self.session.plan.second_look
        assert self._before is not None
        session.capture.clear()
        if session.capture.data is not None:
            session.capture.data = []
        session.capture.arm(look.records, "look back")
        session.gradient_evaluations += 1
        # The second pass then computes gradients of pre-activations only.
        frozen = [parameter for parameter in constants if parameter.requires_grad]
        with preserved(session.modules):
            try:
                for parameter in frozen:
                    parameter.requires_grad_(False)
                self._before.restore()
                with session.ranks.silent():
                    again = partial(_run_without_gradients, closure, session.device)
                    together = session.together  # which exchanges nothing here, unless parameters are sharded
                    loss = together.evaluated(again, "again") if together is not None and together.pieces else again()
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(True)
            if not look.changing:
                return loss, _NOWHERE
            return loss, Points.after(look.changing, session._inverse_scale, session.ranks)

    def _observe(
        self, batch: MiniBatch, before: Mapping[str, LayerStatistics], after: Mapping[str, LayerStatistics]
    ) -> Events:
        observed: list[tuple[Any, ...]] = []
        for block in self.session.own_blocks:
            record = before.get(block.layer.name)
            if record is None or record.unseen or not block.asked.looks_back:
                continue
            later = after.get(block.layer.name)
            if later is None or later.samples != record.samples:
                found = "nothing" if later is None else f"{later.samples} samples"
                raise ArgumentError(
                    f"layer {block.layer.name!r} saw {record.samples} samples before the step and {found} after it: "
                    "the closure must evaluate the same mini-batch each time it is called (take the batch outside it)"
                )
            observed.append((block.part, block.state, record, later, self.session.sides(block)))
        observe_waiting(batch)
        return observe_steps(*zip(*observed, strict=True)) if observed else {}


def _run_without_gradients(closure: Closure, device: torch.device) -> Tensor:
    """The closure once more, where parameters that are held constant have no ``.grad``.

    Raises:
        ArgumentError: if the closure stumbles over that.
    """
    try:
        return run_closure(closure, device)
    except RuntimeError as error:
        if "unscale_() has already been called" not in str(error):
            raise
        raise ArgumentError(UNSCALED_TWICE) from error  # of a scaler that the optimizer was not told of
    except (AttributeError, TypeError) as error:
        if "NoneType" not in str(error):
            raise
        raise ArgumentError(
            f"the closure failed when it was evaluated again after the step ({error}): .grad of parameters is None "
            "then, because only the loss is looked at; skip parameters without one (if parameter.grad is not None), as "
            "clip_grad_norm_ does, or change gradients before step() by a method that does not look back"
        ) from error
