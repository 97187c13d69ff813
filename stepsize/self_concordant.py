"""The step of the self-concordant model along a direction (arXiv:1912.13357; PAPERS 3.1)."""

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

__all__ = ["SelfConcordant"]


@dataclass(frozen=True)
class SelfConcordant(StepSizeDeclarations):
    """One step for all layers: t = rho / (delta (c rho + delta)), rho = <g, d>, delta = sqrt(d' C d).

    The minimiser, along the step -t d, of the upper bound that self-concordance puts on the loss (Gao and Goldfarb
    2018; arXiv:1912.13357 with c = 1). Take the exact Hessian of a function whose third derivative along any line is at
    most 2 c times its second derivative to the power 3/2: then the loss falls by at least (eta - log(1 + eta)) / c^2
    with eta = c rho / delta, for every direction with rho > 0. The step is at most 1 / (c delta); c = 0 is the step of
    the quadratic model.

    The source treats the parameters as one vector, and so do we: the bound holds along the common step of all layers
    and not for layers stepped one by one (PAPERS 5 lists that as an option; it has no such guarantee). Ours: rho is the
    mini-batch gradient's slope; where it is not positive (momentum against the gradient), or no curvature is met,
    nothing moves.

    Args:
        curvature: estimator of the quadratic forms; must know the blocks between layers.
        constant: c >= 0, of self-concordance; 1 for a standard self-concordant loss.
        every: renew the forms every so many steps, >= 1.
        decay: of their average along normalised directions, in [0, 1); 0: the newest alone.
    """

    curvature: QuadraticForm = field(default_factory=SampledScores)
    constant: float = 1.0
    every: int = 1
    decay: float = 0.0
    length_free = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_coupled("SelfConcordant", self.curvature)
        require_finite_nonnegative("constant", self.constant)
        require_positive_integer("every", self.every)
        require_interval("decay", self.decay, 0.0, 1.0)

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
        """(L,) equal step sizes, up to lr."""
        assert evidence.gradient_slopes is not None and evidence.squared_norms is not None
        slope = evidence.gradient_slopes.sum().clamp(min=0.0)
        delta = state.along_all(evidence.forms, evidence.squared_norms, self.decay).clamp(min=0.0).sqrt()
        step = slope / (delta * (self.constant * slope + delta))
        step.nan_to_num_(0.0, 0.0, 0.0)
        return evidence.lr * step.expand(len(evidence.names))
