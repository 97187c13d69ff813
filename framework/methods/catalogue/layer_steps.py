"""Layer-wise steps of arXiv:2305.13664, and our joint steps."""

from __future__ import annotations

from dataclasses import replace

from ....curvature.estimators import SampledFisher
from ....preconditioners.averages import MovingAverage
from ....preconditioners.damping.own_units import CurvatureUnits
from ....preconditioners.damping.split import Split
from ....preconditioners.structures.diagonal import Diagonal
from ....stepsize.bounded import RelativeBound
from ....stepsize.joint import JointLayerwise
from ....stepsize.last_step import JointWithLastStep
from ....stepsize.layerwise import LayerwiseQuadratic
from ....stepsize.trail_scaled import TrailScaled
from ..method import Method
from ..momentum import EMA, CorrectedEMA, Decoupled
from .kfac import kronecker_fisher
from .names import quadratic_form
from .quasi_newton import kbfgs

__all__ = [
    "joint_kbfgs",
    "joint_kfac",
    "joint_kfac_momentum",
    "joint_kfac_noise_aware",
    "joint_rule",
    "joint_sgdm",
    "layerwise_adamw",
    "layerwise_rule",
    "layerwise_sgdm",
]


def layerwise_rule(curvature: str, curvature_every: int) -> RelativeBound:
    """The layer-wise rule with its bound: no step moves a layer by more than 3 % of its norm."""
    return RelativeBound(LayerwiseQuadratic(quadratic_form(curvature), curvature_every), limit=0.03, decrease=0.5)


def joint_rule(curvature_every: int) -> RelativeBound:
    """Joint steps with their bound: no step moves a layer by more than a quarter of its norm.

    The first steps, from curvature averaged over few mini-batches, can otherwise move a layer by twice its norm.
    """
    return RelativeBound(JointLayerwise(every=curvature_every), limit=0.25, decrease=0.5)


def layerwise_sgdm(*, momentum: float = 0.9, curvature: str = "sampled", curvature_every: int = 1) -> Method:
    """SGD-momentum with layer-wise step sizes (arXiv:2305.13664v3, reconstructed); needs no learning rate.

    Args:
        momentum: decay in [0, 1).
        curvature: ``sampled``, ``sampled-batch``, ``signed-hessian``, ``exact-hessian`` or ``hessian-row-sums``.
        curvature_every: steps between two measurements, >= 1.
    """
    rule = layerwise_rule(curvature, curvature_every)
    return Method(momentum=EMA(momentum), step_size=rule, defaults={"lr": 1.0})


def layerwise_adamw(
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    curvature: str = "sampled",
    curvature_every: int = 1,
) -> Method:
    """The AdamW direction with layer-wise step sizes (arXiv:2305.13664v3, reconstructed); needs no learning rate.

    Args:
        beta1: decay in [0, 1) of the momentum.
        beta2: decay in [0, 1) of the squared gradients.
        epsilon: >= 0, added to the root.
        curvature: as for :func:`layerwise_sgdm`.
        curvature_every: steps between two measurements, >= 1.
    """
    diagonal = Diagonal(average=MovingAverage(beta2), epsilon=epsilon)
    return Method(
        diagonal,
        momentum=CorrectedEMA(beta1),
        weight_decay=Decoupled(),
        step_size=layerwise_rule(curvature, curvature_every),
        fallback=diagonal,
        defaults={"lr": 1.0},
    )


def joint_kfac(
    *,
    momentum: float = 0.8,
    statistics_decay: float = 0.95,
    statistics_every: int = 1,
    inverses_every: int = 10,
    eager: int = 20,
    lag: int = 0,
    curvature_every: int = 1,
) -> Method:
    """K-FAC directions with joint layer steps: no learning rate (ours).

    Args:
        momentum: decay in [0, 1).
        statistics_decay: of both covariances, in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well.
        lag: >= 0, < T2; later inverses are computed in a thread beside as many steps, and first used then.
        curvature_every: steps between two measurements along the directions, >= 1.
    """
    return Method(
        kronecker_fisher(statistics_decay, statistics_every, inverses_every, eager, lag),
        SampledFisher(),
        damping=Split(),
        momentum=EMA(momentum),
        step_size=joint_rule(curvature_every),
        defaults={"lr": 1.0, "damping": 1.0},
    )


def joint_kfac_momentum(
    *,
    momentum: float = 0.8,
    statistics_decay: float = 0.95,
    statistics_every: int = 1,
    inverses_every: int = 10,
    eager: int = 20,
    lag: int = 0,
    curvature_every: int = 1,
) -> Method:
    """K-FAC directions with joint layer steps along them and the layers' last steps: no learning rate (ours).

    Args:
        momentum: decay in [0, 1) of the gradients' average, which takes the noise out of the directions.
        statistics_decay: of both covariances, in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well.
        lag: >= 0, < T2; later inverses are computed in a thread beside as many steps, and first used then.
        curvature_every: steps between two measurements along the directions, >= 1.
    """
    base = joint_kfac(
        momentum=momentum,
        statistics_decay=statistics_decay,
        statistics_every=statistics_every,
        inverses_every=inverses_every,
        eager=eager,
        lag=lag,
    )
    return replace(base, step_size=RelativeBound(JointWithLastStep(every=curvature_every), limit=0.25, decrease=0.5))


def joint_kfac_noise_aware(
    *,
    momentum: float = 0.8,
    statistics_decay: float = 0.95,
    statistics_every: int = 1,
    inverses_every: int = 10,
    eager: int = 20,
    lag: int = 0,
    curvature_every: int = 1,
) -> Method:
    """K-FAC directions, joint layer steps that shrink by what new mini-batches see: no learning rate (ours).

    The damping is relative to each factor's mean eigenvalue: what keeps steps short where gradients are noise is no
    longer the damping, so it can be small, and the same everywhere.

    Args:
        momentum: decay in [0, 1).
        statistics_decay: of both covariances, in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well.
        lag: >= 0, < T2; later inverses are computed in a thread beside as many steps, and first used then.
        curvature_every: steps between two measurements along the directions and towards the average, >= 1.
    """
    base = joint_kfac(
        momentum=momentum,
        statistics_decay=statistics_decay,
        statistics_every=statistics_every,
        inverses_every=inverses_every,
        eager=eager,
        lag=lag,
    )
    rule = RelativeBound(TrailScaled(JointLayerwise(every=curvature_every)), limit=0.25, decrease=0.5)
    return replace(base, damping=CurvatureUnits(), step_size=rule, defaults={"lr": 1.0, "damping": 0.01})


def joint_kbfgs(*, momentum: float = 0.9, growth: float = 1.1, curvature_every: int = 1) -> Method:
    """K-BFGS directions with joint layer steps: no learning rate (ours).

    Args:
        momentum: decay in [0, 1).
        growth: the guard's factor, > 1; ``inf`` switches it off.
        curvature_every: steps between two measurements along the directions, >= 1.
    """
    base = kbfgs(momentum=momentum, growth=growth)
    return replace(base, step_size=joint_rule(curvature_every), defaults={"lr": 1.0, "damping": 0.3})


def joint_sgdm(*, momentum: float = 0.9, curvature_every: int = 1) -> Method:
    """SGD-momentum with joint layer steps: no learning rate (ours).

    Args:
        momentum: decay in [0, 1).
        curvature_every: steps between two measurements along the directions, >= 1.
    """
    return Method(momentum=EMA(momentum), step_size=joint_rule(curvature_every), defaults={"lr": 1.0})
