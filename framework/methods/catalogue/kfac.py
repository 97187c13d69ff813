"""More methods whose matrices come from per-sample curvature: EKFAC, exact natural gradient, and for convolutions."""

from __future__ import annotations

from dataclasses import replace

from ....curvature.estimators import EmpiricalFisher, Estimator, SampledFisher
from ....errors import ArgumentError
from ....preconditioners.averages import Average, MovingAverage, ZeroStartAverage
from ....preconditioners.damping.split import ConstantDamping
from ....preconditioners.factors.bfgs import HessianActionBFGS
from ....preconditioners.protocol import Schedule
from ....preconditioners.structures.dense import Dense
from ....preconditioners.structures.eigenbasis import Eigenbasis
from ....preconditioners.structures.kronecker import Kronecker
from ....preconditioners.structures.moments import LayerMoments
from ..method import Method
from ..momentum import EMA, Decoupled, HeavyBall
from .first_order import kfac
from .quasi_newton import kbfgs

__all__ = ["ekfac", "kbfgs_conv", "kfac_conv", "ngd_exact"]


def _fisher(statistics: str) -> Estimator:
    estimators: dict[str, Estimator] = {"sampled": SampledFisher(), "empirical": EmpiricalFisher()}
    if statistics not in estimators:
        raise ArgumentError(f"statistics must be 'sampled' or 'empirical', got {statistics!r}")
    return estimators[statistics]


def ekfac(
    *,
    statistics: str = "sampled",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 1,
    basis_every: int = 20,
    eager: int = 20,
) -> Method:
    """EKFAC (arXiv:1806.03884v2, Algorithm 1): K-FAC's eigenbasis, second moments of per-sample gradients in it.

    Momentum, averages, warm start and schedule as the K-FAC baseline has them. One damping on the whole layer. Default
    lr and damping: stable on every shipped small problem; tune both.

    Args:
        statistics: ``sampled`` labels (needs a likelihood) or ``empirical`` (no extra pass).
        momentum: decay in [0, 1) of the 0.9/0.1 average.
        statistics_decay: of factors and second moments, in [0, 1); 0: the paper's, of the mini-batch alone.
        statistics_every: T1 >= 1.
        basis_every: T2 >= 1, steps between eigendecompositions.
        eager: eigendecompositions at each of the steps 0 ... eager as well.
    """
    average = MovingAverage(statistics_decay)
    return Method(
        Eigenbasis(
            LayerMoments(), average=average, sides=average, schedule=Schedule(statistics_every, basis_every, eager)
        ),
        _fisher(statistics),
        damping=ConstantDamping(),
        momentum=EMA(momentum),
        warm_start=SampledFisher() if statistics == "sampled" else None,
        defaults={"lr": 0.1, "damping": 0.3},
    )


def ngd_exact(
    *,
    statistics: str = "sampled",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 1,
    inverses_every: int = 5,
    limit: int = 4096,
) -> Method:
    """Natural gradient with each layer's whole Fisher matrix (Amari, Neural Computation 10:251): for small networks.

    Block-diagonal over layers, nothing else is approximated; the truth that K-FAC, EKFAC and mini-blocks are compared
    with. Default lr and damping: stable on every shipped small problem; tune both.

    Args:
        statistics: ``sampled`` labels (needs a likelihood) or ``empirical`` (no extra pass).
        momentum: decay in [0, 1).
        statistics_decay: of the matrices, in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        limit: layers with more parameters than this get plain momentum, visibly in the layer table; >= 1.
    """
    return Method(
        Dense(
            average=MovingAverage(statistics_decay),
            schedule=Schedule(statistics_every, inverses_every),
            limit=limit,
        ),
        _fisher(statistics),
        damping=ConstantDamping(),
        momentum=EMA(momentum),
        warm_start=SampledFisher() if statistics == "sampled" else None,
        defaults={"lr": 0.1, "damping": 0.3},
    )


def kfac_conv(
    *,
    statistics: str = "sampled",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 10,
    inverses_every: int = 100,
    eager: int = 100,
) -> Method:
    """K-FAC as the CNN experiments beside arXiv:2102.06737 and MBF run it (PAPERS 1.6, 4.2).

    Factors as for ``kfac`` (A sums over positions, G is a mean over them, sqrt(damping S) and sqrt(damping / S)), but
    heavy-ball momentum, decoupled decay, and the slower schedule of large networks. The published CIFAR-100 run has
    (lr, damping) = (1e-3, 0.03); the default keeps their ratio with ten times the damping, which is faster and as
    stable on the small curves-autoencoder and mnist-cnn.

    Args:
        statistics: ``sampled`` labels (needs a likelihood) or ``empirical`` (no extra pass).
        momentum: decay in [0, 1).
        statistics_decay: in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well, where statistics are due.
    """
    base = kfac(
        statistics=statistics,
        statistics_decay=statistics_decay,
        statistics_every=statistics_every,
        inverses_every=inverses_every,
        eager=eager,
    )
    return replace(
        base,
        momentum=HeavyBall(momentum),
        weight_decay=Decoupled(),
        defaults={"lr": 1e-2, "damping": 0.3},
    )


def kbfgs_conv(
    *,
    action: str = "averaged",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    pair_decay: float = 0.9,
    growth: float = 1.1,
) -> Method:
    """K-BFGS for convolutions (arXiv:2102.06737v3): Powell damping with H, then Levenberg-Marquardt; decoupled decay.

    A sums over positions, the secant pair averages over them, damping is sqrt(damping S) and sqrt(damping / S)
    (PAPERS 1.6). The guard is ours, as in ``kbfgs``, and so is the default lr.

    Args:
        action: which A the Hessian action uses: ``averaged`` over steps, or of the current ``mini-batch`` (the paper's
            variant for large layers; here it saves no memory, A is still stored for one step).
        momentum: decay in [0, 1).
        statistics_decay: of A, in [0, 1); without effect on ``mini-batch``.
        pair_decay: of the averaged pair, in [0, 1).
        growth: the guard's factor, > 1; ``inf`` switches it off (the paper).
    """
    averages: dict[str, Average] = {"averaged": MovingAverage(statistics_decay), "mini-batch": ZeroStartAverage(0.0)}
    if action not in averages:
        raise ArgumentError(f"action must be one of {', '.join(averages)}, got {action!r}")
    base = kbfgs(pairs="powell-then-lm", momentum=momentum, pair_decay=pair_decay, growth=growth)
    structure = base.preconditioner
    assert isinstance(structure, Kronecker)
    return replace(
        base,
        preconditioner=replace(structure, inputs=HessianActionBFGS(averages[action])),
        weight_decay=Decoupled(),
    )
