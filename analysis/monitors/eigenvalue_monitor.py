"""The eigenvalues of every quasi-Newton matrix during training, beside the bounds of PAPERS 1.4.

For one update of H by a pair with y'Hy <= a s'y, |y|^2 <= b s'y and s'y >= c |s|^2, with M the largest eigenvalue of H
and B the inverse of H:

    U1   H+ >= H / (1 + a)
    U2   |B+| <= |B| + b, hence the smallest eigenvalue of H+ is at least 1 / (|B| + b)
    U3   |H+| <= (sqrt(M) + sqrt(a / c))^2 + 1 / c

A damping of pairs *promises* a, b and c from H alone, in its ``bounds``; for a rule that promises none, or not all,
the missing ones are measured in the pair, and what is checked is the update, not the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...curvature.declarations import FactorDeclarations, PairDampingDeclarations, declared
from ...preconditioners.factors.lbfgs import LBFGS, LBFGSState
from ...preconditioners.pairs.damping import PairBounds
from ...preconditioners.pairs.skipping import TwoSidedCurvatureTest
from ..quality.spectra import relative_to
from ..theorem import Inequality
from .monitors import Moment
from .readings import Reading
from .updates import Update

__all__ = ["EigenvalueBounds", "store_bounds"]


def store_bounds(state: LBFGSState, initial: float, floor: float | None, mu3: float | None) -> Tensor:
    """Lower and upper bound for the eigenvalues of L-BFGS(p) with initial matrix gamma I, (2,), float64.

    With p stored pairs, s'y >= mu2 |s|^2 and |y|^2 <= s'y / mu3 the bounds are uniform, c = 1 / (mu2 mu3):
    1 / (1 / gamma + p / mu3) and c^p gamma + (c^p - 1) / (mu2 (c - 1)) (PAPERS 1.4). A constant that is not promised is
    measured pair by pair, which gives the same recursions with each pair's own numbers.

    Args:
        state: the store.
        initial: gamma.
        floor: mu2 > 0, or ``None``.
        mu3: > 0, or ``None``.
    """
    used = state.cross.diagonal() > 0
    steps, changes = state.steps[used].double(), state.changes[used].double()
    curvature = (steps * changes).sum(1)
    slow = steps.square().sum(1) / curvature  # |s|^2 / s'y <= 1 / mu2
    fast = changes.square().sum(1) / curvature  # |y|^2 / s'y <= 1 / mu3
    if floor is not None and floor > 0.0:
        slow = torch.full_like(slow, 1.0 / floor)
    if mu3 is not None:
        fast = torch.full_like(fast, 1.0 / mu3)
    high = torch.tensor(initial, dtype=torch.float64, device=steps.device)
    for inner, outer in zip(slow, fast, strict=True):
        high = inner * outer * high + inner
    low = 1.0 / (1.0 / initial + fast.sum())
    return torch.stack([low, high])


@dataclass(frozen=True)
class EigenvalueBounds:
    """Smallest and largest eigenvalue of every quasi-Newton H after a step, each beside its bound.

    BFGS: U1-U3 of the module's docstring. L-BFGS(p): :func:`store_bounds`. Hessian action: with
    E = L'HL, A + damping I = LL', the update interlaces, min(1, lowest E) <= lambda(E+) <= max(1, highest E).

    Cost: two symmetric eigenvalue problems per matrix and examined step; see ``every`` of
    :func:`osculate.analysis.watch`.
    """

    reads_updates = True

    def examine(self, moment: Moment) -> Iterator[Reading]:
        """Two or three readings per matrix."""
        for update in moment.updates:
            limited = isinstance(update.factor, LBFGS)
            find = _interlacing if update.second_moment is not None else _limited if limited else _dense
            for entry in find(update):
                yield Reading(moment.report.step, type(self).__name__, update.place, entry)


def _dense(update: Update) -> Iterator[Inequality]:
    """U1, U2, U3 of one BFGS update."""
    old, new = _spectrum(update.before), _spectrum(update.after)
    low, high = float(old[0]), float(old[-1])
    if not low > 0.0:
        yield Inequality("lambda_min(H) > 0 before the update", low, 0.0, ">=", tolerance=0.0)
        return
    rounding = 64.0 * update.epsilon * max(high, float(new[-1]))
    if not update.accepted:
        yield from _within("H", new, low, high, rounding)
        return
    a, b, c = _constants(update, low, high)
    grown = (high**0.5 + (a / c) ** 0.5) ** 2 + 1.0 / c
    yield from _within("H", new, 1.0 / (1.0 / low + b), grown, rounding)
    relative = _spectrum(relative_to(update.after, update.before))
    yield _bounded("lambda_min(H^-1 H+)", relative[0], ">=", 1.0 / (1.0 + a), rounding / low)


def _constants(update: Update, low: float, high: float) -> tuple[float, float, float]:
    """a, b, c of one pair: as promised, else as measured (up to rounding, so that U1-U3 are not tight by design)."""
    rule = declared(update.factor, FactorDeclarations).pairs
    promise = declared(rule, PairDampingDeclarations).bounds
    ends = torch.tensor([low, high], dtype=torch.float64)
    known = PairBounds() if promise is None else promise(update.damping, *ends)
    step, change = update.step, update.change
    curvature = torch.dot(step, change)
    measured = (
        float(torch.dot(change, update.before @ change) / curvature),
        float(torch.dot(change, change) / curvature),
        float(curvature / torch.dot(step, step)),
    )
    promised = (known.weighted, known.growth, known.floor)
    a, b, c = (found if given is None else float(given) for given, found in zip(promised, measured, strict=True))
    return a, b, c


def _limited(update: Update) -> Iterator[Inequality]:
    """The bounds of the store; a promise counts only if the rule and the skip test make it."""
    factor, new = update.factor, _spectrum(update.after)
    promise = declared(factor.pairs, PairDampingDeclarations).curvature_floor
    floor = None if promise is None else float(promise(update.damping))
    mu3 = factor.skip.mu3 if isinstance(factor.skip, TwoSidedCurvatureTest) else None
    low, high = store_bounds(update.state, factor.initial, floor, mu3).tolist()
    rounding = 64.0 * update.epsilon * float(new[-1])
    yield from _within("H", new, low, high, rounding)


def _interlacing(update: Update) -> Iterator[Inequality]:
    """Of one Hessian-action update."""
    assert update.second_moment is not None
    factor = torch.linalg.cholesky(update.second_moment)
    old, new = (_spectrum(factor.T @ matrix @ factor) for matrix in (update.before, update.after))
    rounding = (
        64.0
        * update.epsilon
        * float(torch.linalg.matrix_norm(update.second_moment))
        * float(torch.linalg.matrix_norm(update.before))
    )
    low, high = float(old[0]), float(old[-1])
    if update.accepted:
        low, high = min(1.0, low), max(1.0, high)
    yield from _within("E", new, low, high, rounding)


def _spectrum(matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        return torch.full((matrix.shape[0],), float("nan"), dtype=matrix.dtype)
    result: Tensor = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T))
    return result


def _within(name: str, spectrum: Tensor, low: float, high: float, rounding: float) -> Iterator[Inequality]:
    """Both ends of a spectrum, each beside its bound."""
    yield _bounded(f"lambda_min({name})", spectrum[0], ">=", low, rounding)
    yield _bounded(f"lambda_max({name})", spectrum[-1], "<=", high, rounding)


def _bounded(name: str, measured: Tensor, direction: Literal["<=", ">="], bound: float, rounding: float) -> Inequality:
    tolerance = 1e-9 + (rounding / abs(bound) if bound else rounding)
    return Inequality(name, float(measured), bound, direction, tolerance=tolerance)
