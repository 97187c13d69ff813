"""Which backward passes count: those that add to a parameter's ``.grad``, outside every pause.

A gradient with respect to something else (an adversarial perturbation, a saliency map, the inner gradient of a penalty:
``torch.autograd.grad``, ``backward(inputs=...)``) runs through the same tensors and belongs to no mini-batch. While a
backward runs, autograd knows which leaves it will reach: asking it costs microseconds and no synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["Pauses", "accumulates", "standing_for_backward"]

_stand_ins: list[set[int]] = []
"""Ids of the parameters whose ``.grad`` a running ``torch.autograd.grad`` of our own will fill."""


class Pauses:
    """How deep a backend is paused; shared with the hooks that it has placed on tensors."""

    def __init__(self) -> None:
        self._depth = 0

    def __bool__(self) -> bool:
        """Whether nothing may be recorded now."""
        return self._depth > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """One pause; pauses nest, and end with their block however that is left."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


@contextmanager
def standing_for_backward(parameters: Iterable[Tensor]) -> Iterator[None]:
    """What runs inside is ``torch.autograd.grad``, but stands for a backward that fills these parameters' ``.grad``."""
    _stand_ins.append({id(parameter) for parameter in parameters})
    try:
        yield
    finally:
        _stand_ins.pop()


def accumulates(leaves: Iterable[Tensor]) -> bool:
    """Whether the backward pass that runs now adds to the ``.grad`` of one of these leaves; ask inside a tensor hook.

    Args:
        leaves: parameters; frozen ones get no gradient.
    """
    if _stand_ins:
        return any(id(leaf) in _stand_ins[-1] for leaf in leaves)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False  # torch.func hands every gradient to its caller
    return any(_reached(leaf) for leaf in leaves if leaf.requires_grad)


def _reached(leaf: Tensor) -> bool:
    try:
        found: bool = torch._C._will_engine_execute_node(get_gradient_edge(leaf).node)
    except RuntimeError:  # torch.autograd.grad hands this very leaf's gradient to its caller: nothing is added
        return False
    return found
