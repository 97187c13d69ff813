"""One factor on all steps, from what new mini-batches see between the weights and their average. Ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checking import require_fields
from ..curvature.declarations import StepSizeDeclarations, declared
from ..curvature.quadratic_forms import QuadraticForm, require_coupled
from ..curvature.records.needs import Needs
from ..errors import ArgumentError, CompatibilityError, require_interval
from .joint import JointLayerwise
from .protocol import StepEvidence, StepSize

__all__ = ["TrailScaled"]


@dataclass
class _Trail:
    """State of the rule inside, and the logarithm of the factor, (1,)."""

    inner: Any
    log_factor: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Tensors and numbers by name, those of the rule inside under their own names."""
        return {} | ({} if self.inner is None else self.inner.to_dict()) | {"trail_log_factor": self.log_factor}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy saved values into place."""
        self.log_factor.copy_(values["trail_log_factor"])
        if self.inner is not None:
            self.inner.load_dict({name: value for name, value in values.items() if name != "trail_log_factor"})


@dataclass(frozen=True)
class TrailScaled(StepSizeDeclarations, forwards="rule"):
    """alpha <- m alpha for all layers: m falls where going back to an average of the iterates would lower the loss.

    A step that is the minimum of the mini-batch's own model follows the noise of that mini-batch, and what it gains is
    measured with the same noise. Here mini-batches judge that had no part in it. With x_t an average of the iterates
    that forgets all but the last 1/window of them, x_t = x_{t-1} + c_t (theta_t - x_{t-1}), the trail q_t =
    theta_t - x_t, and gradient and curvature of mini-batch t, which neither theta_t nor x_t has seen,

        rho_t = <g_t, q_t> / q_t' M_t q_t,      log m <- log m - gain clip(rho_t - threshold, -1, 1).

    rho is how far back on the way to the average the loss is lowest: 1/2 where both ends are equally good. On a
    quadratic, whatever made the steps,

        rho_t = (1 - c/2) / (1 - c)  -  (1 - c) (f(x_{t-1}) - f(x_t)) / (c q_t' M q_t)

    (T19). Where the iterates only fluctuate, the first term is left, which is at least 1 for every spectrum, step size
    and momentum, and m falls; while the average still descends, the second one holds m up. In balance, what the average
    gains in a window, (f(x_{t-1}) - f(x_t)) / c, is 2 (1 - threshold) times the noise q'Mq / 2 that stands above it. A
    test with the last step instead of the trail is the limit c -> 1: it sees the noise of steep directions and never
    what flat ones gain over many steps, the short-horizon bias of greedy rates. The window grows with the run, so no
    horizon is stated. A threshold below 1/2 leaves room for losses that bend more than the model says.

    The rule inside still sets the layers' steps against each other. m starts at 1. Costs the quadratic form along one
    more direction per layer and one copy of the parameters; nothing is evaluated a second time, and the weights that
    are trained are those to evaluate. Decoupled weight decay is no part of the trail.

    Args:
        rule: the rule to scale; it must measure curvature between layers, and not recall.
        window: > 1; after t steps the average has forgotten all but the last t / window of them.
        threshold: of rho, in (0, 1).
        gain: > 0, by how much log m changes at most in a step.
        longest: > 0, the largest m; beyond 2 the model of a step that was its minimum says uphill.
    """

    rule: StepSize = field(default_factory=JointLayerwise)
    window: float = 3.0
    threshold: float = 0.25
    gain: float = 0.1
    longest: float = 2.0
    length_free = False  # the trail is as long as the weights moved, whatever the length of the directions
    proportional = False
    recalls = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("window of TrailScaled", self.window, 1.0, math.inf, closed="()")
        require_interval("threshold of TrailScaled", self.threshold, 0.0, 1.0, closed="()")
        require_interval("gain of TrailScaled", self.gain, 0.0, math.inf, closed="()")
        require_interval("longest factor of TrailScaled", self.longest, 0.0, math.inf, closed="()")
        name = type(self.rule).__name__
        if declared(self.rule, StepSizeDeclarations).recalls:
            raise CompatibilityError(
                f"TrailScaled remembers where the layers were, and {name} their last steps: a layer has one memory; "
                "scale a rule that does not recall, like JointLayerwise()"
            )
        if self.rule.curvature is None:
            raise CompatibilityError(
                f"TrailScaled compares slopes with curvature, and {name} measures none; scale JointLayerwise(), "
                "LayerwiseQuadratic() or GlobalQuadratic()"
            )
        require_coupled("TrailScaled", self.rule.curvature)

    @property
    def needs(self) -> Needs:
        """What the inner rule needs, and slopes of the raw gradient."""
        return self.rule.needs | Needs.SLOPES

    @property
    def curvature(self) -> QuadraticForm | None:
        """The inner rule's."""
        return self.rule.curvature

    def due(self, step: int) -> bool:
        """As the inner rule; the factor changes at these steps alone."""
        return self.rule.due(step)

    def keeps(self, step: int) -> float:
        """1 - c after step 0, 1, ...: what the average's distance keeps of itself."""
        return (step + 1.0) / (step + 1.0 + self.window)

    def init(self, count: int, like: Tensor) -> _Trail:
        """The inner rule's state, and the factor 1."""
        return _Trail(self.rule.init(count, like), like.new_zeros(1))

    def propose(self, state: _Trail, evidence: StepEvidence) -> Tensor:
        """(2L,) the inner rule's step sizes times m, then zeros: nothing goes along the trail. No synchronisation."""
        assert evidence.squared_norms is not None and evidence.gradient_slopes is not None
        count = len(evidence.names)
        if len(evidence.squared_norms) != 2 * count:
            raise ArgumentError(
                f"TrailScaled needs evidence along {2 * count} directions (of {count} layers), got "
                f"{len(evidence.squared_norms)}; a rule around it must pass its `recalls = True` on"
            )
        if evidence.forms is not None:
            self._judge(state, evidence.gradient_slopes[count:].sum(), evidence.forms[count:, count:].sum())
        sizes = torch.as_tensor(self.rule.propose(state.inner, _of_layers(evidence, count)))
        sizes = sizes.to(evidence.squared_norms).expand(count) * state.log_factor.exp()
        return torch.cat([sizes, torch.zeros_like(sizes)])

    def _judge(self, state: _Trail, ahead: Tensor, form: Tensor) -> None:
        """Change the factor.

        Args:
            state: changed in place.
            ahead: <g, x - theta>, 0-dimensional: minus the slope rho is made of.
            form: q' M q.
        """
        change = (-ahead / form - self.threshold).clamp(-1.0, 1.0)
        # Without a trail, or with curvature that is not positive along it, nothing is known.
        change = torch.where(form > 0, change, torch.zeros_like(change)).nan_to_num(0.0, 0.0, 0.0)
        state.log_factor.sub_(self.gain * change).clamp_(max=math.log(self.longest))


def _of_layers(evidence: StepEvidence, count: int) -> StepEvidence:
    """Evidence along the L new directions alone."""
    forms = None if evidence.forms is None else evidence.forms[:count, :count]
    return StepEvidence(
        evidence.names,
        evidence.lr,
        slopes=None if evidence.slopes is None else evidence.slopes[:count],
        gradient_slopes=None if evidence.gradient_slopes is None else evidence.gradient_slopes[:count],
        squared_norms=None if evidence.squared_norms is None else evidence.squared_norms[:count],
        parameter_norms=evidence.parameter_norms,
        usual_norms=evidence.usual_norms,
        forms=forms,
        loss=evidence.loss,
    )
