"""Damping that adapts itself: lambda falls while the quadratic model predicts well, and rises when it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ...checking import require_fields
from ...curvature.quadratic_forms import QuadraticForm, SampledScores, require_coupled
from ...curvature.records.needs import Needs
from ...errors import require_interval, require_positive_integer
from .split import ChangesLambda, Damping, MeanEigenvalues, SideDamping, Split

__all__ = ["AdaptiveDamping", "LevenbergMarquardt"]


@runtime_checkable
class AdaptiveDamping(Protocol):
    """A damping rule that also changes lambda, from one number per step at which it is due.

    At those steps the mini-batch is evaluated a second time after the step, and the curvature along it is measured.
    """

    minimum: float
    maximum: float

    def sides(self, value: float, positions: int, eigenvalues: MeanEigenvalues | None = None) -> SideDamping:
        """As every damping rule."""

    @property
    def curvature(self) -> QuadraticForm:
        """How the quadratic form of the model is measured."""

    @property
    def needs(self) -> Needs:
        """What that asks of the backend."""

    def due(self, step: int) -> bool:
        """Whether lambda may change after this step."""

    def adapted(self, value: float, actual: float, predicted: float) -> float:
        """lambda after a step.

        Args:
            value: lambda before.
            actual: by how much the mini-batch loss fell; may be negative or not finite.
            predicted: by how much the quadratic model fell along the same step.
        """


@dataclass(frozen=True)
class LevenbergMarquardt(ChangesLambda):
    """lambda <- omega^T lambda if rho > 3/4, lambda / omega^T if rho < 1/4, rho = actual / predicted reduction.

    Implements: Martens 2010, section 4.1; arXiv:1503.05671v7, section 6.5 (T = 5, omega = 19/20). With delta the step
    of all layers together, proposed and taken whole (before a guard shortens it),

        predicted = -<g, delta> - delta' C delta / 2

    with the gradient g of the mini-batch loss and C measured by ``curvature`` on the same mini-batch: for sampled
    scores the Fisher, as in K-FAC. Neither lambda nor weight decay is in the model or in the loss, so rho compares like
    with like (K-FAC's own implementation leaves lambda out too, by default). Momentum is in delta and not in g.

    Where the model predicts no reduction, rho says nothing: lambda stays, unless the loss is no longer finite. lambda
    lives in the parameter groups (``param_groups[...]["damping"]``), so it is saved and reported; each group's value is
    multiplied by the same factor.

    Args:
        inner: how lambda is split over the matrices.
        curvature: measures the form of the model; must know the blocks between layers.
        every: T >= 1 steps; a second evaluation and a measurement each.
        omega: in (0, 1).
        minimum: > 0, lambda never falls below.
        maximum: finite, >= minimum, lambda never rises above (double damping needs less than 1).
        low: below this rho lambda rises, in (0, high).
        high: above this rho lambda falls, in (low, inf).
    """

    inner: Damping = field(default_factory=Split)
    curvature: QuadraticForm = field(default_factory=SampledScores)
    every: int = 5
    omega: float = 0.95
    minimum: float = 1e-8
    maximum: float = 1e8
    low: float = 0.25
    high: float = 0.75

    adapts = True

    def __post_init__(self) -> None:
        require_fields(self)
        self._require_splitting("adapt")
        require_coupled("LevenbergMarquardt", self.curvature)
        require_positive_integer("every", self.every)
        require_interval("omega", self.omega, 0.0, 1.0, closed="()")
        require_interval("minimum", self.minimum, 0.0, math.inf, closed="()")
        require_interval("maximum", self.maximum, self.minimum, math.inf)
        require_interval("high", self.high, 0.0, math.inf, closed="()")
        require_interval("low", self.low, 0.0, self.high, closed="()")

    @property
    def needs(self) -> Needs:
        """What its curvature needs, and slopes."""
        return self.curvature.needs | Needs.SLOPES

    def due(self, step: int) -> bool:
        """After T steps, counted from the first."""
        return (step + 1) % self.every == 0

    def adapted(self, value: float, actual: float, predicted: float) -> float:
        """The rule, inside the bounds."""
        factor = self.omega**self.every
        if not math.isfinite(actual) or (predicted > 0.0 and actual < self.low * predicted):
            value /= factor
        elif predicted > 0.0 and actual > self.high * predicted:
            value *= factor
        return min(max(value, self.minimum), self.maximum)
