"""A bound on the relative size of a layer's step, around any rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import StepSizeDeclarations, declared, derived
from ..curvature.quadratic_forms import QuadraticForm
from ..curvature.records.needs import Needs
from ..errors import require_interval
from .constant import ConstantStep
from .protocol import StepEvidence, StepSize

__all__ = ["RelativeBound"]

_SMALLEST = 0.1
"""Of the usual norm, as which a layer counts that is smaller."""


@dataclass(frozen=True)
class RelativeBound(StepSizeDeclarations, forwards="rule"):
    """alpha_l <- min(alpha_l, limit |theta_l| / |d_l|): no step moves a layer by more than a fraction of its norm.

    Around a rule that recalls, alpha_l and beta_l are shortened by one factor until |alpha_l| |d_l| + |beta_l| |p_l|,
    which the layer's step cannot exceed, is within the limit.

    Args:
        rule: the rule to bound.
        limit: > 0, largest ratio |alpha_l d_l| / |theta_l|, where a layer counts as no smaller than a tenth of what
            ``nn.Linear`` initialises its shape with: a number can cross zero, and a layer that begins there can leave.
        decrease: > 0 (``inf``: no bound), in units of the mini-batch loss: all layers' steps are shortened by one
            factor until the decrease that the slopes promise, sum_l alpha_l <momentum_l, d_l>, is no more than this.
            A loss of a likelihood cannot fall below zero, so a step that promises more follows a curvature that is not
            there: where probabilities saturate, at 0 or 1, sampled labels see none. A loss that is not known bounds
            nothing, a negative one bounds by its size; one that is exactly 0 lets nothing move. A loss that can pass
            through 0 on its way down (a negative log-density, a constant subtracted) is therefore held there: take
            ``inf`` for such a one.
    """

    rule: StepSize = field(default_factory=ConstantStep)
    limit: float = 0.25
    decrease: float = math.inf
    proportional = False

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("limit of a relative step bound", self.limit, 0.0, float("inf"), closed="(]")
        require_interval("decrease of a relative step bound", self.decrease, 0.0, float("inf"), closed="(]")

    @derived
    def uses_loss(self) -> bool:
        """Where a decrease is bounded."""
        return self.decrease < math.inf or declared(self.rule, StepSizeDeclarations).uses_loss

    @property
    def needs(self) -> Needs:
        """What the inner rule needs, and norms."""
        return self.rule.needs | Needs.NORMS

    @property
    def curvature(self) -> QuadraticForm | None:
        """The inner rule's."""
        return self.rule.curvature

    def due(self, step: int) -> bool:
        """As the inner rule."""
        return self.rule.due(step)

    def init(self, count: int, like: Tensor) -> Any:
        """The inner rule's state."""
        return self.rule.init(count, like)

    def propose(self, state: Any, evidence: StepEvidence) -> Tensor:
        """Bounded step sizes; no synchronisation."""
        assert evidence.squared_norms is not None and evidence.parameter_norms is not None
        proposed = self.rule.propose(state, evidence)
        if self.recalls:
            return self._possible(self._both(proposed, evidence.squared_norms, _lengths(evidence)), evidence)
        cap = self.limit * _lengths(evidence) / evidence.squared_norms.sqrt()
        cap.nan_to_num_(torch.inf, torch.inf)  # where the quotient is no number there is no bound
        sizes = proposed.to(cap) if isinstance(proposed, Tensor) else torch.full_like(cap, proposed)
        return self._possible(torch.minimum(sizes, cap), evidence)

    def _possible(self, sizes: Tensor, evidence: StepEvidence) -> Tensor:
        """All sizes shortened by one factor until they promise no more than the loss can give."""
        if self.decrease == math.inf or evidence.loss is None or evidence.slopes is None:
            return sizes
        promised = torch.dot(sizes, evidence.slopes).clamp_(min=torch.finfo(sizes.dtype).tiny)  # uphill: no bound
        share = self.decrease * evidence.loss.abs().to(promised) / promised
        return sizes * share.clamp_(max=1.0)

    def _both(self, proposed: float | Tensor, squared_norms: Tensor, lengths: Tensor) -> Tensor:
        """(2L,) bounded alpha and beta."""
        proposed = torch.as_tensor(proposed)
        reach = (proposed.abs() * squared_norms.sqrt()).reshape(2, -1).sum(0)
        factor = (self.limit * lengths / reach).clamp_(max=1.0).nan_to_num_(1.0, 1.0, 1.0)
        return proposed * factor.repeat(2)


def _lengths(evidence: StepEvidence) -> Tensor:
    """(L,) lengths that steps are compared with."""
    norms, usual = evidence.parameter_norms, evidence.usual_norms
    assert norms is not None
    if usual is None:  # of somebody who does not tell: a layer of zeros has no bound
        return norms.masked_fill(norms <= 0, torch.inf)
    return torch.maximum(norms, _SMALLEST * usual)
