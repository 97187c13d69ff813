"""What a closure does with the gradients that were there before it: accumulated micro-batches, skipped batches.

Under gradient accumulation the first micro-batches go backward before the optimizer is stepped with the closure of the
last one. The gradient is then that of the whole mini-batch, but the closure can evaluate its own micro-batch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ...curvature.backends.passes import accumulates
from ...curvature.layers.sharding import is_sharded, local
from ...errors import ArgumentError

__all__ = ["EarlierGradients", "require_whole_batch"]


class EarlierGradients:
    """Gradients before a closure runs.

    Args:
        parameters: all that the optimizer serves.
        watched: whether :meth:`kept` will be asked. One of the parameters that have a gradient then tells, when the
            closure's own arrives there, whether the earlier one was still in place: no look at the values is needed.
    """

    def __init__(self, parameters: Sequence[Tensor], watched: bool):
        self._parameters = parameters
        self._gradients = [parameter.grad for parameter in parameters]
        self._versions = [None if gradient is None else gradient._version for gradient in self._gradients]
        self._watched: int | None = None
        self._handle, self._arrived = None, False
        self._leftover: Tensor | None = None
        for index, gradient in enumerate(self._gradients) if watched else ():
            if gradient is not None and parameters[index].requires_grad:
                self._watched = index
                self._handle = parameters[index].register_hook(self._arrives)
                break

    def _arrives(self, gradient: Tensor) -> None:
        """Tensor hook: a gradient comes to the watched parameter, whose ``.grad`` is what it was up to now."""
        assert self._watched is not None
        if not self._arrived and accumulates([self._parameters[self._watched]]):
            self._arrived = True
            self._note_leftover()

    def _note_leftover(self) -> None:
        assert self._watched is not None
        earlier = self._gradients[self._watched]
        assert earlier is not None
        untouched = earlier._version == self._versions[self._watched]
        if self._parameters[self._watched].grad is earlier and untouched:
            with torch.no_grad():
                # Cleared to zeros before the closure: nothing is left over. Of what is here of a sharded one: the other
                # processes may not come here, where this one's closure has raised.
                self._leftover = local(earlier).any()

    def finish(self) -> None:
        """The closure is over."""
        if self._handle is not None:
            self._handle.remove()
            if not self._arrived:
                self._note_leftover()
            self._handle = None

    def kept(self) -> bool:
        """Whether the closure added to gradients that it found. Synchronises only if it did not clear them."""
        if self._leftover is None:
            return False
        assert self._watched is not None
        parameter: Any = self._parameters[self._watched]
        if not is_sharded(parameter):
            return bool(self._leftover)
        found = self._leftover.to(torch.int32)
        for group in parameter.device_mesh.get_all_groups():
            distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
        return bool(found)

    def joined(self) -> bool:
        """Whether a gradient has come since; asked only of a closure that returned no loss."""
        for parameter, earlier, version in zip(self._parameters, self._gradients, self._versions, strict=True):
            now = parameter.grad
            if now is None or (now is earlier and now._version == version):
                continue
            if now is not earlier or bool(now.any()):  # else cleared to zeros
                return True
        return False


def require_whole_batch(kept: bool) -> None:
    """Check that a closure that will be evaluated again is all that the gradient is of.

    Raises:
        ArgumentError: if it added to gradients of earlier backward passes.
    """
    if kept:
        raise ArgumentError(
            "the closure added its gradient to one that was there before (accumulated micro-batches, or a closure that "
            "does not clear), but this method evaluates the mini-batch again after the step and must see all of it; no "
            "parameter and no state was changed. Let one closure run every micro-batch: optimizer.zero_grad(), then "
            "each loss.backward(), then return the sum of the losses (in Lightning: accumulate_grad_batches=1)"
        )
