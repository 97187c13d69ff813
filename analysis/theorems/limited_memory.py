"""T4: uniform eigenvalue bounds of L-BFGS(p). T5: its compact form, the two-loop recursion and dense updates agree.

If every stored pair has s'y >= mu2 |s|^2 and |y|^2 <= s'y / mu3 then, with c = 1 / (mu2 mu3) >= 1 and H_0 = gamma I,

    1 / (1 / gamma + p / mu3)  <=  lambda(H)  <=  c^p gamma + (c^p - 1) / (mu2 (c - 1))

whatever came before the last p pairs (PAPERS 1.4). The second condition is the extra test of
:class:`.TwoSidedCurvatureTest`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...preconditioners.factors.lbfgs import LBFGS
from ...preconditioners.linalg import bfgs_inverse_update_
from ...preconditioners.pairs.damping import DoubleDamping, NoDamping, PairDamping, PowellThenLM
from ...preconditioners.pairs.skipping import CurvatureTest, SkipRule, TwoSidedCurvatureTest
from ..theorem import Control, Evidence, Inequality, Setting, Theorem, agreement, worst
from .instances import NEWEST, Draws, distribution, each, eigenvalues, limited_memory

__all__ = ["THEOREMS", "limited_memory_bounds"]

_COUNT = 300
_ROUNDING = 1e-6


def limited_memory_bounds(memory: int, initial: float, mu2: float, mu3: float) -> tuple[float, float]:
    """(lowest, highest) eigenvalue of L-BFGS(p) with pairs s'y >= mu2 |s|^2, |y|^2 <= s'y / mu3.

    Args:
        memory: p >= 1.
        initial: gamma > 0.
        mu2: > 0.
        mu3: > 0, with mu2 mu3 <= 1 (else no pair passes both tests).
    """
    ratio = 1.0 / (mu2 * mu3)
    total = float(sum(ratio**power for power in range(memory)))
    return 1.0 / (1.0 / initial + memory / mu3), ratio**memory * initial + total / mu2


@dataclass(frozen=True)
class _Store:
    """A way to fill a store: the rule, the test, the pairs it is offered, and mu2, mu3."""

    pairs: PairDamping
    skip: SkipRule
    offered: Callable[[Draws, int, float, float], tuple[Tensor, Tensor]]
    mu2: float
    mu3: float


def _on_the_limit(draws: Draws, count: int, mu2: float, mu3: float) -> tuple[Tensor, Tensor]:
    """Adversarial pairs in the plane: s'y = mu2 |s|^2 and |y|^2 = s'y / mu3, in random directions."""
    step = draws.normal(_COUNT, count, 2)
    across = torch.stack([-step[..., 1], step[..., 0]], -1) * (1 - 2 * draws.choice(2, _COUNT, count, 1))
    inside = 1e-12  # both tests are met with equality up to rounding, from the inside
    along = mu2 * (1 + inside)
    sideways = max(along / mu3 * (1 - inside) - along**2, 0.0) ** 0.5
    return step, along * step + sideways * across


def _anything(draws: Draws, count: int, mu2: float, mu3: float) -> tuple[Tensor, Tensor]:
    """Random pairs of any sign and size, which the rule must damp and the test must sort out."""
    size = 4
    step = draws.normal(_COUNT, count, size) * draws.decades(-1, 1, _COUNT, count, 1)
    return step, draws.normal(_COUNT, count, size) * draws.decades(-1, 2, _COUNT, count, 1)


def _stores(two_sided: bool = True) -> dict[str, list[_Store]]:
    grid = [(0.5, 0.5), (0.1, 0.5), (0.9, 1.0)]

    def test(mu2: float, mu3: float) -> SkipRule:
        return TwoSidedCurvatureTest(mu3, mu2) if two_sided else CurvatureTest(mu2)

    return {
        "pairs on the limit": [_Store(NoDamping(), test(a, b), _on_the_limit, a, b) for a, b in grid],
        "double damping": [_Store(DoubleDamping(), test(0.0, b), _anything, a, b) for a, b in grid],
        "Powell-then-LM": [_Store(PowellThenLM(), test(0.0, b), _anything, a, b) for a, b in grid],
    }


def _uniform(setting: Setting, two_sided: bool = True) -> Evidence:
    """p = 1 ... 4, twice as many pairs as fit."""
    draws = Draws(setting, 400)
    high: dict[str, list[Tensor]] = {}
    low: dict[str, list[Tensor]] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, stores in _stores(two_sided).items():
        for store in stores:
            for memory in range(1, 5):
                steps, changes = store.offered(draws, 2 * memory, store.mu2, store.mu3)
                factor = LBFGS(memory, store.pairs, NEWEST, 1.0, store.skip)
                unit = torch.eye(steps.shape[-1], dtype=steps.dtype, device=steps.device)[0]
                dense, kept, moved = limited_memory(factor, steps, changes, store.mu2, unit)
                spectrum, bounds = eigenvalues(dense), limited_memory_bounds(memory, 1.0, store.mu2, store.mu3)
                low.setdefault(name, []).append(spectrum[:, 0] / bounds[0])
                high.setdefault(name, []).append(bounds[1] / spectrum[:, -1])
                pairs.append(_promises(kept, moved, store))
    ratios = {f"{name}, lower bound": torch.cat(values) for name, values in low.items()}
    ratios |= {f"{name}, upper bound": torch.cat(values) for name, values in high.items()}
    inequalities = tuple(worst(name, values, 1.0, ">=", _ROUNDING) for name, values in ratios.items())
    floors, tops = (torch.cat(values) for values in zip(*pairs, strict=True))
    inequalities += (
        worst("s'y / (mu2 |s|^2) of stored pairs", floors, 1.0, ">=", 1e-9),
        worst("s'y / (mu3 |y|^2) of stored pairs", tops, 1.0, ">=", 1e-9),
    )
    plot = distribution("Eigenvalues of L-BFGS(p), p = 1 ... 4", "distance to the bound (factor)", ratios)
    return Evidence(inequalities, (), {"stored pairs": float(len(floors))}, (plot,))


def _promises(steps: Tensor, changes: Tensor, store: _Store) -> tuple[Tensor, Tensor]:
    """Both conditions on every pair that is in a store, as quotients that must be at least 1."""
    curvature = (steps * changes).sum(-1)
    used = curvature != 0
    floor = curvature / (store.mu2 * steps.square().sum(-1))
    top = curvature / (store.mu3 * changes.square().sum(-1))
    return floor[used], top[used]


# -- T5 ----------------------------------------------------------------------------------------------------------------


def _two_loop(steps: Tensor, changes: Tensor, value: Tensor, gamma: float) -> Tensor:
    """H v by the two-loop recursion (Nocedal and Wright, algorithm 7.4), instances in front; oldest pair first."""
    rho = 1.0 / (steps * changes).sum(-1, keepdim=True)
    saved = []
    for index in reversed(range(steps.shape[1])):
        weight = rho[:, index] * (steps[:, index] * value).sum(-1, keepdim=True)
        value = value - weight * changes[:, index]
        saved.append(weight)
    value = gamma * value
    for index in range(steps.shape[1]):
        weight = rho[:, index] * (changes[:, index] * value).sum(-1, keepdim=True)
        value = value + (saved[steps.shape[1] - 1 - index] - weight) * steps[:, index]
    return value


def _dense(steps: Tensor, changes: Tensor, gamma: float) -> Tensor:
    """H by p dense updates of gamma I with the library's own update."""

    def one(steps: Tensor, changes: Tensor) -> Tensor:
        zero = 0.0 * steps.sum()
        inverse = gamma * torch.eye(steps.shape[-1], dtype=steps.dtype, device=steps.device) + zero
        for step, change in zip(steps, changes, strict=True):
            bfgs_inverse_update_(inverse, step, change, inverse @ change, zero == 0)
        return inverse

    result: Tensor = each(one, steps, changes)
    return result


def _forms(setting: Setting, newest: int = 0, backwards: bool = False) -> Evidence:
    """Pairs of positive curvature, up to 7 more than fit.

    Args:
        setting: seed and device.
        newest: pairs that the comparison forgets at the new end; 0: none, the claim.
        backwards: whether the comparison takes the pairs newest first; False: the claim.
    """
    draws = Draws(setting, 500)
    inequalities: list[Inequality] = []
    for memory, size, extra in ((2, 3, 1), (3, 6, 0), (3, 6, 7), (5, 12, 2), (8, 10, 5)):
        steps = draws.normal(64, memory + extra, size)
        curvature = draws.positive_definite(64, size, 2.0, 0.5)
        changes = steps @ curvature
        for gamma in (1.0, 0.1):
            factor = LBFGS(memory, NoDamping(), NEWEST, gamma, CurvatureTest(0.0))
            compact, _, _ = limited_memory(factor, steps, changes, 0.5)
            last = steps.shape[1] - newest
            order = list(range(max(0, last - memory), last))[:: -1 if backwards else 1]
            kept = (steps[:, order], changes[:, order])
            value = draws.normal(64, size)
            name = f"p = {memory}, {memory + extra} pairs, gamma = {gamma:g}"
            product = (compact @ value.unsqueeze(2)).squeeze(2)
            inequalities += [
                agreement(f"compact = two-loop, {name}", product, _two_loop(*kept, value, gamma), 1e-9),
                agreement(f"compact = p dense updates, {name}", compact, _dense(*kept, gamma), 1e-9),
            ]
    return Evidence(tuple(inequalities))


THEOREMS = (
    Theorem(
        "T4",
        "With double damping and the two-sided skip test the eigenvalues of L-BFGS(p) are bounded uniformly, for ever.",
        r"\frac{1}{1/\gamma + p/\mu_3} \leq \lambda(H) \leq c^p \gamma + \frac{1}{\mu_2} \frac{c^p - 1}{c - 1}, "
        r"\quad c = \frac{1}{\mu_2 \mu_3}",
        "docs/PAPERS.md 1.4 (proof, ours), after Wang, Ma, Goldfarb, Liu, SIAM J. Opt. 27 (2017)",
        _uniform,
        partial(_uniform, two_sided=False),
        "without the upper half of the skip test",
    ),
    Theorem(
        "T5",
        "The compact form of L-BFGS(p), the two-loop recursion and p dense updates give the same matrix, also after "
        "old pairs have been dropped.",
        r"H v = H_{two-loop} v = H_{dense} v",
        "Byrd, Nocedal, Schnabel, Math. Programming 63 (1994), theorem 2.2; docs/PAPERS.md 1.2",
        _forms,
        partial(_forms, newest=1),
        "the comparison forgets the newest pair instead of the oldest",
        (Control("the pairs are in the wrong order", partial(_forms, backwards=True)),),
    ),
)
