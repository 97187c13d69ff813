"""Steps that break down: found before anything is written where that is possible, else undone from copies.

A non-finite loss, gradient or statistic is found by one sum over norms before the step begins, so that not one tensor
of the state has to be touched. A step size that is not finite, or a loss that is not finite after a step, is known too
late for that: methods that could end there start from copies (:class:`Undo`).

For methods that look back this sum is fetched by itself, not together with the losses that a guard compares: between
the two the user's closure runs again, and what runs there cannot be undone. It must not see parameters that were moved
by something that is not finite (it may raise on them, count, or log), nor be called at all in a step that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...curvature.records.needs import LOOKING_BACK
from ...curvature.records.statistics import LayerStatistics, Tensors
from ...errors import ArgumentError, NumericalError
from ...preconditioners.linalg import inner_product
from ...stepsize.constant import ConstantStep
from ..methods.method import Method
from .blocks import Block
from .stepping import StepRule

__all__ = ["Undo", "find_trouble", "is_risky", "require_finite_loss", "spoiled_parameters"]


def find_trouble(
    loss: Tensor | None, gradients: Mapping[str, Tensors | None], statistics: Mapping[str, LayerStatistics]
) -> str | None:
    """What is not finite before a step: loss, gradients, records, or their squares, which enter second moments.

    One synchronisation; one pass over gradients and records.

    Args:
        loss: of the closure, if there was one.
        gradients: per block, ``None`` for blocks that sit the step out.
        statistics: per layer.

    Returns:
        The reason for the step report, or ``None``.

    Raises:
        ArgumentError: if there is no gradient at all.
    """
    present = [value for values in gradients.values() if values is not None for value in values]
    if not present:
        raise ArgumentError("no parameter has a gradient; call loss.backward() before step()")
    records = [value for entry in statistics.values() for value, _ in _records(entry)]
    total = _sum_of_squares([*present, *records])
    number = total if loss is None else total + loss
    if math.isfinite(number.item()):
        return None
    if loss is not None and not bool(torch.isfinite(loss)):
        return f"the loss is {float(loss)}"
    for words, finite in (("is not finite", _finite), ("has a square that is not finite", _finite_square)):
        bad = [key for key, values in gradients.items() if values and not all(finite(value) for value in values)]
        if bad:
            return f"the gradient {words} in layers {', '.join(bad)}"
    for name, entry in statistics.items():
        for value, label in _records(entry):
            if not _finite_square(value):
                return f"the statistics of layer {name} overflow: {label} has a square that is not finite"
    return "the sum of all squared gradients and statistics is not finite"


def spoiled_parameters(blocks: Iterable[Block]) -> str | None:
    """What is wrong before the loss is: parameters that are not finite, and the part that moved them.

    Asked only when something is not finite: nobody pays for it in a run that goes well.
    """
    for block in blocks:
        if not all(_finite(parameter) for parameter in block.parameters):
            return (
                f"the parameters of layer {block.layer.name} are not finite: they never were, or an earlier "
                f"step of {type(block.part).__name__} left the range of their dtype"
            )
    return None


def is_risky(method: Method, step: int) -> bool:
    """Whether a step can break down after its states have been written."""
    unguarded = method.looks_back_at(step) and method.guard.attempts == 0
    return unguarded or not isinstance(method.step_size, ConstantStep)


def require_finite_loss(loss: Tensor | None) -> None:
    """Check the loss after a step that no guard judges. One synchronisation.

    Raises:
        NumericalError: if it is not finite.
    """
    if loss is not None and not bool(torch.isfinite(loss)):
        raise NumericalError(f"the loss of the same mini-batch after the step is {float(loss)}")


class Undo:
    """Copies of what a step is about to write.

    Args:
        blocks: all blocks; a state is copied only if this step writes it.
        rule: the step-size rule.
        parameters: what the step moves and a failed look back must restore.
        step: number of the step.
        warm: whether statistics were warm-started.

    Memory: as much as the copied states, until the step is over.
    """

    def __init__(self, blocks: Iterable[Block], rule: StepRule, parameters: Sequence[Tensor], step: int, warm: bool):
        pairs: list[tuple[Tensor, Tensor]] = []
        self._rule, self._rule_state = rule, _copied(rule.own_state(), pairs)  # last steps change when all is over
        self._parameters = [(parameter, _copied(parameter, pairs)) for parameter in parameters]
        self._blocks: list[tuple[Block, dict[str, Any]]] = []
        for block in blocks:
            looks_back = bool(block.part.needs & LOOKING_BACK)
            written = block.statistics_due(step, warm) or block.inverses_due(step) or looks_back
            values = block.to_dict()
            self._blocks.append((block, _copied(values if written else {**values, "state": None}, pairs)))
        if pairs:
            torch._foreach_copy_([copy for copy, _ in pairs], [value for _, value in pairs])

    def roll_back(self) -> None:
        """Everything as it was, bit for bit."""
        for parameter, value in self._parameters:
            parameter.detach().copy_(value)
        for block, values in self._blocks:
            block.load_dict(values if values["state"] is not None else {**values, "state": block.state.to_dict()})
        self._rule.load_own_state(self._rule_state)


def _copied(value: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """A nested state with memory for a copy of every tensor in its place; ``pairs`` collects (copy, original)."""
    if isinstance(value, Tensor):
        own = value.detach()
        pairs.append((torch.empty_like(own), own))
        return pairs[-1][0]
    if isinstance(value, Mapping):
        return {key: _copied(entry, pairs) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(entry, pairs) for entry in value)
    return value


def _records(entry: LayerStatistics) -> Iterator[tuple[Tensor, str]]:
    """Every floating-point tensor that was recorded of a layer, with its name."""
    for item in fields(entry):
        value = getattr(entry, item.name)
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                yield tensor, item.name


def _sum_of_squares(values: Sequence[Tensor]) -> Tensor:
    """Of all entries; half precision is squared in float32."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for value in values:
        groups.setdefault((value.dtype, value.device), []).append(value.detach())
    device = values[0].device
    sums: list[Tensor] = []
    for (dtype, place), entries in groups.items():
        half = dtype in (torch.float16, torch.bfloat16)
        if place.type == "cpu" and not half:  # half the time of norms
            sums.append(torch.stack([inner_product(value, value) for value in entries]).sum().to(device))
            continue
        norms = torch._foreach_norm(entries, 2, torch.float32) if half else torch._foreach_norm(entries)
        sums.append(torch.stack(list(norms)).square().sum().to(device))
    return torch.stack([value.double() for value in sums]).sum() if len(sums) > 1 else sums[0]


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _finite_square(value: Tensor) -> bool:
    return bool(_sum_of_squares([value]).isfinite())
