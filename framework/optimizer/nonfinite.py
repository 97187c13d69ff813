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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ...curvature.records.statistics import LayerStatistics
from ...errors import ArgumentError, NumericalError
from .blocks import Block
from .lagging import Lagging
from .stepping import StepRule
from .team import Team

__all__ = [
    "Undo",
    "describe_trouble",
    "find_trouble",
    "require_explained",
    "require_finite_loss",
    "spoiled_parameters",
    "sum_of_everything",
]

Statistics = Mapping[str, LayerStatistics]

_SHORT = 4096
"""Tensors up to this size are copied side by side before they are squared: the copy costs less than the calls."""


def sum_of_everything(
    loss: Tensor | None, gradients: Sequence[Tensor], statistics: Iterable[LayerStatistics]
) -> Tensor | None:
    """A number that is finite if a step may begin: of loss, gradients, records, and the squares that moments take.

    One pass over gradients and records, no synchronisation; ``None`` if there are none.
    """
    values = list(gradients)
    for entry in statistics:
        values += [value for value in entry.recorded() if value.is_floating_point()]
    if not values:
        return None
    total = _sum_of_squares(values)
    return total if loss is None else total + loss


def find_trouble(
    loss: Tensor | None,
    gradients: Sequence[Tensor],
    statistics: Iterable[LayerStatistics],
    doubts: Mapping[str, Tensor],
) -> bool:
    """Whether something is not finite before a step: loss, gradients, records, or the squares that second moments take.

    One synchronisation; one pass over gradients and records.

    Args:
        loss: of the closure, if there was one.
        gradients: of all parameters that take part.
        statistics: of all layers.
        doubts: of the layers whose records were compared with their gradients, see :class:`.certificate.Certificate`;
            fetched with the same number.

    Raises:
        ArgumentError: if a layer's records do not explain its gradient.
    """
    total = sum_of_everything(loss, gradients, statistics)
    if total is None:
        return False
    if not doubts:
        return not math.isfinite(total.item())
    number, *found = torch.stack([total.double(), *(value.to(total.device) for value in doubts.values())]).tolist()
    if not math.isfinite(number):
        return True
    require_explained(dict(zip(doubts, found, strict=True)))
    return False


def require_explained(doubts: Mapping[str, float]) -> None:
    """Check that the records of all layers explain their gradients.

    Raises:
        ArgumentError: naming those whose do not.
    """
    bad = [name for name, doubt in doubts.items() if not doubt <= 1.0]
    if bad:
        raise ArgumentError(_UNEXPLAINED.format(layers=", ".join(map(repr, bad))))


_UNEXPLAINED = (
    "what was recorded of layers {layers} does not explain their gradients, so their curvature would be wrong. Likely "
    "causes: .grad still holds the gradient of the last step (call optimizer.zero_grad() before each backward), the "
    "gradient was set to zero without optimizer.zero_grad(), the weight is also used outside the module's own call (a "
    "penalty on it in the loss: use weight_decay=, or a backward of its own inside optimizer.paused()), "
    "the module's forward is not that of its class (or a hook changes what goes in or out, or the gradient), the input "
    "was changed in place after the model had seen it, or the loss contains derivatives of the model (then return its "
    "residuals instead: osculate.build(..., backend='residuals'), docs/residuals.md). Serve these "
    "layers by a part without statistics, ByLayer({{'name': Identity(), 'default': ...}}), take backend='func', or, if "
    "the difference is meant, build with certify_records='never'; no parameter and no state was changed"
)


def describe_trouble(loss: Tensor | None, team: Team, gradients: Sequence[Tensor], statistics: Statistics) -> str:
    """What is not finite, in words for the step report."""
    if loss is not None and not bool(torch.isfinite(loss)):
        return f"the loss is {float(loss)}"
    owners = [block.key for block in team.blocks for _ in block.names]
    for words, finite in (("is not finite", _finite), ("has a square that is not finite", _finite_square)):
        bad = dict.fromkeys(key for key, value in zip(owners, gradients, strict=True) if not finite(value))
        if bad:
            return f"the gradient {words} in layers {', '.join(bad)}"
    for name, entry in statistics.items():
        for label, value in vars(entry).items():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor) and part.is_floating_point() and not _finite_square(part):
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
        parameters: what the step moves, if it looks back: a failed look back and a guard restore them.
        step: number of the step.
        warm: whether statistics were warm-started.
        waits: of every block, whether its state is written only when all that can fail is over; none: of no block.
        lagging: inverses that are begun or installed in this step.

    Memory: as much as the copied states, until the step is over.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        rule: StepRule,
        parameters: Sequence[Tensor],
        step: int,
        warm: bool,
        waits: Sequence[bool] = (),
        lagging: Lagging | None = None,
    ):
        # Numbers are values in these dictionaries, tensors are the originals: the copies stand beside them, but for
        # tensors that are only ever replaced, of which it is enough to hold the old one.
        # Last steps, the rest of what a rule keeps, change when all is over.
        self._rule, self._rule_state = rule, {} if rule.state is None else dict(rule.state.to_dict())
        self._parameters = list(parameters)
        self._lagging, self._pending = lagging, lagging.pending.copy() if lagging and lagging.pending else {}
        landing = {key for key, entry in self._pending.items() if entry.lands <= step} if self._pending else ()
        self._blocks: list[tuple[Block, dict[str, Any]]] = []
        originals = list(parameters)
        for block, waiting in zip(blocks, waits or (False,) * len(blocks), strict=True):
            written = (
                not waiting and (block.statistics_due(step, warm) or block.inverses_due(step) or block.asked.looks_back)
            ) or block.key in landing
            self._blocks.append((block, block.to_dict(state=written)))
            originals += block.storage
            if written:
                originals += block.state.written()
        _gather(self._rule_state.values(), originals)
        self._originals, self._copies = originals, [torch.empty_like(value) for value in originals]
        if originals:
            torch._foreach_copy_(self._copies, originals)

    @property
    def copies(self) -> list[Tensor]:
        """Of the parameters, in their order."""
        return self._copies[: len(self._parameters)]

    def roll_back(self) -> None:
        """Everything as it was, bit for bit."""
        copies = {id(own): copy for own, copy in zip(self._originals, self._copies, strict=True)}
        for parameter, value in zip(self._parameters, self._copies, strict=False):
            parameter.detach().copy_(value)
        for block, values in self._blocks:
            block.load_dict(_with_copies(values, copies))
        self._rule.load_own_state(_with_copies(self._rule_state, copies))
        if self._lagging is not None:
            self._lagging.pending = self._pending


def _gather(values: Iterable[Any], found: list[Tensor]) -> None:
    """Append all tensors of a nested state."""
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            _gather(value.values(), found)
        elif isinstance(value, list | tuple):
            _gather(value, found)


def _with_copies(value: Any, copies: Mapping[int, Tensor]) -> Any:
    """A nested state with the copies in the place of the tensors that they are of."""
    if isinstance(value, Tensor):
        return copies.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: _with_copies(entry, copies) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_copies(entry, copies) for entry in value)
    return value


def _sum_of_squares(values: Sequence[Tensor]) -> Tensor:
    """Of all entries; half precision is squared in float32."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for value in values:
        groups.setdefault((value.dtype, value.device), []).append(value)
    device, sums = values[0].device, []
    for (dtype, place), entries in groups.items():
        half = dtype in (torch.float16, torch.bfloat16)
        if place.type == "cpu" and not half:  # half the time of norms
            flats: list[Tensor] = []
            short: list[Tensor] = []
            for value in entries:
                if value.numel() > _SHORT:
                    flats.append(value.reshape(-1))
                else:
                    short.append(value)
            if short:
                flats.append(_flatten_dense_tensors(short))
            sums += [torch.dot(flat, flat).to(device) for flat in flats]
            continue
        norms = torch._foreach_norm(entries, 2, torch.float32) if half else torch._foreach_norm(entries)
        sums.append(torch.stack(list(norms)).square().sum().to(device))
    return torch.stack([value.double() for value in sums]).sum() if len(sums) > 1 else sums[0]


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _finite_square(value: Tensor) -> bool:
    return bool(_sum_of_squares([value]).isfinite())
