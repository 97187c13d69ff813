"""T2: what damping does to a secant pair, and the constants that every bound on BFGS updates is made of (PAPERS 1.4).

A rule that damps (s, y) against H, with M and mu the largest and smallest eigenvalue of H, promises

    s'y >= c |s|^2,    y'Hy <= a s'y,    |y|^2 <= g s'y.

The three numbers are the rule's own ``bounds``; the bounds of T3 hold for every rule that states all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...curvature.declarations import PairDampingDeclarations, declared
from ...errors import ArgumentError
from ...preconditioners.pairs.damping import (
    DoubleDamping,
    MergedDoubleDamping,
    NoDamping,
    PairBounds,
    PairDamping,
    PowellThenLM,
)
from ..theorem import Control, Evidence, Setting, Theorem, worst
from .instances import Draws, distribution, each, eigenvalues

__all__ = ["MU1", "MU2", "THEOREMS", "Guarantee", "PairInstances", "guarantee"]

MU1 = (0.05, 0.2, 0.5)
MU2 = (0.01, 0.1, 0.5, 0.9)
_SIZES = (2, 3, 4, 5)
_COUNT = 400


@dataclass(frozen=True)
class PairInstances:
    """Random inverse approximations with pairs to update them by.

    Attributes:
        inverse: (n, d, d) H.
        low: (n,) smallest eigenvalue of H.
        high: (n,) largest.
        step: (n, d) s.
        change: (n, d) y: anything, and along the extreme eigenvectors, where bounds are attained.
    """

    inverse: Tensor
    low: Tensor
    high: Tensor
    step: Tensor
    change: Tensor

    @classmethod
    def draw(cls, draws: Draws, count: int, size: int, decades: float = 6.0) -> PairInstances:
        """``count`` instances of order ``size``, condition up to 10^decades."""
        inverse = draws.positive_definite(count, size, decades)
        values, vectors = torch.linalg.eigh(inverse)
        kind = draws.choice(4, count, 1)
        change = draws.normal(count, size)
        change = torch.where(kind == 1, vectors[..., 0], torch.where(kind == 2, vectors[..., -1], change))
        change = change * draws.decades(-2, 2, count, 1)
        step = draws.normal(count, size) * draws.decades(-2, 2, count, 1)
        along = (inverse @ change.unsqueeze(2)).squeeze(2) * draws.uniform(-1.0, 2.0, count, 1)
        return cls(inverse, values[:, 0], values[:, -1], torch.where(kind == 3, along, step), change)

    @property
    def product(self) -> Tensor:
        """(n, d) H y."""
        return (self.inverse @ self.change.unsqueeze(2)).squeeze(2)


@dataclass(frozen=True)
class Guarantee:
    """What a rule promises of a damped pair, (n,) each: c, a and g of the module's docstring."""

    floor: Tensor
    weighted: Tensor
    growth: Tensor


def guarantee(rule: PairDamping, damping: float, low: Tensor, high: Tensor) -> Guarantee:
    """The constants of a rule for H with extreme eigenvalues ``low`` and ``high``.

    No damping promises nothing, and is held to the promise of double damping: the negative control.

    Raises:
        ArgumentError: for a rule without all three.
    """
    judged = DoubleDamping() if rule == NoDamping() else rule
    promise = declared(judged, PairDampingDeclarations).bounds
    found = PairBounds() if promise is None else promise(damping, low, high)
    if found.floor is None or found.weighted is None or found.growth is None:
        raise ArgumentError(
            f"{type(rule).__name__} bounds a pair on one side only; use double damping or Powell-then-LM"
        )
    return Guarantee(found.floor, found.weighted, found.growth)


def ratios(rule: PairDamping, mu1: float | None, damping: float, given: PairInstances) -> dict[str, Tensor]:
    """Each promise as a quotient that must be at least 1, (n,) each."""

    def damp(step: Tensor, change: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        pair = rule.damp(step, change, product, damping)
        return pair.step, pair.change

    step, change = each(damp, given.step, given.change, given.product)
    promise = guarantee(rule, damping, given.low, given.high)
    curvature = (step * change).sum(1)
    weighted = torch.einsum("ni,nij,nj->n", change, given.inverse, change)
    found = {
        "D2: s'y / (c |s|^2)": curvature / (promise.floor * step.square().sum(1)),
        "D3: a s'y / y'Hy": promise.weighted * curvature / weighted,
        "D4: g s'y / |y|^2": promise.growth * curvature / change.square().sum(1),
    }
    if mu1 is not None:  # D1 speaks of the first stage: damped s, undamped y
        undamped = torch.einsum("ni,ni->n", given.change, given.product)
        found["D1: s'y / (mu1 y'Hy), first stage"] = (step * given.change).sum(1) / (mu1 * undamped)
    return found


def _grid(name: str) -> Iterator[tuple[str, PairDamping, float | None, float]]:
    """(label, rule, mu1 if it has Powell's first stage, mu2)."""
    for mu1 in MU1:
        for mu2 in MU2:
            if name == "double damping":
                yield name, DoubleDamping(mu1), mu1, mu2
            elif name == "Powell-then-LM":
                yield name, PowellThenLM(mu1), mu1, mu2
            elif name == "mu2 = 1.5":
                yield name, DoubleDamping(mu1), mu1, 1.5
            else:
                yield name, NoDamping(), 0.2, mu2
        if name == "double damping":
            yield "merged double damping", MergedDoubleDamping(mu1), None, 0.0


def _check(setting: Setting, names: tuple[str, ...] = ("double damping", "Powell-then-LM")) -> Evidence:
    """All rules on the same instances."""
    draws = Draws(setting, 200)
    instances = [PairInstances.draw(draws, _COUNT, size) for size in _SIZES]
    found: dict[str, list[Tensor]] = {}
    for name in names:
        for label, rule, mu1, mu2 in _grid(name):
            for given in instances:
                for promise, values in ratios(rule, mu1, mu2, given).items():
                    found.setdefault(f"{label}, {promise}", []).append(values)
    joined = {name: torch.cat(values) for name, values in found.items()}
    inequalities = tuple(worst(name, values, 1.0, ">=", 1e-8) for name, values in joined.items())
    condition = max(float((given.high / given.low).max()) for given in instances)
    smallest = torch.cat([eigenvalues(given.inverse)[:, 0] for given in instances])
    shown = {name: values for name, values in joined.items() if names[0] in name}
    return Evidence(
        inequalities,
        (worst("lambda_min(H) > 0", smallest, 0.0, ">="),),
        {"largest condition number of H": condition, "instances per inequality": float(len(smallest) * 12)},
        (distribution("Secant pairs after damping", "promise / worst case allowed", shown),),
    )


THEOREMS = (
    Theorem(
        "T2",
        "A damped secant pair has curvature bounded below, and y bounded in both norms by that curvature.",
        r"\tilde s^T y \geq \mu_1 y^T H y, \quad \tilde s^T \tilde y \geq \mu_2 \Vert\tilde s\Vert^2, \quad "
        r"\tilde y^T H \tilde y \leq a^* \tilde s^T \tilde y, \quad "
        r"\Vert\tilde y\Vert^2 \leq \max(1, 1 / (\mu_1 \mu)) \tilde s^T \tilde y",
        "arXiv:2006.08877 (rule), docs/PAPERS.md 1.4 D1-D4, LM and merged analogues (proofs, ours)",
        _check,
        partial(_check, names=("no damping",)),
        "pairs are not damped",
        (Control("mu2 = 1.5, where the second stage no longer interpolates", partial(_check, names=("mu2 = 1.5",))),),
    ),
)
