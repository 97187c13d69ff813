"""Layer-wise adaptive step sizes, reconstructed from the abstract of arXiv:2305.13664v3 (PAPERS section 3).

What the abstract fixes: one step size per layer, from stochastic curvature along the layer's direction, for about one
extra gradient per step. Everything that makes the rule stable without a learning rate is ours, and is a part here: what
the other layers contribute to a layer's curvature (:class:`Coupling`), and which slope it is set against
(:class:`Slope`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import CouplingDeclarations, StepSizeDeclarations
from ..curvature.quadratic_forms import QuadraticForm, SampledScores
from ..curvature.records.needs import Needs
from ..errors import require_finite_nonnegative, require_interval, require_positive_integer
from .averaged_forms import AveragedForms
from .protocol import StepEvidence

__all__ = ["Coupling", "LayerwiseQuadratic", "LeadingSlope", "MomentumSlope", "RowSums", "Separate", "Slope"]


class Coupling(Protocol):
    """How much curvature a layer meets along the common step. May promise more: :class:`.CouplingDeclarations`."""

    def curvature(self, forms: Tensor, norms: Tensor) -> Tensor:
        """(L,) curvature per layer along normalised directions.

        Args:
            forms: (L, L) averaged M along normalised directions u_l = d_l / |d_l|.
            norms: (L,) |d_l|.
        """


@dataclass(frozen=True)
class Separate(CouplingDeclarations):
    """Each layer alone: M_ll, the formula of PAPERS 3.2. Safe only with a factor 1/L on the step (PAPERS 3.5)."""

    def curvature(self, forms: Tensor, norms: Tensor) -> Tensor:
        """The diagonal."""
        return forms.diagonal()


@dataclass(frozen=True)
class RowSums(CouplingDeclarations):
    """Gershgorin: sum_k |M_lk| |d_k| / |d_l|.

    For a common scaling of all steps the model's curvature is at most that of the diagonal matrix of these row sums, so
    all layers can move at once without the factor 1/L; layers that do not interact keep their own step.
    """

    majorises = True

    def curvature(self, forms: Tensor, norms: Tensor) -> Tensor:
        """Weighted row sums."""
        return (forms.abs() @ norms) / norms


class Slope(Protocol):
    """The slope in the numerator, along normalised directions."""

    def value(self, state: AveragedForms, momentum: Tensor, gradient: Tensor) -> Tensor:
        """(L,) slopes >= 0 from <momentum_l, u_l> and <gradient_l, u_l>."""


@dataclass(frozen=True)
class MomentumSlope:
    """<momentum_l, u_l>: never negative, but it lags (PAPERS 3.2)."""

    def value(self, state: AveragedForms, momentum: Tensor, gradient: Tensor) -> Tensor:
        """The momentum's slope."""
        return momentum


@dataclass(frozen=True)
class LeadingSlope:
    """The larger of the momentum's slope and the averaged slope of the gradients themselves.

    Where gradients oscillate, momentum cancels them and <m, u> underestimates how fast the loss falls along u: with
    momentum decay 0.9 the averaged <g, u> is 1.9 times as large for white noise, 19 times for a pure oscillation.

    Args:
        decay: of the average of <g, u>, in [0, 1).
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("decay", self.decay, 0.0, 1.0)

    def value(self, state: AveragedForms, momentum: Tensor, gradient: Tensor) -> Tensor:
        """Element-wise maximum."""
        state.take_slopes(gradient, self.decay)
        return torch.maximum(state.slopes, momentum)


@dataclass(frozen=True)
class LayerwiseQuadratic(StepSizeDeclarations):
    """alpha_l = lr * factor * slope_l / ((curvature_l + lambda) |d_l|): each layer's own quadratic model.

    With ``Separate()``, ``MomentumSlope()`` and factor 1 this is the formula of PAPERS 3.2.

    Args:
        curvature: estimator of the quadratic forms.
        every: renew them every so many steps, >= 1.
        decay: of the average of the forms, in [0, 1).
        damping: lambda >= 0, absolute, on the curvature along a normalised direction.
        coupling: what other layers add to a layer's curvature.
        slope: the numerator.
        factor: > 0; in (0, 2) a quadratic model still decreases, at 1 it is minimised.
    """

    curvature: QuadraticForm = field(default_factory=SampledScores)
    every: int = 1
    decay: float = 0.9
    damping: float = 0.0
    coupling: Coupling = field(default_factory=RowSums)
    slope: Slope = field(default_factory=LeadingSlope)
    factor: float = 2.0
    length_free = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("every", self.every)
        require_interval("decay", self.decay, 0.0, 1.0)
        require_finite_nonnegative("damping", self.damping)
        require_interval("factor", self.factor, 0.0, float("inf"), closed="()")

    @property
    def needs(self) -> Needs:
        """What its curvature needs, and slopes of the raw gradient."""
        return self.curvature.needs | Needs.SLOPES

    def due(self, step: int) -> bool:
        """Every ``every`` steps."""
        return step % self.every == 0

    def init(self, count: int, like: Tensor) -> AveragedForms:
        """Nothing gathered."""
        return AveragedForms.zeros(count, like)

    def propose(self, state: AveragedForms, evidence: StepEvidence) -> Tensor:
        """(L,) step sizes; a layer that meets no curvature does not move."""
        assert evidence.slopes is not None and evidence.squared_norms is not None
        assert evidence.gradient_slopes is not None
        norms = evidence.squared_norms.clamp(min=torch.finfo(evidence.squared_norms.dtype).tiny).sqrt()
        if evidence.forms is not None:
            state.take_forms(evidence.forms / torch.outer(norms, norms), self.decay)
        slope = self.slope.value(state, evidence.slopes / norms, evidence.gradient_slopes / norms).clamp(min=0.0)
        curvature = self.coupling.curvature(state.forms, norms).clamp(min=0.0)
        if self.damping:
            curvature = curvature + self.damping
        step = evidence.lr * self.factor * slope / (curvature * norms)
        return step.nan_to_num_(0.0, 0.0, 0.0)
