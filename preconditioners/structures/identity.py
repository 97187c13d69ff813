"""The identity: a first-order method as a preconditioner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import StructureDeclarations
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics, Tensors
from ..averages import Average
from ..damping.split import SideDamping
from ..linalg import Computed
from ..protocol import Events, Observation, Request, ScalingLaw, Schedule
from ..state import NoState

__all__ = ["Identity", "Stateless"]


class Stateless(StructureDeclarations):
    """Verbs that do nothing; structures override what they need."""

    def matrices(self, state: Any, damping: SideDamping) -> Sequence[Request]:
        """Nothing to invert."""
        return ()

    def install(self, state: Any, results: Sequence[Computed]) -> None:
        """Nothing to store."""

    def observe_step(
        self, state: Any, before: LayerStatistics, after: LayerStatistics | None, damping: SideDamping
    ) -> Events:
        """Nothing to learn from the step."""
        return {}


@dataclass(frozen=True)
class Identity(Stateless):
    """No preconditioning: the direction is the momentum. Memory: none."""

    needs = Needs.NOTHING
    schedule = Schedule()
    joint = False
    scaling = ScalingLaw(0.0)

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Every parameter of every layer."""
        return tuple(layer.parameters)

    def init(self, layer: Layer, parameters: Tensors) -> NoState:
        """Nothing."""
        return NoState()

    def update(self, state: NoState, observation: Observation, average: Average | None = None) -> None:
        """Nothing to learn."""

    def precondition(self, state: NoState, momentum: Tensors) -> Tensors:
        """The momentum itself, not a copy."""
        return momentum

    def numbers(self, layer: Layer) -> int:
        """None."""
        return 0

    def bounds(self, state: NoState, layer: Layer, damping: SideDamping) -> tuple[float, float]:
        """(1, 1)."""
        return 1.0, 1.0

    def to_dense(self, state: NoState, layer: Layer, damping: SideDamping) -> Tensor:
        """The identity of the layer's size."""
        example = next(iter(layer.parameters.values()))
        size = sum(parameter.numel() for parameter in layer.parameters.values())
        return torch.eye(size, dtype=example.dtype, device=example.device)
