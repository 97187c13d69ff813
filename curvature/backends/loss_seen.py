"""What the gradient that reaches the output tells of a cross entropy that no closure returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .passes import OWN, Pauses, accumulates

__all__ = ["SeenLoss"]


class SeenLoss:
    """The cross entropy of the passes since the last :meth:`take`, in plain loops.

    For logits z with probabilities p the loss w (-log p_y) sends w (p - e_y) into the output. The only negative entry
    is that of the label, -w (1 - p_y), so label, weight and loss follow, whatever the user averages, masks or weights.
    With soft labels it is an estimate that vanishes where the gradient does.

    Attributes:
        idle: whether nothing is read: a closure returns the loss.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.idle = False
        self._leaves, self._found = leaves, list[Tensor]()

    def watch(self, output: Tensor, pauses: Pauses, standing: Mapping[int, Tensor] | None = None) -> None:
        """Read the gradient of one pass's output when it comes.

        Args:
            output: of the model.
            pauses: of the backend.
            standing: what stands for the parameters in this pass's graph, where they are sharded.
        """
        filled = self._leaves if standing is None else list(standing.values())
        if self.idle or output.ndim < 2 or not output.requires_grad:
            return
        logits = output.detach()

        def read(gradient: Tensor) -> None:
            if not (OWN.running or pauses.depth) and accumulates(filled):
                self._found.append(cross_entropy_seen(logits, gradient.detach()))

        output.register_hook(read)

    def take(self) -> Tensor | None:
        """The loss of all backwards since the last time; ``None``: nothing was read."""
        found = self._found
        self._found = []
        return torch.stack(found).sum() if found else None


def cross_entropy_seen(logits: Tensor, gradient: Tensor) -> Tensor:
    """Sum of w (-log p_y) over rows, from logits (..., K) and the gradients w (p - e_y) there."""
    least, labels = gradient.float().min(-1, keepdim=True)
    wide = logits.float()
    entropies = wide.logsumexp(-1, keepdim=True) - wide.gather(-1, labels)
    # w (1 - p_y) = -least, so w nll = -least nll / (1 - exp(-nll)), where the quotient is at least 1.
    quotients = (entropies / -torch.expm1(-entropies)).nan_to_num_(1.0).clamp_(min=1.0)
    return torch.sum(quotients * -least.clamp(max=0.0))
