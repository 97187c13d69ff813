"""What one call of one layer left behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["EMPTY", "Arrange", "BatchSecond", "Call", "Calls", "ParameterSum", "column_sum"]


EMPTY = "it has no statistics: skip empty batches, or run them inside optimizer.paused() or torch.no_grad()"
"""What an error about a batch without samples says."""


class Arrange(Protocol):
    """Brings the output of a call, or a gradient at it, into the form (N, ...) that the layer's adapter reads."""

    def tokens(self, value: Tensor) -> Tensor:
        """The batch axis first; a view."""

    def __call__(self, value: Tensor) -> Tensor:
        """The batch axis first, with every output of the layer."""


@dataclass(frozen=True)
class BatchSecond:
    """Samples are axis 1."""

    def tokens(self, value: Tensor) -> Tensor:
        """(S, N, ...) to (N, S, ...)."""
        return value.transpose(0, 1)

    __call__ = tokens


@dataclass
class Call:
    """One call of one layer.

    Attributes:
        pass_index: number of the forward pass of the whole model.
        samples: N.
        positions: S of this call.
        arrange: how tensors in the output's shape are read; ``None``: as they are.
        group: number of the module's call that this is a part of (attention calls several maps of one weight).
        complete: its gradient has arrived.
        labelled: it belongs to a pass of the whole model for which labels were drawn.
    """

    pass_index: int
    samples: int
    positions: int
    arrange: Arrange | None = None
    group: int | None = None
    input: Tensor | None = None
    gradient: Tensor | None = None
    sampled: Tensor | None = None
    roots: Tensor | None = None
    output_sum: Tensor | None = None
    gradient_sum: Tensor | None = None
    edge: GradientEdge | None = None
    complete: bool = False
    labelled: bool = False

    def take_gradient(self, gradient: Tensor) -> None:
        """Keep the gradient of one backward; several through one forward add up, as they do in ``.grad``."""
        value = self.arranged(gradient.detach())
        self.gradient = value if self.gradient is None else self.gradient + value

    def take_gradient_sum(self, value: Tensor) -> None:
        """The same for its sum over samples and positions."""
        self.gradient_sum = value if self.gradient_sum is None else self.gradient_sum + value

    def forget_gradient(self) -> None:
        """As before the first backward: the user has cleared ``.grad``, and may go backward again."""
        self.gradient = self.gradient_sum = None
        self.complete = self.labelled = False

    def arranged(self, value: Tensor) -> Tensor:
        """A tensor in the output's shape, batch axis first."""
        return value if self.arrange is None else self.arrange(value)

    def arranged_all(self, values: Tensor) -> Tensor:
        """The same for several tensors (K, ...)."""
        return values if self.arrange is None else torch.vmap(self.arrange)(values)


class Calls:
    """The calls of one layer in the order they were made, while somebody holds them.

    A call is held by the autograd graph it belongs to until its gradient arrives, and by this list from then on: an
    evaluation pass whose graph is thrown away leaves nothing behind, whether or not it ran under ``torch.no_grad()``.
    """

    references: list[weakref.ref[Call]]
    """Empty for a layer that nothing was recorded of."""

    def __init__(self) -> None:
        self.references = []
        self._kept: list[Call] = []

    def __iter__(self) -> Iterator[Call]:
        """Calls that are still alive."""
        found = []
        for reference in self.references:
            call = reference()
            if call is not None:
                found.append(call)
        return iter(found)

    def append(self, call: Call) -> None:
        """Note a call without holding it."""
        self.references = [reference for reference in self.references if reference() is not None]
        self.references.append(weakref.ref(call))

    def keep(self, call: Call) -> None:
        """Hold a call from now on."""
        if not any(call is other for other in self._kept):
            self._kept.append(call)

    def discard_complete(self) -> None:
        """Forget the gradients that have arrived; a call lives on if its graph does, for another backward."""
        self._kept = [call for call in self._kept if not call.complete]
        for call in self:
            if call.complete:
                call.forget_gradient()
        self.references = [reference for reference in self.references if reference() is not None]

    def clear(self) -> None:
        """Forget every call, and let go of graphs that nobody ran backward."""
        for call in self:
            call.edge = None
        self.references, self._kept = [], []  # without references nothing is kept either


@dataclass
class ParameterSum:
    """Parameter gradients of the sampled loss, summed over the samples of one pass."""

    pass_index: int
    samples: int
    gradients: tuple[Tensor, ...]


def column_sum(value: Tensor) -> Tensor:
    """Sum over samples and positions, half precision in float32: secant pairs are differences of such sums."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.sum((0, 1), dtype=torch.float32 if half else None)
