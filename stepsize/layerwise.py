"""Layer-wise adaptive step sizes, reconstructed from the abstract of arXiv:2305.13664v3 (PAPERS section 3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..curvature.quadratic_forms import QuadraticForm, SampledScores
from ..curvature.statistics import Needs
from ..errors import require_finite_nonnegative, require_interval, require_positive_integer
from .averages import AveragedForms
from .protocol import StepEvidence

__all__ = ["LayerwiseQuadratic"]


@dataclass(frozen=True)
class LayerwiseQuadratic:
    """alpha_l = lr <momentum_l, d_l> / (d_l' C_l d_l + lambda |d_l|^2): each layer's own damped quadratic model.

    Args:
        curvature: estimator of the forms; only their diagonal is used.
        every: renew them every so many steps, >= 1.
        decay: of the average of c_l = d_l' C_l d_l / |d_l|^2, in [0, 1).
        damping: lambda >= 0, absolute.
    """

    curvature: QuadraticForm = field(default_factory=SampledScores)
    every: int = 1
    decay: float = 0.9
    damping: float = 10.0

    def __post_init__(self) -> None:
        require_positive_integer("every", self.every)
        require_interval("decay", self.decay, 0.0, 1.0)
        require_finite_nonnegative("damping", self.damping)

    @property
    def needs(self) -> Needs:
        """What its curvature needs."""
        return self.curvature.needs

    def due(self, step: int) -> bool:
        """Every ``every`` steps."""
        return step % self.every == 0

    def init(self, count: int, like: Tensor) -> AveragedForms:
        """Nothing gathered."""
        return AveragedForms.zeros(count, like)

    def propose(self, state: AveragedForms, evidence: StepEvidence) -> Tensor:
        """(L,) step sizes."""
        assert evidence.slopes is not None and evidence.squared_norms is not None
        tiny = torch.finfo(evidence.squared_norms.dtype).tiny
        squared = evidence.squared_norms.clamp(min=tiny)
        if evidence.forms is not None:
            state.take(torch.diag(evidence.forms.diagonal() / squared), self.decay)
        curvature = state.forms.diagonal().clamp(min=0.0) + self.damping
        return evidence.lr * evidence.slopes / squared / curvature
