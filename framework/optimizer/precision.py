"""Mixed precision: statistics without the loss scale and in float32, and torch's protocol with a ``GradScaler``.

Under autocast layers compute in half precision, so their records are half precision, and a ``GradScaler`` multiplies
the loss, so every gradient that a hook sees carries its factor. Parts never see either: records are widened to float32
and divided by the scale between the backend and the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from ...curvature.records.statistics import NOTHING_MEASURED, LayerStatistics, SampleGradients
from ...errors import ArgumentError

__all__ = ["UNSCALED_TWICE", "Scaling", "require_plain_loss", "widened"]

UNSCALED_TWICE = (
    "the closure calls scaler.unscale_(optimizer), which a GradScaler allows once in a step, and this method evaluates "
    "the closure again after the step; no parameter and no state has changed. Leave it out: built with "
    "grad_scaler=scaler, the optimizer unscales the gradients itself. To clip, clip the scaled ones: "
    "clip_grad_norm_(model.parameters(), max_norm * scaler.get_scale())"
)
_HALF = (torch.float16, torch.bfloat16)
_SCALED = ("output_gradient", "mean_gradient")
"""Fields of a record that are derivatives of the user's (scaled) loss and not of the model's own likelihood."""


def widened(statistics: Mapping[str, LayerStatistics], inverse_scale: Tensor | None) -> dict[str, LayerStatistics]:
    """Records in float32 where they were half precision, without the loss scale.

    Args:
        statistics: per layer, as measured.
        inverse_scale: 0-dimensional, 1 / scale of the loss; ``None``: the loss was not scaled.
    """
    if inverse_scale is not None:
        return {name: _widened(entry, inverse_scale) for name, entry in statistics.items()}
    result = dict(statistics)
    for name, entry in statistics.items():
        half = entry.sample_gradients is not NOTHING_MEASURED  # rare: let the slow way look at each
        for value in entry.recorded():
            half = half or value.dtype in _HALF
        if half:
            result[name] = _widened(entry, None)
    return result


def require_plain_loss(scaler: torch.amp.GradScaler | None) -> None:
    """Check that Hessian products are those of the user's own loss.

    Raises:
        ArgumentError: if it is scaled.
    """
    if scaler is not None and scaler.is_enabled():
        raise ArgumentError(
            "this method needs products with the Hessian, which are not freed from a loss scale as gradients are; use "
            "sampled curvature, or bf16 without a GradScaler"
        )


class Scaling:
    """The loss scale at one step, and whether the scaler has found an infinite gradient.

    Torch's ``GradScaler.step`` sets ``grad_scale`` and ``found_inf`` on optimizers that handle scaling themselves, and
    calls ``step`` in any case. Inside a closure nobody has called the scaler yet: it is asked to unscale here.

    Args:
        optimizer: the optimizer that steps.
        scaler: of the loop, if there is one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None):
        self._optimizer, self._scaler = optimizer, scaler
        self.found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        self._pending: Tensor | None = getattr(optimizer, "grad_scale", None)
        self._called = self.found_inf is not None
        self._states: Any = None

    def before_closure(self) -> None:
        """A closure cannot run inside ``GradScaler.step``: the scaler has looked for infinities before its backward.

        Nor can it where the scaler believes that the gradients of the step are unscaled already.

        Raises:
            ArgumentError: if that is tried.
        """
        if self._called:
            raise ArgumentError(
                "scaler.step(optimizer, closure) looks at gradients before the closure makes them; build with "
                "grad_scaler=scaler and call optimizer.step(closure), then scaler.update()"
            )
        if self._unscaled:
            raise ArgumentError(
                "the GradScaler has unscaled gradients of this optimizer since its last update(), and would leave "
                "those of this closure scaled: call scaler.update() after every optimizer.step(closure)"
            )
        self._states = self._states_now

    def after_closure(self, again: bool) -> None:
        """Check what a closure has asked of the scaler itself.

        Args:
            again: whether it will be evaluated again.

        Raises:
            ArgumentError: if it has called ``update``, or, where it is evaluated again, ``unscale_``, which a scaler
                allows once.
        """
        if self._states_now is not self._states:
            raise ArgumentError(
                "the closure calls scaler.update(), after which nobody knows how its gradients were scaled; no "
                "parameter and no state has changed. Call it after optimizer.step(closure)"
            )
        if again and self._unscaled:
            raise ArgumentError(UNSCALED_TWICE)

    @property
    def _unscaled(self) -> bool:
        """Whether the scaler has unscaled the optimizer's gradients, and was not updated since."""
        states = self._states_now
        return states is not None and bool(states[id(self._optimizer)]["stage"] != OptState.READY)

    @property
    def _states_now(self) -> Any:
        """The scaler's own notes since its last update; ``None`` where there is no scaler, or one switched off."""
        return None if self._scaler is None or not self._scaler.is_enabled() else self._scaler._per_optimizer_states

    def unscale_gradients(self) -> None:
        """Divide the gradients by the scale unless that has been done, and note whether one is not finite."""
        if self._called:
            if self._pending is not None:
                groups = self._optimizer.param_groups
                gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
                torch._foreach_mul_(gradients, self._pending.double().reciprocal().float())
            return
        if self._scaler is None or not self._scaler.is_enabled():
            return
        with suppress(RuntimeError):  # the user has called unscale_, e.g. to clip
            self._scaler.unscale_(self._optimizer)
        found = self._scaler._found_inf_per_device(self._optimizer).values()
        self.found_inf = torch.stack([value.detach().cpu() for value in found]).sum() if found else None

    def inverse(self, records_gradients: bool, read_loss: bool = False) -> Tensor | None:
        """1 / scale for the records, ``None`` if the loss is not scaled.

        Args:
            records_gradients: whether any record holds gradients of the user's loss.
            read_loss: whether weights of samples, or the loss itself, were read off the gradient at the output.

        Raises:
            ArgumentError: if the loss was scaled by an unknown factor.
        """
        scale = self._pending
        if scale is None and self._scaler is not None and self._scaler.is_enabled():
            scale = self._scaler.scale(torch.ones((), device=self._device))
        if scale is None:
            if self._called and (records_gradients or read_loss):
                raise ArgumentError(
                    "the gradients were unscaled by scaler.unscale_(optimizer), but this method also reads gradients "
                    "inside the model, whose scale it cannot know; build with grad_scaler=scaler"
                )
            return None
        return scale.detach().double().reciprocal().float()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._optimizer.param_groups[0]["params"][0].device
        return device


def _widened(entry: LayerStatistics, inverse_scale: Tensor | None) -> LayerStatistics:
    changes: dict[str, Any] = {}
    for item in fields(entry):
        value = getattr(entry, item.name)
        wide = _unscaled(value, inverse_scale) if isinstance(value, SampleGradients) else _wide(value)
        if inverse_scale is not None and item.name in _SCALED and isinstance(wide, Tensor):
            wide = wide * inverse_scale
        if wide is not value:
            changes[item.name] = wide
    loss = entry.sample_gradients.loss
    if inverse_scale is not None and loss is not None:
        unscaled = tuple(value * inverse_scale for value in loss)
        changes["sample_gradients"] = replace(entry.sample_gradients, loss=unscaled)
    return replace(entry, **changes) if changes else entry


def _unscaled(value: SampleGradients, inverse_scale: Tensor | None) -> SampleGradients:
    """Whole gradients, of which those of the user's loss carry its scale."""
    if inverse_scale is None or value.loss is None:
        return value
    return replace(value, loss=tuple(entry * inverse_scale for entry in value.loss))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    if isinstance(value, tuple) and any(isinstance(entry, Tensor) and entry.dtype in _HALF for entry in value):
        return tuple(_wide(entry) for entry in value)
    return value
