"""A bound on the relative size of a layer's step, around any rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.quadratic_forms import QuadraticForm
from ..curvature.statistics import Needs
from ..errors import require_interval
from .constant import ConstantStep
from .protocol import StepEvidence, StepSize

__all__ = ["RelativeBound"]


@dataclass(frozen=True)
class RelativeBound:
    """alpha_l <- min(alpha_l, limit |theta_l| / |d_l|): no step moves a layer by more than a fraction of its norm.

    Args:
        rule: the rule to bound.
        limit: > 0, largest ratio |alpha_l d_l| / |theta_l|. A layer whose parameters are all zero is not bounded.
    """

    rule: StepSize = field(default_factory=ConstantStep)
    limit: float = 0.25

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("limit of a relative step bound", self.limit, 0.0, float("inf"), closed="(]")

    @property
    def needs(self) -> Needs:
        """What the inner rule needs, and norms."""
        return self.rule.needs | Needs.NORMS

    @property
    def length_free(self) -> bool:
        """As the inner rule: the bound is on the step itself."""
        return bool(getattr(self.rule, "length_free", False))

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
        cap = self.limit * evidence.parameter_norms / evidence.squared_norms.sqrt()
        cap = torch.where(torch.isfinite(cap) & (evidence.parameter_norms > 0), cap, torch.full_like(cap, torch.inf))
        return torch.minimum(torch.as_tensor(proposed, dtype=cap.dtype, device=cap.device).expand_as(cap), cap)
