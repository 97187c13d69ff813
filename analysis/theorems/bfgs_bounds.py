"""T3: eigenvalue bounds for one BFGS update of H by a damped pair. T17: what damping does over two thousand of them.

With the constants a, c, g of :class:`.secant_pairs.Guarantee` the bounds U1 to U3 of PAPERS 1.4 read

    H+ >= H / (1 + a),    |B+| <= |B| + g,    |H+| <= (sqrt(M) + sqrt(a / c))^2 + 1 / c.

The updates are those of the factor :class:`.BFGS`, skip rule included (tolerance 0); U4 speaks of Powell's stage alone.
They compound: there is no uniform bound for dense BFGS, and T17 is a measurement, not a theorem.
"""

from __future__ import annotations

import functools
from functools import partial

import torch
from torch import Tensor

from ...preconditioners.factors.bfgs import BFGS, AveragedPair, BFGSState
from ...preconditioners.pairs.damping import (
    DoubleDamping,
    MergedDoubleDamping,
    NoDamping,
    PairDamping,
    PowellH,
    PowellThenLM,
)
from ...preconditioners.pairs.skipping import CurvatureTest
from ..quality.spectra import relative_to
from ..theorem import Control, Curve, Evidence, Inequality, Plot, Setting, Theorem, agreement, together, worst
from .instances import NEWEST, Draws, distribution, each, eigenvalues, observed_pair, updated_inverse
from .secant_pairs import MU1, MU2, Guarantee, PairInstances, guarantee

__all__ = ["THEOREMS"]

_SIZES = (2, 3, 5)
_COUNT = 200
_DECADES = 4.0
"""Condition of H up to 1e4: eigenvalues of H+ are then known to six digits, and no bound is looser for it."""

_ROUNDING = 1e-6


def _relative_low(inverse: Tensor, updated: Tensor) -> Tensor:
    """Smallest eigenvalue of H^{-1/2} H+ H^{-1/2}."""
    return eigenvalues(relative_to(updated, inverse))[:, 0]


def _largest_allowed(promise: Guarantee, high: Tensor) -> Tensor:
    """U3 for M = ``high``."""
    return (high.sqrt() + (promise.weighted / promise.floor).sqrt()).square() + 1 / promise.floor


def _dense_update(rule: PairDamping, damping: float, given: PairInstances) -> Tensor:
    """The textbook update (I - rho s y') H (I - rho y s') + rho s s' of the damped pair."""

    def one(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
        pair = rule.damp(step, change, inverse @ change, damping)
        rho = 1.0 / (pair.step @ pair.change)
        left = torch.eye(len(step), dtype=step.dtype, device=step.device) - rho * torch.outer(pair.step, pair.change)
        return left @ inverse @ left.T + rho * torch.outer(pair.step, pair.step)

    result: Tensor = each(one, given.inverse, given.step, given.change)
    return result


def _one_step(rule: PairDamping, damping: float, given: PairInstances) -> tuple[dict[str, Tensor], Tensor]:
    """Quotients that must be at least 1, and the updated matrices."""
    updated = updated_inverse(BFGS(rule, NEWEST, CurvatureTest(0.0)), given.inverse, given.step, given.change, damping)
    promise = guarantee(rule, damping, given.low, given.high)
    spectrum = eigenvalues(updated)
    found = {
        "U1: H+ >= H / (1 + a)": _relative_low(given.inverse, updated) * (1 + promise.weighted),
        "U2: |B+| <= |B| + g": spectrum[:, 0] * (1 / given.low + promise.growth),
        "U3: |H+| <= (sqrt(M) + sqrt(a/c))^2 + 1/c": _largest_allowed(promise, given.high) / spectrum[:, -1],
    }
    return found, updated


def _check(setting: Setting, rules: tuple[str, ...] = ("double", "lm", "merged")) -> Evidence:
    """Every rule, mu1, mu2 and size on the same instances."""
    draws = Draws(setting, 300)
    instances = [PairInstances.draw(draws, _COUNT, size, _DECADES) for size in _SIZES]
    found: dict[str, list[Tensor]] = {}
    differences: list[Inequality] = []
    for mu1 in MU1:
        for mu2 in MU2:
            made: dict[str, PairDamping] = {
                "double": DoubleDamping(mu1),
                "lm": PowellThenLM(mu1),
                "merged": MergedDoubleDamping(mu1),
            }
            for name in rules:
                rule: PairDamping = made.get(name, NoDamping())
                for given in instances:
                    ratios, updated = _one_step(rule, mu2, given)
                    for label, values in ratios.items():
                        found.setdefault(f"{name}, {label}", []).append(values)
                    if rule != NoDamping():
                        dense = _dense_update(rule, mu2, given)
                        differences.append(agreement("BFGS = dense formula", updated, dense, _ROUNDING))
    joined = {name: torch.cat(values) for name, values in found.items()}
    inequalities = [worst(name, values, 1.0, ">=", _ROUNDING) for name, values in joined.items()]
    if differences:
        inequalities += [together(differences), *_powell(instances)]
    low = torch.cat([given.low for given in instances])
    plot = distribution("One BFGS update of H", "bound / measured", joined)
    return Evidence(tuple(inequalities), (worst("lambda_min(H) > 0", low, 0.0, ">="),), {}, (plot,))


def _powell(instances: list[PairInstances]) -> list[Inequality]:
    """U4: Powell's stage alone keeps H+ >= mu1 H / (1 + mu1)."""
    values = []
    for mu1 in MU1:
        for given in instances:
            factor = BFGS(PowellH(mu1), NEWEST, CurvatureTest(0.0))
            updated = updated_inverse(factor, given.inverse, given.step, given.change, 0.0)
            values.append(_relative_low(given.inverse, updated) * (1 + 1 / mu1))
    return [worst("Powell alone, U4: H+ >= mu1 H / (1 + mu1)", torch.cat(values), 1.0, ">=", _ROUNDING)]


def _powell_unbounded(setting: Setting) -> Evidence:
    """U3 asked of Powell's stage alone, whose y may be as small as it likes: with the constants of double damping."""
    draws = Draws(setting, 301)
    values = []
    for size in _SIZES:
        given = PairInstances.draw(draws, _COUNT, size, _DECADES)
        factor = BFGS(PowellH(0.2), NEWEST, CurvatureTest(0.0))
        updated = updated_inverse(factor, given.inverse, given.step, given.change, 0.0)
        promise = guarantee(DoubleDamping(0.2), 0.5, given.low, given.high)
        values.append(_largest_allowed(promise, given.high) / eigenvalues(updated)[:, -1])
    return Evidence((worst("Powell alone, U3 of double damping", torch.cat(values), 1.0, ">=", _ROUNDING),))


# -- T17 ---------------------------------------------------------------------------------------------------------------

_UPDATES, _ORDER, _TRIALS, _EVERY = 2000, 20, 3, 20
_MU2, _NOISE = 0.5, 0.02
_FACTOR = 10.0

_RULES: dict[str, PairDamping] = {
    "double damping": DoubleDamping(),
    "Powell-then-LM": PowellThenLM(),
    "Powell alone": PowellH(),
    "no damping": NoDamping(),
}


def _curvature(draws: Draws) -> Tensor:
    """(trials, d, d) symmetric G with the eigenvalues -0.1 ... 1 in random directions."""
    basis = draws.rotations(_TRIALS, _ORDER)
    return (basis * torch.linspace(-0.1, 1.0, _ORDER, dtype=torch.float64, device=basis.device)) @ basis.mT


@functools.lru_cache(maxsize=8)
def _largest(name: str, setting: Setting) -> Tensor:
    """(records, trials): lambda_max(H) along 2000 updates by pairs y = G s + noise, the same for every rule."""
    draws, factor = Draws(setting, 1700), BFGS(_RULES[name], NEWEST, CurvatureTest())
    curvature = _curvature(draws)
    identity = torch.eye(_ORDER, dtype=torch.float64, device=curvature.device)
    inverse = identity.expand(_TRIALS, -1, -1).clone()
    zero, reference = torch.zeros_like(identity[0]), identity[0]

    def update(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
        state = BFGSState(inverse.clone(), AveragedPair(zero * step, zero * step, 0.0))
        factor.observe_step(state, *observed_pair(step, change, reference), "outputs", _MU2)
        return state.inverse

    records = []
    for index in range(_UPDATES):
        step = draws.normal(_TRIALS, _ORDER)
        change = (curvature @ step.unsqueeze(2)).squeeze(2) + _NOISE * draws.normal(_TRIALS, _ORDER)
        inverse = each(update, inverse, step, change)
        if index % _EVERY == _EVERY - 1:
            records.append(eigenvalues(inverse)[:, -1])
    return torch.stack(records)


def _long_run(setting: Setting, damped: tuple[str, ...] = ("double damping", "Powell-then-LM")) -> Evidence:
    """The largest eigenvalue ever seen, trial by trial, against that without damping and with Powell's stage alone."""
    names = dict.fromkeys((*damped, "Powell alone", "no damping"))
    runs = {name: _largest(name, setting) for name in names}
    peaks = {name: run.amax(0) for name, run in runs.items()}
    inequalities = [
        worst(f"largest lambda_max(H), {name} against {other}", peaks[name] / peaks[other], 1 / _FACTOR)
        for name in damped
        for other in ("no damping", "Powell alone")
    ]
    axis = [float(_EVERY * (index + 1)) for index in range(_UPDATES // _EVERY)]
    curves = [
        Curve(name, axis, run.amax(1).tolist(), "measured" if name in damped else "control")
        for name, run in runs.items()
    ]
    label = r"largest $\lambda_{max}(H)$ of the trials"
    plot = Plot("BFGS on noisy indefinite curvature", "update", label, tuple(curves), y_log=True)
    negative = eigenvalues(_curvature(Draws(setting, 1700)))[:, 0]
    constants = {f"largest lambda_max(H), {name}": float(peak.max()) for name, peak in peaks.items()}
    return Evidence(tuple(inequalities), (worst("curvature is indefinite", negative, 0.0),), constants, (plot,))


THEOREMS = (
    Theorem(
        "T3",
        "One BFGS update by a damped pair neither shrinks H by more than a known factor nor grows it beyond a bound.",
        r"H^+ \succeq \frac{H}{1 + a^*}, \quad \Vert B^+\Vert \leq \Vert B\Vert + g, \quad "
        r"\Vert H^+\Vert \leq (\sqrt{M} + \sqrt{a^* / \mu_2})^2 + \frac{1}{\mu_2}",
        "arXiv:2006.08877 (update), docs/PAPERS.md 1.4 U1-U4 (proofs, ours)",
        _check,
        partial(_check, rules=("none",)),
        "pairs are not damped, only skipped where s'y <= 0",
        (Control("the bound on |H+| is asked of Powell's stage alone", _powell_unbounded),),
    ),
    Theorem(
        "T17",
        "Over 2000 updates on noisy indefinite curvature damping keeps the largest eigenvalue of H at least ten times "
        "smaller than no damping, and than Powell's stage alone (a measurement: no uniform bound exists).",
        r"\max_k \lambda_{max}(H_k^{damped}) \leq \frac{1}{10} \max_k \lambda_{max}(H_k)",
        "docs/PAPERS.md 1.4 (ours)",
        _long_run,
        partial(_long_run, damped=("Powell alone",)),
        "Powell's stage alone stands in for double damping",
    ),
)
