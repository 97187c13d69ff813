"""Who may watch an optimizer: called around every step that is taken, and never asked for a decision.

An optimizer without observers does nothing for them. An observer reads; it must leave states and parameters as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.damping.split import SideDamping
from .report import StepReport
from .stepping import Proposal

__all__ = ["Observer", "StepTrace"]


@dataclass(frozen=True)
class StepTrace:
    """One step, seen from inside, right after it was taken.

    Attributes:
        report: what every caller gets as ``optimizer.last_report``.
        statistics: by layer, of the mini-batch before the step.
        proposal: directions and step sizes as proposed (a guard may have shortened the step: see ``report``).
        sides: damping of every block, by its key, as it was when secant pairs were damped.
    """

    report: StepReport
    statistics: Mapping[str, LayerStatistics]
    proposal: Proposal
    sides: Mapping[str, SideDamping]


class Observer(Protocol):
    """What ``optimizer.observers`` holds. A step that is skipped or undone is begun and never ended.

    Both verbs are given the optimizer itself, a :class:`~osculate.SecondOrder`.
    """

    def before_step(self, optimizer: Any) -> None:
        """The mini-batch has been evaluated, nothing has been changed yet."""

    def after_step(self, optimizer: Any, trace: StepTrace) -> None:
        """The step is done, and the structures have looked back at it."""
