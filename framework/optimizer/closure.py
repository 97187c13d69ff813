"""Evaluating the user's closure, and leaving everything else as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError

__all__ = ["Closure", "Snapshot", "loss_of", "preserved", "require_real", "run_closure"]

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Snapshot:
    """Random state and module buffers at one moment, so that a second evaluation sees the same function.

    Dropout masks are drawn again identically, and batch normalisation starts from the same running averages.
    """

    cpu: Tensor
    devices: tuple[tuple[int, Tensor], ...]
    buffers: tuple[tuple[Mapping[str, Tensor | None], str, Tensor], ...]

    @classmethod
    def take(cls, modules: Iterable[nn.Module]) -> Snapshot:
        """The present state. Costs a copy of the buffers and of the generators' states (a few kilobytes).

        Args:
            modules: all of the model.
        """
        indices: set[int] = set()
        buffers: list[tuple[Mapping[str, Tensor | None], str, Tensor]] = []
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.device.type == "cuda":
                    indices.add(parameter.device.index)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    buffers.append((module._buffers, name, buffer.detach().clone()))
        states = tuple((index, torch.cuda.get_rng_state(index)) for index in sorted(indices)) if indices else ()
        return cls(torch.default_generator.get_state(), states, tuple(buffers))

    def restore(self) -> None:
        """Put everything back."""
        torch.default_generator.set_state(self.cpu)
        for index, state in self.devices:
            torch.cuda.set_rng_state(state, index)
        for owner, name, saved in self.buffers:
            buffer = owner[name]  # by name: the pass in between may have put another tensor in its place
            if buffer is not None:
                buffer.copy_(saved)


@contextmanager
def preserved(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Random state, buffers and gradients are the same after the block as before.

    Args:
        modules: all of the model.
    """
    snapshot = Snapshot.take(modules)
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in gradients:
        parameter.grad = None  # detached, so that a closure's zero_grad cannot overwrite the tensors we keep
    try:
        yield
    finally:
        with torch.no_grad():
            snapshot.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient


def run_closure(closure: Closure, device: torch.device) -> Tensor:
    """Call the closure with gradients enabled and check what it returns.

    Args:
        closure: the user's.
        device: of the parameters; a loss that was fetched (``return loss.item()``) goes back there.

    Raises:
        ArgumentError: if it returns no scalar loss.
    """
    with torch.enable_grad():
        return loss_of(closure(), device)


def require_real(loss: Tensor) -> None:
    """Check the kind of number that a closure has returned.

    Raises:
        ArgumentError: if it is complex.
    """
    if loss.is_complex():
        raise ArgumentError(
            f"the closure must return a real loss, got one of {loss.dtype}; end it with `return loss.real`, or "
            "`return loss.abs()`, whichever was differentiated"
        )


def loss_of(loss: Any, device: torch.device) -> Tensor:
    """The scalar that a closure has returned, detached.

    Raises:
        ArgumentError: if it is none.
    """
    if isinstance(loss, float | int):
        loss = torch.full((), float(loss), device=device)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        if isinstance(loss, Mapping):
            raise ArgumentError(
                f"the closure must return the scalar loss, got a dictionary ({', '.join(map(str, loss))}); end it with "
                "`return loss`. If these are residuals: osculate.build(..., backend='residuals') takes them, and so do "
                "methods over the whole model, osculate.build('lm', model)"
            )
        raise ArgumentError(
            f"the closure must return the scalar loss, got {type(loss).__name__}"
            f"{f' of shape {tuple(loss.shape)}' if isinstance(loss, Tensor) else ''}; end it with `return loss`"
        )
    require_real(loss)
    return loss.detach().reshape(())
