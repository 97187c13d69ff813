"""Methods whose matrices come from per-sample curvature: K-FAC, EKFAC, exact natural gradient."""

from __future__ import annotations

from dataclasses import replace

from ....curvature.estimators import Estimator, SampledFisher
from ....preconditioners.averages import MovingAverage
from ....preconditioners.damping.split import ConstantDamping, Split
from ....preconditioners.factors.factor import Covariance
from ....preconditioners.protocol import Schedule
from ....preconditioners.structures.dense import Dense
from ....preconditioners.structures.eigenbasis import Eigenbasis
from ....preconditioners.structures.kronecker import Kronecker
from ....preconditioners.structures.moments import LayerMoments
from ..method import Method
from ..momentum import EMA, Decoupled, HeavyBall
from .names import fisher_estimator

__all__ = ["ekfac", "kfac", "kfac_conv", "kronecker_fisher", "ngd_exact"]


def kronecker_fisher(
    statistics: str, statistics_decay: float, statistics_every: int, inverses_every: int, eager: int
) -> tuple[Kronecker, Estimator]:
    """K-FAC's structure and estimator; ``statistics`` is ``sampled`` (the Fisher) or ``empirical`` (true labels)."""
    estimator = fisher_estimator(statistics)
    factor = Covariance(MovingAverage(statistics_decay))
    schedule = Schedule(statistics=statistics_every, inverses=inverses_every, eager=eager)
    return Kronecker(factor, factor, schedule), estimator


def kfac(
    *,
    statistics: str = "sampled",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 1,
    inverses_every: int = 20,
    eager: int = 20,
) -> Method:
    """K-FAC (arXiv:1503.05671v7) as the baseline of the K-BFGS code runs it (PAPERS 1.7): sqrt(damping) per side.

    Args:
        statistics: ``sampled`` labels (needs a likelihood) or ``empirical`` (no extra pass).
        momentum: decay in [0, 1) of the 0.9/0.1 average.
        statistics_decay: in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well.
    """
    structure, estimator = kronecker_fisher(statistics, statistics_decay, statistics_every, inverses_every, eager)
    return Method(
        structure,
        estimator,
        damping=Split(),
        momentum=EMA(momentum),
        warm_start=SampledFisher() if statistics == "sampled" else None,
        defaults={"lr": 1.0, "damping": 3.0},
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
        fisher_estimator(statistics),
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
        fisher_estimator(statistics),
        damping=ConstantDamping(),
        momentum=EMA(momentum),
        warm_start=SampledFisher() if statistics == "sampled" else None,
        defaults={"lr": 0.1, "damping": 0.3},
    )
