"""Methods whose matrices come from per-sample curvature: K-FAC, EKFAC, exact natural gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ....checking import require_kind
from ....curvature.estimators import SampledFisher
from ....errors import ArgumentError
from ....preconditioners.averages import MovingAverage
from ....preconditioners.damping.split import ConstantDamping, Damping, Split
from ....preconditioners.factors.factor import Covariance
from ....preconditioners.protocol import Preconditioner, Schedule
from ....preconditioners.structures.dense import Dense
from ....preconditioners.structures.eigenbasis import Eigenbasis
from ....preconditioners.structures.kronecker import Kronecker
from ....preconditioners.structures.moments import LayerMoments
from ..method import Method
from ..momentum import EMA, Decoupled, HeavyBall
from .names import bounded_step, fisher_estimator

__all__ = ["ekfac", "kfac", "kfac_conv", "kronecker_fisher", "ngd_exact"]


def kronecker_fisher(
    statistics_decay: float, statistics_every: int, inverses_every: int, eager: int, lag: int
) -> Kronecker:
    """K-FAC's structure."""
    factor = Covariance(MovingAverage(statistics_decay))
    schedule = Schedule(statistics=statistics_every, inverses=inverses_every, eager=eager, lag=lag)
    return Kronecker(factor, factor, schedule)


def _on_fisher(
    structure: Preconditioner,
    statistics: str,
    damping: Damping,
    momentum: float,
    limit: float,
    defaults: Mapping[str, float],
) -> Method:
    """A structure on the Fisher matrix, averaged gradients, bounded steps; sampled labels also start the statistics."""
    return Method(
        structure,
        fisher_estimator(statistics),
        damping=damping,
        momentum=EMA(momentum),
        step_size=bounded_step(limit),
        warm_start=SampledFisher() if statistics == "sampled" else None,
        defaults=defaults,
    )


def kfac(
    *,
    statistics: str = "sampled",
    limit: float = 0.05,
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 1,
    inverses_every: int = 20,
    eager: int = 20,
    lag: int = 0,
) -> Method:
    """K-FAC (arXiv:1503.05671v7) as the baseline of the K-BFGS code runs it (PAPERS 1.7): sqrt(damping) per side.

    That code has no bound (``limit=inf``) and (lr, damping) = (1, 3) on the MNIST autoencoder, where a damping that
    small classifiers and networks with BatchNorm need breaks down. The bound and the default lr and damping are ours.

    Args:
        statistics: ``sampled`` labels (needs a likelihood) or ``empirical`` (no extra pass).
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (that code).
        momentum: decay in [0, 1) of the 0.9/0.1 average.
        statistics_decay: in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well.
        lag: >= 0, < T2; later inverses are computed in a thread beside as many steps, and first used then.
    """
    structure = kronecker_fisher(statistics_decay, statistics_every, inverses_every, eager, lag)
    return _on_fisher(structure, statistics, Split(), momentum, limit, {"lr": 0.3, "damping": 0.01})


def kfac_conv(
    *,
    statistics: str = "sampled",
    limit: float = 0.05,
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 10,
    inverses_every: int = 100,
    eager: int = 100,
    lag: int = 0,
) -> Method:
    """K-FAC as the CNN experiments beside arXiv:2102.06737 and MBF run it (PAPERS 1.6, 4.2).

    Factors as for ``kfac`` (A sums over positions, G is a mean over them, sqrt(damping S) and sqrt(damping / S)), but
    heavy-ball momentum, decoupled decay, and the slower schedule of large networks. The published CIFAR-100 run has
    (lr, damping) = (1e-3, 0.03) and no bound. The bound is ours, and with it the default lr: 0.03.

    Args:
        statistics: ``sampled`` labels (needs a likelihood) or ``empirical`` (no extra pass).
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (those experiments).
        momentum: decay in [0, 1).
        statistics_decay: in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well, where statistics are due.
        lag: >= 0, < T2; later inverses are computed in a thread beside as many steps, and first used then.
    """
    base = kfac(
        statistics=statistics,
        limit=limit,
        statistics_decay=statistics_decay,
        statistics_every=statistics_every,
        inverses_every=inverses_every,
        eager=eager,
        lag=lag,
    )
    defaults = {"lr": 0.03, "damping": 0.03}
    return replace(base, momentum=HeavyBall(momentum), weight_decay=Decoupled(), defaults=defaults)


def ekfac(
    *,
    statistics: str = "sampled",
    limit: float = 0.05,
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 1,
    basis_every: int = 20,
    eager: int = 20,
    lag: int = 0,
) -> Method:
    """EKFAC (arXiv:1806.03884v2, Algorithm 1): K-FAC's eigenbasis, second moments of per-sample gradients in it.

    Momentum, averages, warm start and schedule as the K-FAC baseline has them. One damping on the whole layer. The
    bound and the default lr and damping are ours.

    Args:
        statistics: ``sampled`` labels (needs a likelihood) or ``empirical`` (no extra pass).
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (the paper).
        momentum: decay in [0, 1) of the 0.9/0.1 average.
        statistics_decay: of factors and second moments, in [0, 1); 0: the paper's, of the mini-batch alone.
        statistics_every: T1 >= 1.
        basis_every: T2 >= 1, steps between eigendecompositions.
        eager: eigendecompositions at each of the steps 0 ... eager as well.
        lag: >= 0, < T2; later ones are computed in a thread beside as many steps, and first used then.
    """
    average, schedule = MovingAverage(statistics_decay), Schedule(statistics_every, basis_every, eager, lag=lag)
    structure = Eigenbasis(LayerMoments(), average=average, sides=average, schedule=schedule)
    return _on_fisher(structure, statistics, ConstantDamping(), momentum, limit, {"lr": 0.1, "damping": 0.03})


def ngd_exact(
    *,
    statistics: str = "sampled",
    limit: float = 0.05,
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 1,
    inverses_every: int = 5,
    lag: int = 0,
    largest: int = 4096,
) -> Method:
    """Natural gradient with each layer's whole Fisher matrix (Amari, Neural Computation 10:251): for small networks.

    Block-diagonal over layers, nothing else is approximated; the truth that K-FAC, EKFAC and mini-blocks are compared
    with. The bound and the default lr and damping are ours.

    Args:
        statistics: ``sampled`` labels (needs a likelihood) or ``empirical`` (no extra pass).
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides.
        momentum: decay in [0, 1).
        statistics_decay: of the matrices, in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        lag: >= 0, < T2; inverses after the first are computed in a thread beside as many steps, and first used then.
        largest: layers with more parameters than this get plain momentum, visibly in the layer table; >= 1.

    Raises:
        ArgumentError: for a finite ``limit`` above 1: until version 0.2.0 the word meant what is ``largest`` now.
    """
    require_kind("limit of ngd-exact", limit, float, "pass a number in (0, 1], or inf")
    if 1 < limit < math.inf:
        raise ArgumentError(
            f"limit of ngd-exact bounds a layer's step in units of its norm, so it must lie in (0, 1] or be inf, got "
            f"{limit!r}; the size up to which a layer gets a whole matrix is called largest: pass largest={limit!r}"
        )
    average, schedule = MovingAverage(statistics_decay), Schedule(statistics_every, inverses_every, lag=lag)
    structure = Dense(average=average, schedule=schedule, limit=largest)
    return _on_fisher(structure, statistics, ConstantDamping(), momentum, limit, {"lr": 0.1, "damping": 0.03})
