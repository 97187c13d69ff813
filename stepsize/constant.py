"""One learning rate for all layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..curvature.declarations import StepSizeDeclarations
from ..curvature.records.needs import Needs
from .protocol import StepEvidence

__all__ = ["ConstantStep"]


@dataclass(frozen=True)
class ConstantStep(StepSizeDeclarations):
    """alpha_l = lr of the layer's parameter group; schedulers act on it."""

    needs = Needs.NOTHING
    proportional = True
    curvature = None

    def due(self, step: int) -> bool:
        """Never measures."""
        return False

    def init(self, count: int, like: Tensor) -> None:
        """No state."""
        return

    def propose(self, state: None, evidence: StepEvidence) -> float | Tensor:
        """The learning rate."""
        return evidence.lr
