"""Methods on mini-blocks: MBF as published and as released, and our secant blocks."""

from __future__ import annotations

from dataclasses import replace

from ....curvature.estimators import BatchMean, SampledBatchMean, SecantPairs
from ....preconditioners.averages import MovingAverage, ZeroStartAverage
from ....preconditioners.damping.split import ConstantDamping, Damping
from ....preconditioners.protocol import Schedule
from ....preconditioners.structures.by_layer import ByLayer
from ....preconditioners.structures.diagonal import Diagonal
from ....preconditioners.structures.identity import Identity
from ....preconditioners.structures.mini_block import MiniBlock
from ....preconditioners.structures.partitions import Kernel, Partition
from ....preconditioners.structures.secant_blocks import SecantBlocks
from ....stepsize.protocol import StepSize
from ..method import Method
from ..momentum import EMA, Decoupled, HeavyBall
from .names import CONVOLUTIONS, UNITS, bounded_step, chosen, pair_damping, partition, step_guard

__all__ = ["mbf", "mbf_released", "mini_block_lbfgs"]


def _mini_block(blocks: Partition, schedule: Schedule, damping: Damping, step_size: StepSize) -> Method:
    # e / (sqrt(v_e) + 1e-8) with e the 0.9/0.1 average equals M / (sqrt(v_M) + 1e-7) with heavy-ball M = 10 e.
    adam_type = Diagonal(average=MovingAverage(0.999), epsilon=1e-7, source="momentum")
    average = MovingAverage(0.9)
    return Method(
        preconditioner=ByLayer(
            {
                **dict.fromkeys(("Linear", "Attention"), MiniBlock(blocks, average, schedule)),
                **dict.fromkeys(CONVOLUTIONS, MiniBlock(Kernel(), average, schedule)),
            },
            otherwise=adam_type,
        ),
        curvature=BatchMean(),
        damping=damping,
        momentum=HeavyBall(0.9),
        weight_decay=Decoupled(),
        step_size=step_size,
        fallback=adam_type,
        warm_start=SampledBatchMean(),
        defaults={"lr": 1e-3, "damping": 1.0, "weight_decay": 0.0},
    )


def mbf(
    *,
    blocks: str = "per-output",
    units: str = "curvature",
    limit: float = 0.05,
    statistics_every: int = 2,
    inverses_every: int = 25,
    lag: int = 0,
) -> Method:
    """Mini-Block Fisher (arXiv:2202.04124v3) with the paper's blocks: per output neuron, per kernel.

    The paper's form is ``units="absolute", limit=inf``, with an lr and a damping to be tuned for each problem: the
    blocks are products of mini-batch gradients, so a step is the longer the smaller the gradient. The defaults are
    ours and need no tuning to train: damping in units of each layer's blocks, and a bound on the step.

    Args:
        blocks: ``per-output`` (averaged where a layer is too wide), ``per-output-averaged``, ``per-input-averaged``
            or ``flat-chunk``.
        units: of damping: ``curvature``, the mean eigenvalue of a layer's blocks, or ``absolute`` (the paper).
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (the paper).
        statistics_every: T1 >= 1; the paper uses 2 for autoencoders, 10 for CNNs.
        inverses_every: T2 >= 1; 25 and 100.
        lag: >= 0, < T2; inverses after step T2 are computed in a thread beside as many steps, and first used then.
    """
    schedule = Schedule(statistics=statistics_every, inverses=inverses_every, eager=inverses_every, lag=lag)
    method = _mini_block(partition(blocks), schedule, chosen("units", units, UNITS), bounded_step(limit))
    return method if units == "curvature" else replace(method, defaults={**method.defaults, "damping": 0.3})


def mbf_released(*, limit: float = 0.05, statistics_every: int = 2, inverses_every: int = 25, lag: int = 0) -> Method:
    """MBF with the dense blocks that the authors' released driver runs (flat chunks), and their units of damping.

    Their setting of the MNIST autoencoder is ``limit=inf``, lr 1e-5 and damping 3e-4, after a warm start over all of
    MNIST; with less it breaks down. The bound and the default lr and damping are ours.

    Args:
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (their driver).
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
        lag: >= 0, < T2; inverses after step T2 are computed in a thread beside as many steps, and first used then.
    """
    base = mbf(
        blocks="flat-chunk",
        units="absolute",
        limit=limit,
        statistics_every=statistics_every,
        inverses_every=inverses_every,
        lag=lag,
    )
    return replace(base, defaults={"lr": 1e-4, "damping": 3e-3})


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
    dense = SecantBlocks(partition(blocks), memory, pair_damping(pairs), ZeroStartAverage(pair_decay))
    kernels = replace(dense, partition=Kernel())
    return Method(
        ByLayer(
            {**dict.fromkeys(("Linear", "Attention"), dense), **dict.fromkeys(CONVOLUTIONS, kernels)},
            otherwise=Identity(),
        ),
        SecantPairs(),
        damping=ConstantDamping(),
        momentum=EMA(momentum),
        guard=step_guard(growth),
        defaults={"lr": 0.3, "damping": 0.3},
    )
