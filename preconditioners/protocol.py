"""What a preconditioner is to the optimizer: the verbs, and the schedule on which they are called.

One step calls, per block (the parameters of one layer that one part serves): ``update`` when statistics are due,
``matrices`` and ``install`` when inverses are due, ``precondition``, and after the step ``observe_step`` for parts that
look back. Hyper-parameters live in frozen dataclasses, everything that changes in a :class:`State`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import StructureDeclarations, declared
from ..curvature.layers.layer import Layer
from ..curvature.records.needs import Needs
from ..curvature.records.statistics import LayerStatistics, Tensors
from ..errors import ArgumentError, require_positive_integer
from .averages import Average
from .damping.split import SideDamping
from .linalg import Computed
from .operations import Request
from .state import State

__all__ = [
    "Events",
    "Observation",
    "Preconditioner",
    "Refining",
    "Request",
    "ScalingLaw",
    "Schedule",
    "count_events",
    "refining",
]

Events = dict[str, Tensor]
"""Counts of one call, as 0-dimensional tensors (no synchronisation): e.g. ``{"rejected_outputs": 0 or 1}``."""


def count_events(events: Events, found: Events) -> None:
    """Add what was found to events, in place; counts of the same event are summed."""
    for name, count in found.items():
        value = count.long()
        events[name] = events[name] + value if name in events else value


@dataclass(frozen=True)
class Schedule:
    """When statistics and inverses are renewed; k is the step, counted from 0.

    Args:
        statistics: T1 >= 1; statistics are due when k mod T1 = 0.
        inverses: T2 >= 1; inverses are due when k mod T2 = 0. ``None``: only at k = 0 (quasi-Newton methods start from
            one exact inverse).
        eager: inverses are also due at every k <= eager where statistics are due (K-FAC's and MBF's first steps).
        first: first step at which statistics that were warm-started are updated (K-BFGS: 1, the warm start is fresh).
        lag: >= 0, < T2; inverses that are due at step k are computed beside the next ``lag`` steps, from the statistics
            and with the damping of step k, and first used at step k + lag. 0: at once, as at k = 0, at k <= eager,
            and where T2 is ``None``.
    """

    statistics: int = 1
    inverses: int | None = 1
    eager: int = 0
    first: int = 0
    lag: int = 0

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("statistics interval", self.statistics)
        if self.inverses is not None:
            require_positive_integer("inverses interval", self.inverses)
        if self.eager < 0 or self.first < 0:
            raise ArgumentError(f"eager and first must be >= 0, got {self.eager} and {self.first}")
        if self.lag < 0 or (self.inverses is not None and self.lag >= self.inverses):
            raise ArgumentError(
                f"lag must be >= 0 and less than the inverses interval, got {self.lag} of {self.inverses}: inverses "
                "would be replaced before they are used"
            )

    def statistics_due(self, step: int, warm: bool) -> bool:
        """Whether step ``step`` updates the statistics."""
        return step % self.statistics == 0 and not (warm and step < self.first)

    def inverses_due(self, step: int) -> bool:
        """Whether step ``step`` recomputes the inverses."""
        if step == 0:
            return True
        regular = self.inverses is not None and step % self.inverses == 0
        return regular or (step <= self.eager and step % self.statistics == 0)

    def lags(self, step: int) -> bool:
        """Whether inverses that are due at step ``step`` are used ``lag`` steps later."""
        return self.lag > 0 and step > self.eager and self.inverses is not None and step % self.inverses == 0


@dataclass(frozen=True)
class Observation:
    """What ``update`` sees of a block at one step.

    Attributes:
        statistics: measured by the backend and the estimator.
        gradients: gradient of the data loss for the block's parameters.
        momentum: the block's momentum in the part's storage layout (one matrix, or one tensor per parameter).
        decay: coupled weight decay tau >= 0, whose gradient tau * parameter is not contained in ``gradients``; one
            number for all parameters, or one for each.
        parameters: the block's parameters.
    """

    statistics: LayerStatistics | None
    gradients: Tensors
    momentum: Tensors
    decay: float | tuple[float, ...] = 0.0
    parameters: Tensors = ()

    def regularised(self) -> Tensors:
        """Gradients with the weight-decay term; no copy when there is none."""
        decays = self.decay if isinstance(self.decay, tuple) else (self.decay,) * len(self.gradients)
        if not any(decays):
            return self.gradients
        entries = zip(self.gradients, self.parameters, decays, strict=True)
        return tuple(
            torch.add(gradient, parameter, alpha=decay) if decay else gradient for gradient, parameter, decay in entries
        )


@dataclass(frozen=True)
class ScalingLaw:
    """How a structure follows a loss c times as large: powers of c.

    ``to_dense - offset I`` grows by ``c**curvature`` when the dampings of its whole, input and output matrices grow by
    ``c**whole``, ``c**inputs`` and ``c**outputs`` and every gradient by c.

    Args:
        curvature: 2 for a second moment of gradients, 1 for its square root, 0 for none.
        whole: power of :attr:`SideDamping.whole`.
        inputs: power of :attr:`SideDamping.inputs`.
        outputs: power of :attr:`SideDamping.outputs`.
        offset: constant on the diagonal that follows no loss, like Adam's epsilon.
    """

    curvature: float
    whole: float = 0.0
    inputs: float = 0.0
    outputs: float = 0.0
    offset: float = 0.0


class Preconditioner(Protocol):
    """A structure: how curvature is stored, damped, inverted and applied for one layer.

    ``joint`` says in which layout it wants momentum and returns directions: ``True`` for one matrix ``[W | b]``,
    ``False`` for one tensor per parameter.

    A part may declare more, from which the contract suite reads what to check and what not
    (:class:`.StructureDeclarations` with the defaults), and have verbs for the blocks of many layers at once. One that
    measures in what was just computed also has the verb of :class:`Refining`.
    """

    @property
    def needs(self) -> Needs:
        """What it asks of the estimator."""

    @property
    def schedule(self) -> Schedule:
        """When statistics and inverses are renewed."""

    @property
    def joint(self) -> bool:
        """The layout of momentum and directions."""

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Names of the layer's parameters that this part can take; empty if it cannot serve the layer."""

    def init(self, layer: Layer, parameters: Tensors) -> State:
        """Fresh state for one layer."""

    def update(self, state: Any, observation: Observation, average: Average | None = None) -> None:
        """Take in new statistics.

        Args:
            state: of the block, written in place.
            observation: of this step.
            average: how the new ones are put together with the old; ``None``, as at every step of training: by the
                part's own rule. A warm start gives a plain average, which takes the place of that rule.
        """

    def matrices(self, state: Any, damping: SideDamping) -> Sequence[Request]:
        """The matrices from which ``precondition`` needs something, and what: by default damped inverses."""

    def install(self, state: Any, results: Sequence[Computed]) -> None:
        """Store the results, in the order of :meth:`matrices`; a failed one (``None``) keeps the last good one."""

    def precondition(self, state: Any, momentum: Tensors) -> Tensors:
        """The preconditioned momentum, in the layout of the argument. Does not modify it; may return it."""

    def observe_step(
        self, state: Any, before: LayerStatistics, after: LayerStatistics | None, damping: SideDamping
    ) -> Events:
        """Look back at the step that was just taken (secant pairs)."""

    def to_dense(self, state: Any, layer: Layer, damping: SideDamping) -> Tensor:
        """The damped curvature matrix over the served parameters (weight row-major, then bias): tests, analysis."""


@runtime_checkable
class Refining(Protocol):
    """A structure with statistics that are measured in the basis of its last refresh (EKFAC, SOAP)."""

    def refine(self, state: Any, observation: Observation) -> None:
        """Called like ``update``, at the same steps, but after ``install`` and before ``precondition``."""


def refining(part: Preconditioner) -> Refining | None:
    """The structure, if it declares that it refines."""
    return cast(Refining, part) if declared(part, StructureDeclarations).refines else None
