"""Joint layer-wise step sizes: all layers' steps from one L x L system. Ours (PAPERS 7.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import SignDeclarations, StepSizeDeclarations, declared, derived
from ..curvature.quadratic_forms import QuadraticForm, SampledScores
from ..curvature.records.needs import Needs
from ..errors import require_finite_nonnegative, require_interval, require_positive_integer
from .averaged_forms import AveragedForms
from .protocol import StepEvidence
from .signs import Clipped, SignRule

__all__ = ["JointLayerwise"]


@dataclass(frozen=True)
class JointLayerwise(StepSizeDeclarations):
    """Newton's method in the L-dimensional space spanned by the layers' directions.

    With directions normalised, u_l = d_l / |d_l|, and M the averaged curvature between layers along them,

        (M + lambda I + rho diag(M)) beta = r,    r_l = <momentum_l, u_l>,    alpha_l = lr beta_l / |d_l|.

    Minimises the quadratic model over all layers' steps together; a rule that treats layers one by one needs a factor
    1/L to be safe (PAPERS 3.5), this one does not: for a model linear in theta with full-batch Gauss-Newton curvature
    and lambda = rho = 0 the error never increases (T18). That holds while no beta_l is negative, and with
    ``Unrestricted()`` or ``Safeguarded()`` always; the default clips at zero and promises nothing.

    Args:
        curvature: estimator of M.
        every: renew M every so many steps, >= 1.
        decay: of the average of M, in [0, 1).
        ridge: lambda >= 0, absolute.
        relative_ridge: rho >= 0, relative to the diagonal.
        sign: what becomes of negative steps.
    """

    curvature: QuadraticForm = field(default_factory=SampledScores)
    every: int = 1
    decay: float = 0.8
    ridge: float = 0.0
    relative_ridge: float = 0.1
    sign: SignRule = field(default_factory=Clipped)
    length_free = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("every", self.every)
        require_interval("decay", self.decay, 0.0, 1.0)
        require_finite_nonnegative("ridge", self.ridge)
        require_finite_nonnegative("relative_ridge", self.relative_ridge)

    @derived
    def signed(self) -> bool:
        """Whether a layer may go against its direction."""
        return declared(self.sign, SignDeclarations).signed

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
        norms = evidence.squared_norms.clamp(min=tiny).sqrt()
        if evidence.forms is not None:
            state.take_forms(evidence.forms / torch.outer(norms, norms), self.decay)
        matrix = ridged(state.forms, self.relative_ridge, self.ridge)
        slopes = evidence.slopes / norms
        chosen = self.sign.choose(solve_semidefinite(matrix, slopes), matrix, slopes)
        return evidence.lr * chosen / norms


def ridged(forms: Tensor, relative: float, absolute: float) -> Tensor:
    """M + lambda I + rho diag(M), a copy."""
    matrix = forms.clone()
    diagonal = matrix.diagonal().add_(forms.diagonal(), alpha=relative)
    if absolute:
        diagonal.add_(absolute)
    return matrix


def solve_semidefinite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve with a symmetric positive semi-definite L x L matrix after scaling its diagonal to one.

    Rows without curvature (a layer whose direction does nothing) get a zero. A matrix that is not semi-definite (an
    estimate of the Hessian) has no joint minimum: the diagonal matrix of its absolute row sums, which is above it, is
    solved instead. Always double precision: L is small.

    Args:
        matrix: (L, L).
        right: (L,), or (L, K) for K systems at once.
    """
    wide = matrix.double()
    scale = wide.diagonal().rsqrt().nan_to_num_(0.0, 0.0, 0.0).unsqueeze(1)  # 0 where there is no positive curvature
    scaled = wide * (scale * scale.T)
    scaled.diagonal().fill_(1.0 + 1e-10)
    factor, info = torch.linalg.cholesky_ex(scaled)
    columns = scale * right.reshape(len(scale), -1)
    solution = torch.cholesky_solve(columns, factor)
    solution = scale * torch.where(info == 0, solution, columns / scaled.abs().sum(1, keepdim=True))
    return solution.nan_to_num_(0.0, 0.0, 0.0).reshape(right.shape).to(right.dtype)
