"""A bound on the relative size of a layer's step, around any rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import StepSizeDeclarations
from ..curvature.quadratic_forms import QuadraticForm
from ..curvature.records.needs import Needs
from ..errors import require_interval
from .constant import ConstantStep
from .protocol import StepEvidence, StepSize

__all__ = ["RelativeBound"]


@dataclass(frozen=True)
class RelativeBound(StepSizeDeclarations, forwards="rule"):
    """alpha_l <- min(alpha_l, limit |theta_l| / |d_l|): no step moves a layer by more than a fraction of its norm.

    Around a rule that recalls, alpha_l and beta_l are shortened by one factor until |alpha_l| |d_l| + |beta_l| |p_l|,
    which the layer's step cannot exceed, is within the limit.

    Args:
        rule: the rule to bound.
        limit: > 0, largest ratio |alpha_l d_l| / |theta_l|. A layer whose parameters are all zero is not bounded.
    """

    rule: StepSize = field(default_factory=ConstantStep)
    limit: float = 0.25
    proportional = False

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("limit of a relative step bound", self.limit, 0.0, float("inf"), closed="(]")

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
            return self._both(proposed, evidence.squared_norms, evidence.parameter_norms)
        cap = self.limit * evidence.parameter_norms / evidence.squared_norms.sqrt()
        # A layer whose parameters are zero, or whose quotient is no number, has no bound.
        cap.masked_fill_(evidence.parameter_norms <= 0, torch.inf).nan_to_num_(torch.inf, torch.inf)
        sizes = proposed.to(cap) if isinstance(proposed, Tensor) else torch.full_like(cap, proposed)
        return torch.minimum(sizes, cap)

    def _both(self, proposed: float | Tensor, squared_norms: Tensor, parameter_norms: Tensor) -> Tensor:
        """(2L,) bounded alpha and beta."""
        proposed = torch.as_tensor(proposed)
        reach = (proposed.abs() * squared_norms.sqrt()).reshape(2, -1).sum(0)
        factor = (self.limit * parameter_norms / reach).clamp_(max=1.0)
        factor.masked_fill_(parameter_norms <= 0, 1.0).nan_to_num_(1.0, 1.0, 1.0)
        return proposed * factor.repeat(2)
