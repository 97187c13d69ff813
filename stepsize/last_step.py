"""Joint layer steps along each layer's new direction and its last step: momentum chosen by the model. Ours."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import SignDeclarations, StepSizeDeclarations, declared, derived
from ..curvature.quadratic_forms import QuadraticForm, SampledScores, require_coupled
from ..curvature.records.needs import Needs
from ..errors import ArgumentError, require_finite_nonnegative, require_interval, require_positive_integer
from .averaged_forms import AveragedForms
from .joint import ridged, solve_semidefinite
from .protocol import StepEvidence
from .signs import Clipped, SignRule

__all__ = ["JointWithLastStep"]


@dataclass(frozen=True)
class JointWithLastStep(StepSizeDeclarations):
    """Newton's method in the space of 2L dimensions that the layers' directions and their last steps span.

    theta_l <- theta_l - alpha_l d_l - beta_l p_l with p_l the layer's last alpha d + beta p (before weight decay; only
    its direction matters). With d and p normalised, M the averaged curvature between all 2L of them,

        (M + lambda I + rho diag(M)) (alpha, beta) = r,    r = <momentum_l, d_l> and <gradient_l, p_l>,

    and both are scaled by lr. Put it into ``RelativeBound``: its first steps, from few mini-batches, may be too long.
    ``sign`` decides about alpha from the system that is left when beta is eliminated; beta
    is then the minimum of the model for that alpha, of either sign. A layer without a last step (at first) gets 0.

    Momentum's own slope along p is from before that step was taken: followed again at every step it makes runs diverge.
    The gradient is that of the mini-batch, without coupled weight decay.

    K-FAC chooses one alpha and one momentum coefficient for the whole network from the exact Fisher of the mini-batch
    (arXiv:1503.05671v7, section 7); here both are per layer, with what all layers do together, from sampled scores that
    are averaged over steps. With exact curvature, no ridge, one layer and the gradient as direction this is the method
    of conjugate gradients; for a model linear in theta, with ``Unrestricted()``, no step along the directions alone is
    better. On mini-batches the directions still want momentum against their noise: with K-FAC's, runs without it or
    with EMA(0.95) ended worse than those of ``joint-kfac``, runs with EMA(0.8) as well or better.

    Args:
        curvature: estimator of M; must know the blocks between layers.
        every: renew M every so many steps, >= 1.
        decay: of the average of M, in [0, 1).
        ridge: lambda >= 0, absolute.
        relative_ridge: rho >= 0, relative to the diagonal; 2L directions resemble each other more than L do.
        sign: what becomes of negative alpha.
    """

    curvature: QuadraticForm = field(default_factory=SampledScores)
    every: int = 1
    decay: float = 0.8
    ridge: float = 0.0
    relative_ridge: float = 0.3
    sign: SignRule = field(default_factory=Clipped)
    length_free = True
    recalls = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_coupled("JointWithLastStep", self.curvature)
        require_positive_integer("every", self.every)
        require_interval("decay", self.decay, 0.0, 1.0)
        require_finite_nonnegative("ridge", self.ridge)
        require_finite_nonnegative("relative_ridge", self.relative_ridge)

    @derived
    def signed(self) -> bool:
        """Whether a layer may go against its new direction."""
        return declared(self.sign, SignDeclarations).signed

    @property
    def needs(self) -> Needs:
        """What its curvature needs, and slopes of the raw gradient."""
        return self.curvature.needs | Needs.SLOPES

    def due(self, step: int) -> bool:
        """Every ``every`` steps."""
        return step % self.every == 0

    def init(self, count: int, like: Tensor) -> AveragedForms:
        """Nothing gathered along 2L directions."""
        return AveragedForms.zeros(2 * count, like)

    def propose(self, state: AveragedForms, evidence: StepEvidence) -> Tensor:
        """(2L,) alpha of all layers, then beta of all layers."""
        assert evidence.slopes is not None and evidence.squared_norms is not None
        assert evidence.gradient_slopes is not None
        count = len(evidence.names)
        if len(evidence.slopes) != 2 * count:
            raise ArgumentError(
                f"JointWithLastStep needs evidence along {2 * count} directions (of {count} layers), got "
                f"{len(evidence.slopes)}; a rule around it must pass its `recalls = True` on"
            )
        moves = evidence.squared_norms > 0
        norms = evidence.squared_norms.clamp(min=torch.finfo(evidence.squared_norms.dtype).tiny).sqrt()
        if evidence.forms is not None:
            known = _known_rows(moves)
            state.take_forms((evidence.forms / torch.outer(norms, norms))[known][:, known], self.decay)
        matrix = ridged(state.forms, self.relative_ridge, self.ridge)
        slopes = torch.cat([evidence.slopes[:count], evidence.gradient_slopes[count:]]) / norms
        sizes = self._solve(matrix * torch.outer(moves, moves), slopes, count)
        lr = evidence.lr.repeat(2) if isinstance(evidence.lr, Tensor) and evidence.lr.ndim else evidence.lr
        return lr * sizes / norms

    def _solve(self, matrix: Tensor, right: Tensor, count: int) -> Tensor:
        """Eliminate beta, let the sign rule choose alpha, then minimise over beta; in double precision.

        A direction that its layer's last step makes up to rounding is left to beta.
        """
        rounding = 16 * torch.finfo(matrix.dtype).eps
        wide, slopes = matrix.double(), right.double()
        new, last, between = wide[:count, :count], wide[count:, count:], wide[:count, count:]
        eliminated = solve_semidefinite(last, torch.cat([slopes[count:, None], between.T], 1))
        offset, slope = eliminated[:, 0], eliminated[:, 1:]
        reduced, rest = new - between @ slope, slopes[:count] - between @ offset
        own = reduced.diagonal().abs() > rounding * new.diagonal().abs()
        reduced, rest = reduced * torch.outer(own, own), rest * own
        alpha = self.sign.choose(solve_semidefinite(reduced, rest), reduced, rest)
        return torch.cat([alpha, offset - slope @ alpha]).to(right.dtype)


def _known_rows(moves: Tensor) -> Tensor:
    """(2L,) indices: a layer without a last step lends it the row of its direction, along which that step will be.

    A zero in its place would enter the average, and the step after the first would be too long.
    """
    own = torch.arange(len(moves), device=moves.device)
    count = len(moves) // 2
    return torch.cat([own[:count], torch.where(moves[count:], own[count:], own[:count])])
