"""What a step tells: the report of one step and the table of all parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["LayerRow", "StepReport"]


@dataclass(frozen=True)
class StepReport:
    """One step. Tensors stay where they are; :meth:`as_dict` fetches them (one synchronisation each).

    Attributes:
        step: index of the step, from 0.
        loss: mini-batch loss before the step, if the step was given a closure.
        loss_after: loss of the same mini-batch after it, for methods that look back.
        step_sizes: alpha per layer, as applied.
        damping: lambda; one number, or one per layer where parameter groups give them different values.
        events: counts by name: ``rejected_pairs``, ``damped_first``, ``damped_second`` over all layers.
        refreshes: how many matrices were inverted.
        rescues: how often a factorisation needed more damping; failed ones keep the last good inverse.
        shortened: how often the guard shortened this step.
        skipped: why nothing was done (something was not finite), or ``None``.
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

    def counts(self) -> dict[str, int]:
        """All counts as plain integers."""
        numbers = {name: int(value) for name, value in self.events.items()}
        skipped = int(self.skipped is not None)
        return numbers | {"rescues": self.rescues, "shortened": self.shortened, "skipped": skipped}

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "step": self.step,
            "loss": None if self.loss is None else float(self.loss),
            "loss_after": None if self.loss_after is None else float(self.loss_after),
            "step_sizes": {name: float(value) for name, value in self.step_sizes.items()},
            "damping": dict(self.damping) if isinstance(self.damping, Mapping) else self.damping,
            "refreshes": self.refreshes,
            "skipped_because": self.skipped,
        } | self.counts()


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
    """

    layer: str
    kind: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    part: str
    fallback: bool
    bytes: int
    note: str = ""
