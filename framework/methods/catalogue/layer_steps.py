"""Methods that build on the papers: layer-wise steps of arXiv:2305.13664, and our joint steps and secant blocks."""

from __future__ import annotations

from dataclasses import replace

from ....curvature.estimators import SecantPairs
from ....curvature.layers.adapters import KINDS
from ....curvature.quadratic_forms import (
    ExactHessian,
    HessianRowSums,
    QuadraticForm,
    SampledBatchScores,
    SampledScores,
    SignedHessian,
)
from ....errors import ArgumentError
from ....preconditioners.averages import MovingAverage, ZeroStartAverage
from ....preconditioners.damping.split import ConstantDamping, Split
from ....preconditioners.structures.by_layer import ByLayer
from ....preconditioners.structures.diagonal import Diagonal
from ....preconditioners.structures.identity import Identity
from ....preconditioners.structures.partitions import Kernel
from ....preconditioners.structures.secant_blocks import SecantBlocks
from ....stepsize.bounded import RelativeBound
from ....stepsize.joint import JointLayerwise
from ....stepsize.last_step import JointWithLastStep
from ....stepsize.layerwise import LayerwiseQuadratic
from ..method import Method
from ..momentum import EMA, CorrectedEMA, Decoupled
from .first_order import kronecker_fisher
from .quasi_newton import PARTITIONS, kbfgs, pair_damping, step_guard

__all__ = [
    "joint_kbfgs",
    "joint_kfac",
    "joint_kfac_momentum",
    "joint_rule",
    "joint_sgdm",
    "layerwise_adamw",
    "layerwise_rule",
    "layerwise_sgdm",
    "mini_block_lbfgs",
    "quadratic_form",
]

FORMS: dict[str, type[QuadraticForm]] = {
    "sampled": SampledScores,
    "sampled-batch": SampledBatchScores,
    "signed-hessian": SignedHessian,
    "exact-hessian": ExactHessian,
    "hessian-row-sums": HessianRowSums,
}


def quadratic_form(name: str) -> QuadraticForm:
    """An estimator of quadratic forms by name, PAPERS 3.3 (a), (a'), (b), (c), (d) in the order of the table."""
    if name not in FORMS:
        raise ArgumentError(f"curvature must be one of {', '.join(FORMS)}, got {name!r}")
    return FORMS[name]()


def layerwise_rule(curvature: str, curvature_every: int) -> RelativeBound:
    """The layer-wise rule with its bound: no step moves a layer by more than 3 % of its norm."""
    return RelativeBound(LayerwiseQuadratic(quadratic_form(curvature), curvature_every), limit=0.03)


def joint_rule(curvature_every: int) -> RelativeBound:
    """Joint steps with their bound: no step moves a layer by more than a quarter of its norm.

    The first steps, from curvature averaged over few mini-batches, can otherwise move a layer by twice its norm.
    """
    return RelativeBound(JointLayerwise(every=curvature_every), limit=0.25)


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
    curvature_every: int = 1,
) -> Method:
    """K-FAC directions with joint layer steps: no learning rate (ours).

    Args:
        momentum: decay in [0, 1).
        statistics_decay: of both covariances, in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well.
        curvature_every: steps between two measurements along the directions, >= 1.
    """
    structure, estimator = kronecker_fisher("sampled", statistics_decay, statistics_every, inverses_every, eager)
    return Method(
        structure,
        estimator,
        damping=Split(),
        momentum=EMA(momentum),
        step_size=joint_rule(curvature_every),
        warm_start=None,
        defaults={"lr": 1.0, "damping": 1.0},
    )


def joint_kfac_momentum(
    *,
    momentum: float = 0.8,
    statistics_decay: float = 0.95,
    statistics_every: int = 1,
    inverses_every: int = 10,
    eager: int = 20,
    curvature_every: int = 1,
) -> Method:
    """K-FAC directions with joint layer steps along them and the layers' last steps: no learning rate (ours).

    Args:
        momentum: decay in [0, 1) of the gradients' average, which takes the noise out of the directions.
        statistics_decay: of both covariances, in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well.
        curvature_every: steps between two measurements along the directions, >= 1.
    """
    base = joint_kfac(
        momentum=momentum,
        statistics_decay=statistics_decay,
        statistics_every=statistics_every,
        inverses_every=inverses_every,
        eager=eager,
    )
    return replace(base, step_size=RelativeBound(JointWithLastStep(every=curvature_every), limit=0.25))


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


def mini_block_lbfgs(
    *,
    blocks: str = "per-output",
    memory: int = 4,
    pairs: str = "double",
    momentum: float = 0.9,
    pair_decay: float = 0.9,
    growth: float = 1.1,
) -> Method:
    """L-BFGS on mini-blocks, each from secant pairs of its own parameters (ours, unpublished).

    Blocks as in Mini-Block Fisher (arXiv:2202.04124): per output neuron, per kernel; averages, damping and tests of the
    pairs, momentum and guard as in K-BFGS (arXiv:2006.08877). lambda itself is the floor of a pair's curvature. Biases
    of convolutions, normalisation and whatever is no matrix get plain momentum.

    Args:
        blocks: of dense layers: ``per-output``, ``per-input-averaged`` (per input neuron: nothing is averaged here) or
            ``flat-chunk``; ``per-output-averaged`` is ``per-output``.
        memory: m >= 1 pairs per block.
        pairs: ``double`` (needs damping < 1), ``powell-then-lm``, ``powell-h``, ``merged``, ``powell-b0`` or ``none``.
        momentum: decay in [0, 1).
        pair_decay: of the averaged pair; 0 in full-batch mode.
        growth: the guard's factor, > 1; ``inf`` switches it off.
    """
    if blocks not in PARTITIONS:
        raise ArgumentError(f"blocks must be one of {', '.join(PARTITIONS)}, got {blocks!r}")
    dense = SecantBlocks(PARTITIONS[blocks](), memory, pair_damping(pairs), ZeroStartAverage(pair_decay))
    kernels = replace(dense, partition=Kernel())
    convolutions = (kind for kind in KINDS if kind.startswith("Conv"))
    return Method(
        ByLayer(
            {**dict.fromkeys(("Linear", "Attention"), dense), **dict.fromkeys(convolutions, kernels)},
            otherwise=Identity(),
        ),
        SecantPairs(),
        damping=ConstantDamping(),
        momentum=EMA(momentum),
        guard=step_guard(growth),
        defaults={"lr": 0.3, "damping": 0.3},
    )
