"""The published methods, each a few lines of parts. Constants as in the authors' code, see PAPERS for sources."""

from __future__ import annotations

from dataclasses import replace

from ....curvature.estimators import BatchMean, InputsOnly, SampledBatchMean, SecantPairs
from ....curvature.layers.adapters import KINDS
from ....errors import ArgumentError
from ....preconditioners.averages import Average, MovingAverage, ZeroStartAverage
from ....preconditioners.damping.split import ConstantDamping, Split
from ....preconditioners.factors.bfgs import BFGS, HessianActionBFGS
from ....preconditioners.factors.factor import Factor
from ....preconditioners.factors.lbfgs import LBFGS
from ....preconditioners.pairs.damping import (
    DoubleDamping,
    MergedDoubleDamping,
    NoDamping,
    PairDamping,
    PowellB0,
    PowellH,
    PowellThenLM,
)
from ....preconditioners.protocol import Schedule
from ....preconditioners.structures.by_layer import ByLayer
from ....preconditioners.structures.diagonal import Diagonal
from ....preconditioners.structures.kronecker import Kronecker
from ....preconditioners.structures.mini_block import MiniBlock
from ....preconditioners.structures.partitions import (
    FlatChunk,
    Kernel,
    Partition,
    PerInputAveraged,
    PerOutput,
    PerOutputAveraged,
)
from ....stepsize.guard import Backtrack, Guard, NoGuard
from ..method import Method
from ..momentum import EMA, Decoupled, HeavyBall

__all__ = ["kbfgs", "kbfgs_limited", "mbf", "mbf_released", "pair_damping", "step_guard"]

PARTITIONS: dict[str, type[Partition]] = {
    "per-output": PerOutput,
    "per-output-averaged": PerOutputAveraged,
    "per-input-averaged": PerInputAveraged,
    "flat-chunk": FlatChunk,
}


PAIRS: dict[str, type[PairDamping]] = {
    "double": DoubleDamping,
    "powell-then-lm": PowellThenLM,
    "powell-h": PowellH,
    "merged": MergedDoubleDamping,
    "powell-b0": PowellB0,
    "none": NoDamping,
}


def pair_damping(name: str | None) -> PairDamping:
    """A pair damping by name: ``double``, ``powell-then-lm``, ``powell-h``, ``merged``, ``powell-b0`` or ``none``.

    ``None`` is what command lines make of the word.
    """
    name = "none" if name is None else name
    if name not in PAIRS:
        raise ArgumentError(f"pairs must be one of {', '.join(PAIRS)}, got {name!r}")
    return PAIRS[name]()


def step_guard(growth: float) -> Guard:
    """Backtracking when the mini-batch loss grows by more than ``growth`` > 1; infinity means no guard."""
    return NoGuard() if growth == float("inf") else Backtrack(growth)


def _quasi_newton(
    outputs: Factor, statistics: Average, momentum_decay: float, statistics_every: int, guard: Guard
) -> Method:
    return Method(
        preconditioner=Kronecker(
            inputs=HessianActionBFGS(statistics),
            outputs=outputs,
            schedule=Schedule(statistics=statistics_every, inverses=None, first=1),
        ),
        curvature=SecantPairs(),
        damping=Split(),
        momentum=EMA(momentum_decay),
        guard=guard,
        warm_start=InputsOnly(),
        defaults={"lr": 0.1, "damping": 0.3, "weight_decay": 0.0},
    )


def kbfgs(
    *,
    pairs: str = "double",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    pair_decay: float = 0.9,
    statistics_every: int = 1,
    growth: float = 1.1,
) -> Method:
    """K-BFGS (arXiv:2006.08877v3): BFGS at the outputs, Hessian-action BFGS at the inputs, double damping.

    Args:
        pairs: ``double`` (needs damping < 1), ``powell-then-lm``, ``powell-h``, ``merged``, ``powell-b0`` or ``none``.
        momentum: decay in [0, 1).
        statistics_decay: of A, in [0, 1).
        pair_decay: of the averaged pair; 0 in full-batch mode.
        statistics_every: T1, steps between updates of A.
        growth: the guard's factor, > 1; ``inf`` switches it off (the released code).
    """
    outputs = BFGS(pair_damping(pairs), ZeroStartAverage(pair_decay))
    return _quasi_newton(outputs, MovingAverage(statistics_decay), momentum, statistics_every, step_guard(growth))


def kbfgs_limited(
    *,
    memory: int = 100,
    pairs: str = "double",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    pair_decay: float = 0.9,
    statistics_every: int = 1,
    growth: float = 1.1,
) -> Method:
    """K-BFGS(L) (arXiv:2006.08877v3): as K-BFGS with L-BFGS over the last ``memory`` pairs at the outputs.

    Args:
        memory: p >= 1.
        pairs: ``double`` (needs damping < 1), ``powell-then-lm``, ``powell-h``, ``merged``, ``powell-b0`` or ``none``.
        momentum: decay in [0, 1).
        statistics_decay: of A, in [0, 1).
        pair_decay: of the averaged pair; 0 in full-batch mode.
        statistics_every: T1, steps between updates of A.
        growth: the guard's factor, > 1; ``inf`` switches it off (the released code).
    """
    outputs = LBFGS(memory, pair_damping(pairs), ZeroStartAverage(pair_decay))
    return _quasi_newton(outputs, MovingAverage(statistics_decay), momentum, statistics_every, step_guard(growth))


_CONVOLUTIONS = tuple(kind for kind in KINDS if kind.startswith("Conv"))


def _mini_block(partition: Partition, schedule: Schedule, lr: float, damping: float) -> Method:
    # e / (sqrt(v_e) + 1e-8) with e the 0.9/0.1 average equals M / (sqrt(v_M) + 1e-7) with heavy-ball M = 10 e.
    adam_type = Diagonal(average=MovingAverage(0.999), epsilon=1e-7, source="momentum")
    average = MovingAverage(0.9)
    return Method(
        preconditioner=ByLayer(
            {
                **dict.fromkeys(("Linear", "Attention"), MiniBlock(partition, average, schedule)),
                **dict.fromkeys(_CONVOLUTIONS, MiniBlock(Kernel(), average, schedule)),
            },
            otherwise=adam_type,
        ),
        curvature=BatchMean(),
        damping=ConstantDamping(),
        momentum=HeavyBall(0.9),
        weight_decay=Decoupled(),
        fallback=adam_type,
        warm_start=SampledBatchMean(),
        defaults={"lr": lr, "damping": damping, "weight_decay": 0.0},
    )


def mbf(*, blocks: str = "per-output", statistics_every: int = 2, inverses_every: int = 25) -> Method:
    """Mini-Block Fisher (arXiv:2202.04124v3) with the paper's blocks: per output neuron, per kernel.

    The default (lr, damping) is the released setting (1e-5, 3e-4) for flat chunks moved to where per-output blocks,
    whose curvature is spread over many directions, are stable on every shipped problem; tune both.

    Args:
        blocks: ``per-output`` (averaged where a layer is too wide), ``per-output-averaged``, ``per-input-averaged``
            or ``flat-chunk``.
        statistics_every: T1 >= 1; the paper uses 2 for autoencoders, 10 for CNNs.
        inverses_every: T2 >= 1; 25 and 100.
    """
    if blocks not in PARTITIONS:
        raise ArgumentError(f"blocks must be one of {', '.join(PARTITIONS)}, got {blocks!r}")
    schedule = Schedule(statistics=statistics_every, inverses=inverses_every, eager=inverses_every)
    return _mini_block(PARTITIONS[blocks](), schedule, lr=1e-3, damping=0.3)


def mbf_released(*, statistics_every: int = 2, inverses_every: int = 25) -> Method:
    """MBF with the dense blocks that the authors' released driver runs (flat chunks), and their autoencoder setting.

    Args:
        statistics_every: T1 >= 1.
        inverses_every: T2 >= 1.
    """
    base = mbf(blocks="flat-chunk", statistics_every=statistics_every, inverses_every=inverses_every)
    return replace(base, defaults={"lr": 1e-5, "damping": 3e-4})
