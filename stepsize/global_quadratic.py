"""One step for all layers from the quadratic model along the common direction (arXiv:1503.05671v7, section 6.4)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import StepSizeDeclarations
from ..curvature.quadratic_forms import QuadraticForm, SampledScores, require_coupled
from ..curvature.records.needs import Needs
from ..errors import require_finite_nonnegative, require_interval, require_positive_integer
from .averaged_forms import AveragedForms
from .protocol import StepEvidence

__all__ = ["GlobalQuadratic"]


@dataclass(frozen=True)
class GlobalQuadratic(StepSizeDeclarations):
    """alpha = sum_l r_l / (sum_kl M_kl + lambda sum_l |d_l|^2), the same for every layer.

    K-FAC's rescaling of its direction with the exact Fisher (section 6.4, equation for alpha), without the momentum
    coefficient of section 7. r_l = <momentum_l, d_l> as in ``JointLayerwise``, which is this rule with one unknown per
    layer instead of one in all; without momentum r is the gradient's slope, and the step minimises the damped quadratic
    model along d. Where the model has no minimum along d (curvature not positive) nothing moves.

    Args:
        curvature: estimator of M; must know the blocks between layers.
        damping: lambda >= 0, absolute, the rule's own (K-FAC uses the sum of its damping and weight decay).
        every: renew M every so many steps, >= 1.
        decay: of the average of M along normalised directions, in [0, 1); 0: the newest alone, as in the paper.
    """

    curvature: QuadraticForm = field(default_factory=SampledScores)
    damping: float = 0.0
    every: int = 1
    decay: float = 0.0
    length_free = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_coupled("GlobalQuadratic", self.curvature)
        require_finite_nonnegative("damping", self.damping)
        require_positive_integer("every", self.every)
        require_interval("decay", self.decay, 0.0, 1.0)

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
        """(L,) equal step sizes, up to lr."""
        assert evidence.slopes is not None and evidence.squared_norms is not None
        curvature = (
            state.along_all(evidence.forms, evidence.squared_norms, self.decay)
            + self.damping * evidence.squared_norms.sum()
        )
        step = evidence.slopes.sum().clamp(min=0.0) / curvature
        step.masked_fill_(curvature <= 0, 0.0).nan_to_num_(0.0, 0.0, 0.0)
        return evidence.lr * step.expand(len(evidence.names))
