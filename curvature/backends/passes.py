"""Which passes count: backwards that add to a parameter's ``.grad``, outside every pause, on the user's own account.

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

__all__ = ["OWN", "Pauses", "accumulates", "extra_backward", "inside_transform", "standing_for_backward"]


class _OwnPasses:
    """What runs now on a backend's account, and not on the user's.

    Attributes:
        running: a backend's own forward or backward, which belongs to no user's loss.
        stand_ins: ids of the parameters whose ``.grad`` a running ``torch.autograd.grad`` of ours will fill.
    """

    def __init__(self) -> None:
        self.running = False
        self.stand_ins: list[set[int]] = []


OWN = _OwnPasses()
"""Shared by all backends: a second optimizer on the same model sees this one's passes through its own hooks."""


class Pauses:
    """How deep a backend is paused; shared with the hooks that it has placed on tensors."""

    def __init__(self) -> None:
        self.depth = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """One pause; pauses nest, and end with their block however that is left."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


@contextmanager
def extra_backward() -> Iterator[None]:
    """Mark every gradient that arrives inside as not the user's; may be nested."""
    before, OWN.running = OWN.running, True
    try:
        yield
    finally:
        OWN.running = before


@contextmanager
def standing_for_backward(parameters: Iterable[Tensor]) -> Iterator[None]:
    """What runs inside is ``torch.autograd.grad``, but stands for a backward that fills these parameters' ``.grad``."""
    OWN.stand_ins.append({id(parameter) for parameter in parameters})
    try:
        yield
    finally:
        OWN.stand_ins.pop()


def inside_transform() -> bool:
    """Whether torch.func (``grad``, ``vmap``) runs now: it hands every gradient to its caller, and fills none."""
    return torch._C._functorch.peek_interpreter_stack() is not None and not torch.compiler.is_compiling()


def accumulates(leaves: Iterable[Tensor]) -> bool:
    """Whether the backward pass that runs now adds to the ``.grad`` of one of these leaves; ask inside a tensor hook.

    Args:
        leaves: parameters; frozen ones get no gradient.
    """
    if OWN.stand_ins:
        return any(id(leaf) in OWN.stand_ins[-1] for leaf in leaves)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False  # torch.func hands every gradient to its caller
    for leaf in leaves:
        if leaf.requires_grad:
            try:
                if torch._C._will_engine_execute_node(get_gradient_edge(leaf).node):
                    return True
            except RuntimeError:  # torch.autograd.grad hands this leaf's gradient to its caller: nothing is added
                continue
    return False
