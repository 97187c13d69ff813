"""What one call of one layer left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..layers.adapters import LayerAdapter
from .ownership import Ownership

__all__ = ["EMPTY", "Arrange", "BatchSecond", "Call", "Calls", "ParameterSum", "column_sum", "total_measured"]


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
        layer: its name.
        pass_index: number of the forward pass of the whole model.
        samples: size R of the first axis: N, unless ``ownership`` says more.
        positions: S of this call.
        arrange: how tensors in the output's shape are read; ``None``: as they are.
        group: number of the module's call that this is a part of (attention calls several maps of one weight).
        complete: its gradient has arrived.
        labelled: it belongs to a pass of the whole model for which labels were drawn.
        kept: :class:`Calls` holds it.
        task: autograd's number of the backward that made it complete.
        version: of its input when it was recorded: a later change in place would change the record.
        mark: of a certified call, the sum of its input when its gradient came: tells of changes that no version counts.
        adapter: how it is read, where its arguments decide that; ``None``: as the layer.
        explained: what its record says of the gradient along a random direction, and what rounding may make of it.
        ownership: the sample of every row, where the first axis does not count the samples.
        measured: what structures measure themselves, by name.
        copies: how often its rows stand in the record, once for every sample, where all samples share them.
    """

    layer: str
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
    kept: bool = False
    task: int = -1
    version: int = 0
    explained: tuple[Tensor, Tensor] | None = None
    mark: Tensor | None = None
    adapter: LayerAdapter | None = None
    ownership: Ownership | None = None
    copies: int = 1
    measured: dict[str, Tensor] | None = None

    def take_gradient(self, gradient: Tensor) -> None:
        """Keep the gradient of one backward; several through one forward add up, as they do in ``.grad``."""
        value = gradient.detach() if self.arrange is None else self.arrange(gradient.detach())
        self.gradient = value if self.gradient is None else self.gradient + value

    def take_gradient_sum(self, value: Tensor) -> None:
        """The same for its sum over samples and positions."""
        self.gradient_sum = value if self.gradient_sum is None else self.gradient_sum + value

    def forget_gradient(self) -> None:
        """As before the first backward: the user has cleared ``.grad``, and may go backward again."""
        self.gradient = self.gradient_sum = self.explained = self.mark = None
        self.complete = self.labelled = self.kept = False

    def arranged(self, value: Tensor) -> Tensor:
        """A tensor in the output's shape, batch axis first."""
        return value if self.arrange is None else self.arrange(value)

    def arranged_all(self, values: Tensor) -> Tensor:
        """The same for several tensors (K, ...)."""
        return values if self.arrange is None else torch.vmap(self.arrange)(values)


class Calls:
    """The calls of all layers in the order they were made, while somebody holds them.

    A call is held by the autograd graph it belongs to until its gradient arrives, and by this list from then on: an
    evaluation pass whose graph is thrown away leaves nothing behind, whether or not it ran under ``torch.no_grad()``.
    """

    def __init__(self) -> None:
        self.made: list[weakref.ref[Call]] = []
        self._kept: list[Call] = []
        self._task, self._tasks = -1, 0  # the last backward, and how many there were
        self._limit = 64  # beyond which those that have vanished are dropped

    def alive(self) -> list[Call]:
        """Calls that are still there."""
        found = []
        for reference in self.made:
            call = reference()
            if call is not None:
                found.append(call)
        return found

    def append(self, call: Call) -> None:
        """Note a call without holding it."""
        if len(self.made) >= self._limit:
            self.made = [reference for reference in self.made if reference() is not None]
            self._limit = 64 + 2 * len(self.made)
        self.made.append(weakref.ref(call))

    def keep(self, call: Call) -> None:
        """Hold a call from now on."""
        if not call.kept:
            call.kept = True
            self._kept.append(call)

    def begin_task(self, task: int) -> bool:
        """Note which backward runs; returns whether there was another before it."""
        if task != self._task:
            self._task, self._tasks = task, self._tasks + 1
        return self._tasks > 1

    def discard_before(self, layer: str, task: int) -> None:
        """Forget a layer's gradients of earlier backwards, which somebody has thrown away."""
        for call in self.alive():
            if call.layer == layer and call.complete and call.task != task:
                call.forget_gradient()
        self._kept = [call for call in self._kept if call.kept]

    def discard_thrown_away(self, is_gone: Callable[[str], bool]) -> None:
        """Forget gradients that are in no parameter's ``.grad`` any more, by whatever way they were thrown away.

        Args:
            is_gone: whether those of a layer are.
        """
        gone: dict[str, bool] = {}
        for call in self.alive():
            if call.complete:
                if call.layer not in gone:
                    gone[call.layer] = is_gone(call.layer)
                if gone[call.layer]:
                    call.forget_gradient()
        self._kept = [call for call in self._kept if call.kept]

    def discard_complete(self) -> None:
        """Forget the gradients that have arrived; a call lives on if its graph does, for another backward."""
        self.discard([call for call in self.alive() if call.complete])

    def discard(self, calls: Iterable[Call]) -> None:
        """Forget the gradients of these calls."""
        for call in calls:
            call.forget_gradient()
        self._kept = [call for call in self._kept if call.kept]
        self.made = [reference for reference in self.made if reference() is not None]

    def clear(self) -> None:
        """Forget every call, and let go of graphs that nobody ran backward."""
        for reference in self.made:
            call = reference()
            if call is not None:
                call.edge = None
        self.made, self._kept = [], []  # without references nothing is kept either
        self._task, self._tasks = -1, 0


@dataclass
class ParameterSum:
    """Parameter gradients of the sampled loss, summed over the samples of one pass."""

    pass_index: int
    samples: int
    gradients: tuple[Tensor, ...]


def total_measured(calls: Iterable[Call]) -> dict[str, Tensor]:
    """What structures have measured themselves, of all calls."""
    result: dict[str, Tensor] = {}
    for call in calls:
        for name, value in (call.measured or {}).items():
            result[name] = result[name] + value if name in result else value
    return result


def column_sum(value: Tensor) -> Tensor:
    """Sum over samples and positions, half precision in float32: secant pairs are differences of such sums."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.sum((0, 1), dtype=torch.float32 if half else None)
