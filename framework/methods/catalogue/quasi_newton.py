"""Quasi-Newton methods on Kronecker factors: K-BFGS. Constants as in the authors' code, see PAPERS for sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ....curvature.estimators import InputsOnly, SecantPairs
from ....preconditioners.averages import Average, MovingAverage, ZeroStartAverage
from ....preconditioners.damping.split import Split
from ....preconditioners.factors.bfgs import BFGS, HessianActionBFGS
from ....preconditioners.factors.factor import Factor
from ....preconditioners.factors.lbfgs import LBFGS
from ....preconditioners.protocol import Schedule
from ....preconditioners.structures.kronecker import Kronecker
from ....stepsize.guard import Guard
from ....stepsize.protocol import StepSize
from ..method import Method
from ..momentum import EMA, Decoupled
from .names import bounded_step, chosen, pair_damping, step_guard

__all__ = ["kbfgs", "kbfgs_conv", "kbfgs_limited"]


def _quasi_newton(
    outputs: Factor,
    statistics: Average,
    momentum_decay: float,
    statistics_every: int,
    guard: Guard,
    step_size: StepSize,
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
        step_size=step_size,
        guard=guard,
        warm_start=InputsOnly(),
        defaults={"lr": 0.3, "damping": 0.1, "weight_decay": 0.0},
    )


def kbfgs(
    *,
    pairs: str = "double",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    pair_decay: float = 0.9,
    statistics_every: int = 1,
    growth: float = 1.1,
    guard: str = "backtrack",
    limit: float = 0.05,
) -> Method:
    """K-BFGS (arXiv:2006.08877v3): BFGS at the outputs, Hessian-action BFGS at the inputs, double damping.

    Args:
        pairs: ``double`` (needs damping < 1), ``powell-then-lm``, ``powell-h``, ``merged``, ``powell-b0`` or ``none``.
        momentum: decay in [0, 1).
        statistics_decay: of A, in [0, 1).
        pair_decay: of the averaged pair; 0 in full-batch mode.
        statistics_every: T1, steps between updates of A.
        growth: the guard's factor, > 1; ``inf`` switches it off (the released code).
        guard: ``backtrack`` compares a step with the loss before it, ``ceiling`` with the lowest mean so far too.
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (the released code).
    """
    outputs = BFGS(pair_damping(pairs), ZeroStartAverage(pair_decay))
    return _quasi_newton(
        outputs,
        MovingAverage(statistics_decay),
        momentum,
        statistics_every,
        step_guard(growth, guard),
        bounded_step(limit),
    )


def kbfgs_limited(
    *,
    memory: int = 100,
    pairs: str = "double",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    pair_decay: float = 0.9,
    statistics_every: int = 1,
    growth: float = 1.1,
    guard: str = "backtrack",
    limit: float = 0.05,
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
        guard: ``backtrack`` compares a step with the loss before it, ``ceiling`` with the lowest mean so far too.
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (the released code).
    """
    outputs = LBFGS(memory, pair_damping(pairs), ZeroStartAverage(pair_decay))
    return _quasi_newton(
        outputs,
        MovingAverage(statistics_decay),
        momentum,
        statistics_every,
        step_guard(growth, guard),
        bounded_step(limit),
    )


def kbfgs_conv(
    *,
    action: str = "averaged",
    momentum: float = 0.9,
    statistics_decay: float = 0.9,
    pair_decay: float = 0.9,
    growth: float = 1.1,
    limit: float = 0.05,
) -> Method:
    """K-BFGS for convolutions (arXiv:2102.06737v3): Powell damping with H, then Levenberg-Marquardt; decoupled decay.

    A sums over positions, the secant pair averages over them, damping is sqrt(damping S) and sqrt(damping / S)
    (PAPERS 1.6). The guard and the bound are ours, as in ``kbfgs``, and so are the default lr and damping.

    Args:
        action: which A the Hessian action uses: ``averaged`` over steps, or of the current ``mini-batch`` (the paper's
            variant for large layers; here it saves no memory, A is still stored for one step).
        momentum: decay in [0, 1).
        statistics_decay: of A, in [0, 1); without effect on ``mini-batch``.
        pair_decay: of the averaged pair, in [0, 1).
        growth: the guard's factor, > 1; ``inf`` switches it off (the paper).
        limit: > 0, the largest step of a layer in units of its norm; ``inf``: lr alone decides (the paper).
    """
    averages: dict[str, Callable[[], Average]] = {
        "averaged": lambda: MovingAverage(statistics_decay),
        "mini-batch": lambda: ZeroStartAverage(0.0),
    }
    base = kbfgs(pairs="powell-then-lm", momentum=momentum, pair_decay=pair_decay, growth=growth, limit=limit)
    structure = base.preconditioner
    assert isinstance(structure, Kronecker)
    return replace(
        base,
        preconditioner=replace(structure, inputs=HessianActionBFGS(chosen("action", action, averages))),
        weight_decay=Decoupled(),
        defaults={"lr": 0.6, "damping": 0.1, "weight_decay": 0.0},
    )
