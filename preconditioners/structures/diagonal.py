"""Diagonal curvature: Adam, AdaGrad, RMSprop and MBF's rule for biases are instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...checking import require_fields
from ...curvature.declarations import derived
from ...curvature.layers.layer import Layer
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import Tensors
from ...errors import ArgumentError, require_finite_nonnegative
from ..averages import Average, MovingAverage, PlainAverage
from ..damping.split import SideDamping
from ..protocol import Observation, ScalingLaw, Schedule
from ..state import State
from .identity import Stateless

__all__ = ["Diagonal", "DiagonalState"]


@dataclass
class DiagonalState(State):
    """Second moment per parameter, and the weight its average has gathered."""

    second_moment: Tensors
    weight: float


@dataclass(frozen=True)
class Diagonal(Stateless):
    """direction = momentum / (v^power + epsilon), v an average of squared gradients, element by element.

    - Adam: ``power=0.5``, decay 0.999 (arXiv:1412.6980v9, Algorithm 1; its bias correction of v is ``MovingAverage``).
    - RMSprop: ``average=ZeroStartAverage(0.99)``. AdaGrad: ``average=RunningSum()``.
    - MBF's rule for biases and normalisation (PAPERS 2.2): ``source="momentum"``. With heavy-ball momentum
      M = 10 e, e the 0.9/0.1 average, e / (sqrt(v_e) + 1e-8) = M / (sqrt(v_M) + 1e-7): hence ``epsilon=1e-7``.

    Args:
        power: 1/2 or 1.
        average: rule for v.
        epsilon: >= 0, added after the power. With 0 (or too small for the tensor's kind of number) a parameter whose v
            is 0 gets no step, the pseudo-inverse, instead of 0 / 0.
        source: square the ``"gradient"`` (weight decay included when it is coupled, as torch does) or the
            ``"momentum"``.

    Memory: one number per parameter.
    """

    power: float = 0.5
    average: Average = field(default_factory=lambda: MovingAverage(0.999))
    epsilon: float = 1e-8
    source: Literal["gradient", "momentum"] = "gradient"

    needs = Needs.NOTHING
    schedule = Schedule()
    joint = False

    def __post_init__(self) -> None:
        require_fields(self)
        if self.power not in (0.5, 1.0):
            raise ArgumentError(f"power must be 0.5 or 1, got {self.power!r}")
        require_finite_nonnegative("epsilon", self.epsilon)

    @derived
    def scaling(self) -> ScalingLaw:
        """v^power; the damping does not enter."""
        return ScalingLaw(2.0 * self.power, offset=self.epsilon)

    def numbers(self, layer: Layer) -> int:
        """One per parameter."""
        return sum(parameter.numel() for parameter in layer.parameters.values())

    def bounds(self, state: DiagonalState, layer: Layer, damping: SideDamping) -> tuple[float, float]:
        """(epsilon, infinity)."""
        return self.epsilon, float("inf")

    def serves(self, layer: Layer) -> tuple[str, ...]:
        """Every parameter of every layer."""
        return tuple(layer.parameters)

    def init(self, layer: Layer, parameters: Tensors) -> DiagonalState:
        """Zero second moments."""
        return DiagonalState(tuple(torch.zeros_like(parameter) for parameter in parameters), 0.0)

    def update(self, state: DiagonalState, observation: Observation, average: Average | None = None) -> None:
        """v <- keep v + add x^2. A warm start leaves v alone (PAPERS 2.3: these statistics start at 0)."""
        if isinstance(average, PlainAverage):
            return
        self.update_many([state], [observation])

    def update_many(self, states: Sequence[DiagonalState], observations: Sequence[Observation]) -> None:
        """The same for the blocks of many layers, in two operations per weight of the averages."""
        grouped: dict[tuple[float, float, float], tuple[list[Tensor], list[Tensor]]] = {}
        for state, observation in zip(states, observations, strict=True):
            coefficients = self.average.coefficients(state.weight)
            moments, values = grouped.setdefault(coefficients, ([], []))
            moments.extend(state.second_moment)
            values.extend(observation.regularised() if self.source == "gradient" else observation.momentum)
            state.weight = coefficients[2]
        for (keep, add, _), (moments, values) in grouped.items():
            torch._foreach_mul_(moments, keep)
            torch._foreach_addcmul_(moments, values, values, value=add)

    def precondition(self, state: DiagonalState, momentum: Tensors) -> Tensors:
        """momentum / (v^power + epsilon), 0 where the denominator is 0."""
        return self.precondition_many([state], [momentum])[0]

    def precondition_many(self, states: Sequence[DiagonalState], momenta: Sequence[Tensors]) -> list[Tensors]:
        """The same for the blocks of many layers, in a few operations."""
        moments = [moment for state in states for moment in state.second_moment]
        if self.power == 0.5:
            scales = list(torch._foreach_sqrt(moments))
            torch._foreach_add_(scales, self.epsilon)
        else:
            scales = list(torch._foreach_add(moments, self.epsilon))
        for scale in scales:
            if self.epsilon < torch.finfo(scale.dtype).tiny:  # a larger one keeps every denominator above 0
                scale.masked_fill_(scale == 0, torch.inf)
        found = iter(torch._foreach_div([value for values in momenta for value in values], scales))
        return [tuple(next(found) for _ in values) for values in momenta]

    def to_dense(self, state: DiagonalState, layer: Layer, damping: SideDamping) -> Tensor:
        """diag(v^power + epsilon)."""
        return torch.diag(torch.cat([self._scale(moment).flatten() for moment in state.second_moment]))

    def _scale(self, moment: Tensor) -> Tensor:
        return (moment.sqrt() if self.power == 0.5 else moment.clone()).add_(self.epsilon)
