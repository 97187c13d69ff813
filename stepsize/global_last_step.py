"""One length and one momentum coefficient for the whole network, chosen by the model: K-FAC's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import StepSizeDeclarations
from ..curvature.quadratic_forms import QuadraticForm, SampledScores, require_coupled
from ..curvature.records.needs import Needs
from ..errors import require_finite_nonnegative, require_interval, require_positive_integer
from .averaged_forms import AveragedForms
from .joint import solve_semidefinite
from .protocol import StepEvidence

__all__ = ["GlobalWithLastStep"]


@dataclass(frozen=True)
class GlobalWithLastStep(StepSizeDeclarations):
    """(alpha, beta), the same for every layer, that minimise the quadratic model along d and the last step p.

    theta <- theta - alpha d - beta p with

        [ d'Md + lambda d'd   d'Mp + lambda d'p ] [ alpha ]   [ <momentum, d> ]
        [       ...           p'Mp + lambda p'p ] [ beta  ] = [ <gradient, p> ]

    all sums over the layers. arXiv:1503.05671v7, section 7, with M of this mini-batch; the terms d'p of the damping are
    left out, because the evidence has no inner products of directions (ours; lambda is 0 unless asked). What "KFAC*" of
    arXiv:2405.15603 does, and what ``JointWithLastStep`` does with two numbers per layer. Where d is downhill alpha is
    positive; a model without curvature along d moves nothing along it.

    Args:
        curvature: estimator of M; must know the blocks between layers.
        damping: lambda >= 0, absolute, the rule's own.
        every: renew M every so many steps, >= 1.
        decay: of the average of M along normalised directions, in [0, 1); 0: the newest alone, as in the paper.
    """

    curvature: QuadraticForm = field(default_factory=SampledScores)
    damping: float = 0.0
    every: int = 1
    decay: float = 0.0
    length_free = True
    recalls = True
    signed = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_coupled("GlobalWithLastStep", self.curvature)
        require_finite_nonnegative("damping", self.damping)
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
        """Nothing gathered along 2L directions."""
        return AveragedForms.zeros(2 * count, like)

    def propose(self, state: AveragedForms, evidence: StepEvidence) -> Tensor:
        """(2L,) alpha L times, then beta L times."""
        assert evidence.slopes is not None and evidence.squared_norms is not None
        assert evidence.gradient_slopes is not None
        count, squares = len(evidence.names), evidence.squared_norms
        norms = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        lengths = torch.outer(norms, norms)
        if evidence.forms is not None:
            state.take_forms(evidence.forms / lengths, self.decay)
        moves = (squares > 0).to(squares.dtype)
        forms = state.forms * lengths * torch.outer(moves, moves)
        halves = forms.unflatten(0, (2, count)).unflatten(2, (2, count)).sum((1, 3))
        matrix = halves + self.damping * torch.diag(squares.unflatten(0, (2, count)).sum(1))
        slopes = torch.stack([evidence.slopes[:count].sum(), evidence.gradient_slopes[count:].sum()])
        pair = solve_semidefinite(matrix, slopes)
        lr = evidence.lr.repeat(2) if isinstance(evidence.lr, Tensor) and evidence.lr.ndim else evidence.lr
        return lr * pair.repeat_interleave(count)
