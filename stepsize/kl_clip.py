"""A bound on the Kullback-Leibler divergence that a step causes, around any rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import StepSizeDeclarations, declared
from ..curvature.quadratic_forms import QuadraticForm
from ..curvature.records.needs import Needs
from ..errors import CompatibilityError, require_interval
from .constant import ConstantStep
from .protocol import StepEvidence, StepSize

__all__ = ["KLClip"]


@dataclass(frozen=True)
class KLClip(StepSizeDeclarations, forwards="rule"):
    """alpha <- nu alpha with nu = min(1, sqrt(kappa / |sum_l alpha_l^2 <g_l, d_l>|)), one nu for all layers.

    The clipping of distributed K-FAC (Ba, Grosse, Martens, ICLR 2017, section 5) in the form that K-FAC libraries for
    PyTorch share. Where d_l = F_l^{-1} g_l, the sum is the squared length of the step in the Fisher metric, twice the
    divergence between the predictions before and after it to second order; no form is measured. For other directions
    (momentum, damping) it is an estimate of that; its absolute value is used, as those libraries do. With one learning
    rate this is their sqrt(kappa / (lr^2 |sum_l <g_l, d_l>|)).

    Rules that recall are refused: <g_l, p_l> is no length of a last step p_l in the Fisher metric.

    Args:
        rule: the rule to clip.
        kappa: > 0 (``inf``: never clips), bound on the sum after clipping, so on twice the predicted divergence.
    """

    rule: StepSize = field(default_factory=ConstantStep)
    kappa: float = 1e-3
    length_free = False
    proportional = False

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("kappa of KLClip", self.kappa, 0.0, float("inf"), closed="(]")
        if declared(self.rule, StepSizeDeclarations).recalls:
            inner: object = self.rule
            while hasattr(inner, "rule") and declared(inner.rule, StepSizeDeclarations).recalls:
                inner = inner.rule
            name = type(inner).__name__
            raise CompatibilityError(
                f"KLClip measures a step by <gradient, direction>, which says nothing of the layers' last steps that "
                f"{name} goes along; bound it by RelativeBound({name}()) alone"
            )

    @property
    def needs(self) -> Needs:
        """What the inner rule needs, and slopes of the raw gradient."""
        return self.rule.needs | Needs.SLOPES

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
        """Clipped step sizes; no synchronisation."""
        assert evidence.gradient_slopes is not None
        slopes = evidence.gradient_slopes
        sizes = self.rule.propose(state, evidence)
        proposed = sizes.to(slopes) if isinstance(sizes, Tensor) else slopes.new_full((), sizes)
        # The largest step size is taken out before squaring: alpha^2 <g, d> may leave the range of half precision.
        largest = proposed.abs().max()
        length = largest * ((proposed / largest).square() * slopes).sum().abs().sqrt()
        scale = (self.kappa**0.5 / length).clamp(max=1.0)
        clipped: Tensor = proposed.expand_as(slopes) * scale.nan_to_num_(1.0, 1.0, 1.0)
        return clipped
