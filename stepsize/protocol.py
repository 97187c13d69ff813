"""What a step-size rule sees and returns: all layers at once.

With d_l the layer's preconditioned momentum, the step is ``theta_l <- theta_l - alpha_l d_l``. A rule maps slopes,
norms and quadratic forms of all L layers to the vector alpha. It is a pure function of small tensors: rules contain no
layer, no model and no learning-rate schedule.

A rule that *recalls* steps along two directions per layer, ``theta_l <- theta_l - alpha_l d_l - beta_l p_l``, where p_l
is what alpha_l d_l + beta_l p_l was when the layer last moved (zero before that; without weight decay). Its evidence
covers K = 2L directions, the L new ones and then the L last steps; for every other rule K = L. One that declares
``keeps`` finds a fading sum of all steps in the place of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..curvature.quadratic_forms import QuadraticForm
from ..curvature.records.needs import Needs

__all__ = ["StepEvidence", "StepSize"]


@dataclass(frozen=True)
class StepEvidence:
    """What a rule knows of L layers at one step.

    Attributes:
        names: layer names, in the model's order.
        lr: ``lr`` of the parameter group, >= 0: the step for ``ConstantStep``, a multiplier (default 1) elsewhere.
            One number, or (L,) where parameter groups give layers different values: multiply, never compare.
        slopes: (K,) r_l = <momentum_l, d_l>, an estimate of minus the derivative along the step; None unless asked.
        gradient_slopes: (K,) <gradient_l, d_l> with the mini-batch gradient itself; None unless asked.
        squared_norms: (K,) |d_l|^2; None unless asked.
        parameter_norms: (L,) |theta_l|; None unless asked.
        forms: (K, K) matrix M with M_ll = d_l' C_l d_l, or None when curvature is not renewed at this step.
        loss: 0-dimensional, of the mini-batch: what the closure returned, or what the output and its gradient tell of
            it; None where neither is known.
        usual_norms: (L,) norms of layers of these shapes as ``nn.Linear`` initialises them; with ``parameter_norms``.
    """

    names: Sequence[str]
    lr: float | Tensor
    slopes: Tensor | None = None
    gradient_slopes: Tensor | None = None
    squared_norms: Tensor | None = None
    parameter_norms: Tensor | None = None
    forms: Tensor | None = None
    loss: Tensor | None = None
    usual_norms: Tensor | None = None


class StepSize(Protocol):
    """A step-size rule for all layers together.

    It may declare more: :class:`.StepSizeDeclarations`. ``recalls = True``: steps go along the layers' last steps too
    (``signed`` speaks of alpha alone, beta may always be negative). Last steps cost as much memory as the parameters.
    """

    @property
    def needs(self) -> Needs:
        """What the quadratic forms ask of the backend; ``NOTHING`` for rules without curvature."""

    @property
    def curvature(self) -> QuadraticForm | None:
        """How quadratic forms are measured; ``None`` for rules without curvature."""

    def due(self, step: int) -> bool:
        """Whether quadratic forms are renewed at this step."""

    def init(self, count: int, like: Tensor) -> Any:
        """Fresh state, or ``None`` for rules that keep nothing between steps.

        The state has ``to_dict()``, whose values are tensors and numbers, and ``load_dict(values)``. When layers are
        added during training, a new state is made by ``init`` and what was gathered is copied into its leading entries,
        so tensors with one entry per layer have the layers in front, and those with one per direction of a rule that
        recalls the L new ones before the L last steps.

        Args:
            count: L >= 1 layers.
            like: 0-dimensional zero with the dtype and device of the evidence's tensors, and nothing else to be read
                from: make tensors by ``like.new_zeros(count)``.
        """

    def propose(self, state: Any, evidence: StepEvidence) -> Tensor | float:
        """(L,) step sizes in the dtype of the evidence, or one number for all layers; updates the state in place.

        A rule that recalls returns (2L,): alpha of all layers, then beta.
        """
