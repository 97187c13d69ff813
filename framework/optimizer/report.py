"""What a step tells: the report of one step and the table of all parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...preconditioners.linalg import fetch

__all__ = ["LayerRow", "StepReport"]


@dataclass(frozen=True)
class StepReport:
    """One step. Tensors stay where they are; :meth:`as_dict` fetches them, all at once.

    Attributes:
        step: index of the step, from 0.
        loss: mini-batch loss before the step, if the step was given a closure; ``None`` after a plain ``backward()``,
            where the optimizer does not see it.
        loss_after: loss of the same mini-batch after it, for methods that look back.
        step_sizes: alpha per layer, as applied.
        damping: lambda; one number, or one per layer where parameter groups give them different values.
        events: counts by name: ``rejected_pairs``, ``damped_first``, ``damped_second`` over all layers.
        refreshes: how many matrices were inverted.
        rescues: how often a factorisation needed more damping; failed ones keep the last good inverse.
        shortened: how often the guard shortened this step.
        skipped: why nothing was done (something was not finite), or ``None``; the same as ``skipped_because``.
    """

    step: int
    loss: Tensor | float | None = None
    loss_after: Tensor | float | None = None
    step_sizes: Mapping[str, Tensor | float] = field(default_factory=dict)
    damping: float | Mapping[str, float] = 0.0
    events: Mapping[str, Tensor] = field(default_factory=dict)
    refreshes: int = 0
    rescues: int = 0
    shortened: int = 0
    skipped: str | None = None

    @property
    def skipped_because(self) -> str | None:
        """``skipped`` under the name that it has in :meth:`as_dict`, where ``skipped`` counts: 0 or 1."""
        return self.skipped

    def counts(self) -> dict[str, int]:
        """All counts as plain integers."""
        numbers = {name: int(value) for name, value in zip(self.events, _fetched(self.events.values()), strict=True)}
        return numbers | self._own_counts()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; ``skipped`` is 0 or 1 there, and ``skipped_because`` the reason."""
        losses = [value for value in (self.loss, self.loss_after) if value is not None]
        numbers = iter(_fetched([*losses, *self.step_sizes.values(), *self.events.values()]))
        plain = {
            "step": self.step,
            "loss": None if self.loss is None else next(numbers),
            "loss_after": None if self.loss_after is None else next(numbers),
            "step_sizes": {name: next(numbers) for name in self.step_sizes},
            "damping": dict(self.damping) if isinstance(self.damping, Mapping) else self.damping,
            "refreshes": self.refreshes,
            "skipped_because": self.skipped_because,
        }
        return plain | {name: int(next(numbers)) for name in self.events} | self._own_counts()

    def _own_counts(self) -> dict[str, int]:
        return {"rescues": self.rescues, "shortened": self.shortened, "skipped": int(self.skipped is not None)}


def _fetched(values: Iterable[Tensor | float]) -> list[float]:
    """As plain numbers; those on a device all at once."""
    given = list(values)
    found = iter(fetch([_exact(value) for value in given if isinstance(value, Tensor)]))
    return [next(found) if isinstance(value, Tensor) else float(value) for value in given]


def _exact(value: Tensor) -> Tensor:
    """Counts and losses share one vector: double precision holds both, where the device has it."""
    return value if value.device.type == "mps" else value.double()


@dataclass(frozen=True)
class LayerRow:
    """One row of ``optimizer.layer_table()``: parameters of one layer and the part that serves them.

    Attributes:
        layer: qualified name.
        kind: ``Linear``, ``Conv2d``, ``Attention``, ... or ``Other``.
        parameters: names within the layer.
        shape: as a matrix (rows, columns with the bias) where it is one, else the number of entries.
        part: the structure, e.g. ``Kronecker(HessianActionBFGS, BFGS)``.
        fallback: whether the structure is the method's fallback.
        bytes: state of the structure and momentum.
        note: why the layer could not be read, if it usually can.
        owner: the process that has the state, where many divide the work; ``None``: every process has it.
    """

    layer: str
    kind: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    part: str
    fallback: bool
    bytes: int
    note: str = ""
    owner: int | None = None
