"""Methods whose matrices come from mini-batch gradients: Shampoo, TNT, SOAP, Muon."""

from __future__ import annotations

import math

from ....curvature.estimators import BatchMean, SampledBatchMean
from ....curvature.layers.adapters import KINDS
from ....preconditioners.averages import MovingAverage, RunningSum
from ....preconditioners.damping.split import ConstantDamping
from ....preconditioners.factors.gradient_products import Root
from ....preconditioners.gradient_covariance import GradientCovariance
from ....preconditioners.protocol import Schedule
from ....preconditioners.structures.by_layer import LAST, ByLayer
from ....preconditioners.structures.diagonal import Diagonal
from ....preconditioners.structures.eigenbasis import Eigenbasis
from ....preconditioners.structures.kronecker import Kronecker
from ....preconditioners.structures.moments import GradientMoments
from ....preconditioners.structures.spectral import AspectRatio, MatchAdam, Spectral, UpdateScale
from ..method import Method
from ..momentum import EMA, CorrectedEMA, Decoupled, HeavyBall, Nesterov
from .names import bounded_step, chosen

__all__ = ["muon", "shampoo", "soap", "tnt"]


def shampoo(
    *,
    limit: float = 0.05,
    momentum: float = 0.9,
    statistics_every: int = 1,
    inverses_every: int = 20,
    eager: int = 20,
    lag: int = 0,
) -> Method:
    """Shampoo (arXiv:1802.09568v2, Algorithm 1): L^{-1/4} G R^{-1/4}, sums of gradient products from damping I.

    Kernels are flattened to matrices, and what is no matrix gets the diagonal of the same (AdaGrad). The paper takes
    roots at every step; the default here spares them after the first 20. Default damping: the paper's epsilon. The
    bound and the default lr are ours: without it, old roots break autoencoders of MNIST's size at a tenth of this lr.

    Args:
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (the paper).
        momentum: decay in [0, 1) of the gradients' average, before preconditioning.
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1, steps between roots.
        eager: roots at each of the steps 0 ... eager as well.
        lag: >= 0, < T2; later roots are computed in a thread beside as many steps, and first used then.
    """
    return Method(
        Kronecker(Root(4.0), Root(4.0), Schedule(statistics_every, inverses_every, eager, lag=lag)),
        BatchMean(),
        damping=ConstantDamping(),
        momentum=EMA(momentum),
        step_size=bounded_step(limit, decrease=math.inf),  # sums only grow: steps need not know the loss
        fallback=Diagonal(average=RunningSum()),
        defaults={"lr": 0.3, "damping": 1e-4},
    )


def tnt(
    *,
    limit: float = 0.05,
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    statistics_every: int = 1,
    inverses_every: int = 20,
    eager: int = 20,
    lag: int = 0,
) -> Method:
    """Tensor Normal Training (arXiv:2106.02925v3, Algorithm 2): covariances of a matrix-normal sampled gradient.

    Labels are sampled from the model (needs a likelihood); the statistics start from one pass over the data. The
    published settings are (T1, T2) = (1, 20) for autoencoders and (10, 100) for CNNs, lr 1e-4 and damping 0.1 on the
    MNIST autoencoder (PAPERS 4.2), and no bound. The bound and the default lr and damping are ours. What is no matrix
    gets the diagonal of what the paper does with parameters of order one, with the damping 0.1.

    Args:
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (the paper).
        momentum: decay in [0, 1), heavy ball.
        statistics_decay: of the covariances, in [0, 1).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        eager: inverses at each of the steps 0 ... eager as well.
        lag: >= 0, < T2; later inverses are computed in a thread beside as many steps, and first used then.
    """
    factor = GradientCovariance(MovingAverage(statistics_decay))
    return Method(
        Kronecker(factor, factor, Schedule(statistics_every, inverses_every, eager, lag=lag)),
        SampledBatchMean(),
        damping=ConstantDamping(),
        momentum=HeavyBall(momentum),
        weight_decay=Decoupled(),
        step_size=bounded_step(limit),
        fallback=Diagonal(power=1.0, average=MovingAverage(statistics_decay), epsilon=0.1),
        warm_start=SampledBatchMean(),
        defaults={"lr": 1e-3, "damping": 0.01},
    )


def soap(
    *, beta1: float = 0.95, beta2: float = 0.95, basis_every: int = 10, largest: int = 4096, lag: int = 0
) -> Method:
    """SOAP (arXiv:2409.11321v2, Algorithm 3): Adam in the slowly renewed eigenbasis of Shampoo's matrices.

    The damping is Adam's epsilon. Betas, decay and the renewal every 10 steps are the paper's;
    its lr of 3e-3 is that of long runs of language models, the default here three times as large. See
    :class:`Eigenbasis` for the first step. What is no matrix gets Adam, as in the paper.

    Args:
        beta1: decay in [0, 1) of the momentum.
        beta2: decay in [0, 1) of the squares and of Shampoo's matrices.
        basis_every: steps between renewals by one power iteration and QR, >= 1.
        largest: a longer side (a vocabulary) keeps its coordinates, as in the authors' code beyond 10000; >= 1. Here
            a basis of that order takes 128 MiB in float32, and on a CPU a renewal takes seconds.
        lag: >= 0, < ``basis_every``; renewals after step 1 are computed in a thread beside as many steps, and first
            used then.
    """
    average = MovingAverage(beta2)
    return Method(
        Eigenbasis(
            GradientMoments(),
            power=0.5,
            average=average,
            sides=average,
            schedule=Schedule(inverses=basis_every, eager=1, lag=lag),
            limit=2**31,
            turned=largest,
        ),
        BatchMean(),
        damping=ConstantDamping(),
        momentum=CorrectedEMA(beta1),
        weight_decay=Decoupled(),
        fallback=Diagonal(average=average),
        defaults={"lr": 1e-2, "damping": 1e-8, "weight_decay": 1e-2},
    )


_SCALES: dict[str, type[UpdateScale]] = {"match-adam": MatchAdam, "aspect-ratio": AspectRatio}


def muon(
    *, momentum: float = 0.95, beta2: float = 0.95, scale: str = "match-adam", iterations: int = 5, heads: str = LAST
) -> Method:
    """Muon (Jordan et al. 2024; ``torch.optim.Muon``): orthogonalised Nesterov momentum on hidden weight matrices.

    The output layer, embeddings, biases, normalisation layers and everything else get AdamW with the same Nesterov
    momentum, as its authors use it. One lr serves both kinds because a step is scaled to the size of Adam's
    (arXiv:2502.16982v1); with ``aspect-ratio``, the original rule, steps are smaller by about 0.2 sqrt(max side).

    Args:
        momentum: decay in [0, 1).
        beta2: decay in [0, 1) of the squared gradients of AdamW.
        scale: ``match-adam`` or ``aspect-ratio``.
        iterations: of Newton and Schulz, >= 1.
        heads: layers whose matrices AdamW takes: patterns of names, separated by commas (``actor,critic``).
            ``(last)``: the layer that owns the model's last matrix, as the layer table shows. Empty: none, so that
            every matrix is orthogonalised.
    """
    adam = Diagonal(average=MovingAverage(beta2))
    hidden = Spectral(chosen("scale", scale, _SCALES), iterations=iterations)
    names = [name.strip() for name in heads.split(",") if name.strip()]
    kinds = {kind: adam if kind == "Embedding" else hidden for kind in KINDS}
    return Method(
        ByLayer({**dict.fromkeys(names, adam), **kinds}, otherwise=adam),
        momentum=Nesterov(EMA(momentum)),
        weight_decay=Decoupled(),
        fallback=adam,
        defaults={"lr": 0.02, "weight_decay": 1e-2},
    )
