"""Evaluating the user's closure: once before the step, and again on the same mini-batch after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError

__all__ = ["Closure", "Snapshot", "frozen", "preserved", "run_closure"]

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Snapshot:
    """Random state and module buffers at one moment, so that a second evaluation sees the same function.

    Dropout masks are drawn again identically, and batch normalisation starts from the same running averages.
    """

    cpu: Tensor
    devices: tuple[tuple[int, Tensor], ...]
    buffers: tuple[Tensor, ...]

    @classmethod
    def take(cls, model: nn.Module) -> Snapshot:
        """The present state. Costs a copy of the buffers and of the generators' states (a few kilobytes)."""
        indices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        states = tuple((index, torch.cuda.get_rng_state(index)) for index in indices)
        return cls(torch.get_rng_state(), states, tuple(buffer.detach().clone() for buffer in model.buffers()))

    def restore(self, model: nn.Module) -> None:
        """Put everything back."""
        torch.set_rng_state(self.cpu)
        for index, state in self.devices:
            torch.cuda.set_rng_state(state, index)
        for buffer, saved in zip(model.buffers(), self.buffers, strict=True):
            buffer.copy_(saved)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Random state, buffers and gradients are the same after the block as before."""
    snapshot = Snapshot.take(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # detached, so that a closure's zero_grad cannot overwrite the tensors we keep
    try:
        yield
    finally:
        with torch.no_grad():
            snapshot.restore(model)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters need no gradient inside: the second pass then computes gradients of pre-activations only."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def run_closure(closure: Closure, device: torch.device) -> Tensor:
    """Call the closure with gradients enabled and check what it returns.

    Args:
        closure: the user's.
        device: of the parameters; a loss that was fetched (``return loss.item()``) goes back there.

    Raises:
        ArgumentError: if it returns no scalar loss.
    """
    with torch.enable_grad():
        loss = closure()
    if isinstance(loss, float | int):
        loss = torch.full((), float(loss), device=device)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ArgumentError(
            f"the closure must return the scalar loss, got {type(loss).__name__}"
            f"{f' of shape {tuple(loss.shape)}' if isinstance(loss, Tensor) else ''}; end it with `return loss`"
        )
    return loss.detach().reshape(())
