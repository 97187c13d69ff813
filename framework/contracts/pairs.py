"""Contracts of rules that damp secant pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import PairDampingDeclarations
from ...errors import ArgumentError
from ...preconditioners.pairs.damping import DampedPair
from .cases import Case
from .contract import (
    ContractViolation,
    contract,
    contracts_of,
    require,
    require_bound,
    require_close,
    require_equal,
    require_finite,
    require_unchanged,
    undeclared,
)

__all__ = ["CONTRACTS", "SecantPair", "pairs_for"]

_KIND = "pair damping"
_SIZE = 4
_DAMPINGS = (0.05, 0.5, 2.0)


@dataclass(frozen=True)
class SecantPair:
    """A secant pair and the inverse approximation it is about to update.

    Attributes:
        step: (d,) s.
        change: (d,) y.
        inverse: (d, d) H.
        damping: mu2 > 0.
    """

    step: Tensor
    change: Tensor
    inverse: Tensor
    damping: float

    def damped(self, rule: Any) -> DampedPair:
        """The pair after a rule, which is given copies."""
        pair: DampedPair = rule.damp(self.step.clone(), self.change.clone(), self.inverse @ self.change, self.damping)
        return pair


def pairs_for(rule: Any, case: Case, *, degenerate: bool = False) -> Iterator[SecantPair]:
    """Pairs of every kind a rule can meet, with the dampings that it accepts.

    Args:
        rule: asked through ``validate`` which dampings it takes.
        case: seed, precision and device.
        degenerate: zero, parallel and orthogonal pairs instead of those of positive, tiny and negative curvature.
    """
    inverse = case.spd(_SIZE, key=3)
    step, noise = case.randn(_SIZE, key=4), case.randn(_SIZE, key=5)
    curved = torch.linalg.solve_triangular(torch.linalg.cholesky(inverse), step.unsqueeze(1), upper=False)[:, 0]
    across = noise - (noise @ step) / (step @ step) * step  # no curvature at all: rules may jump here
    pairs = [(step, curved), (step, noise), (step, -noise), (step, -curved), (step, 1e-3 * curved)]
    pairs += [(1e-3 * step, curved), (step, step), (inverse @ curved, curved), (step, across - 0.1 * step)]
    if degenerate:
        zero = torch.zeros_like(step)
        pairs = [
            (zero, curved),
            (step, zero),
            (zero, zero),
            (inverse @ curved, curved),
            (step, 1e-200 * curved),
            (step, across),
        ]
    for damping in _DAMPINGS:
        try:
            rule.validate(damping)
        except ArgumentError:
            continue
        for one, other in pairs:
            yield SecantPair(one, other, inverse, damping)


@contract("pair-purity", _KIND, "damping a pair leaves s, y and Hy bitwise as they were")
def pair_purity(rule: Any, case: Case) -> None:
    """Every pair, and twice the same result."""
    for pair in pairs_for(rule, case):
        s, y, product = pair.step.clone(), pair.change.clone(), pair.inverse @ pair.change
        with require_unchanged("s", s), require_unchanged("y", y), require_unchanged("Hy", product):
            rule.damp(s, y, product, pair.damping)


@contract(
    "pair-positive",
    _KIND,
    "the curvature of a damped pair is positive: s'y > 0",
    unless=undeclared(PairDampingDeclarations, "keeps_positive"),
)
def pair_positive(rule: Any, case: Case) -> None:
    """Whatever the pair's own curvature was."""
    for pair in pairs_for(rule, case):
        damped = pair.damped(rule)
        require_bound("s'y of a damped pair", torch.dot(damped.step, damped.change), "more than", 0.0)


@contract(
    "pair-floor",
    _KIND,
    "a damped pair keeps the stated floor: s'y >= curvature_floor(mu2) s's",
    unless=undeclared(PairDampingDeclarations, "curvature_floor"),
)
def pair_floor(rule: Any, case: Case) -> None:
    """To rounding."""
    for pair in pairs_for(rule, case):
        damped, floor = pair.damped(rule), rule.curvature_floor(pair.damping)
        curvature, square = (float(torch.dot(damped.step, other)) for other in (damped.change, damped.step))
        what, least = f"s'y of a damped pair (mu2 = {pair.damping:g})", floor * square
        require_bound(what, curvature, "at least", least, slack=1e-9 * abs(least))


@contract(
    "pair-bounds",
    _KIND,
    "a damped pair keeps the stated bounds: s'y >= c s's, y'Hy <= a s'y, y'y <= g s'y",
    unless=undeclared(PairDampingDeclarations, "bounds"),
)
def pair_bounds(rule: Any, case: Case) -> None:
    """Those of the three that it states; to rounding."""
    for pair in pairs_for(rule, case):
        damped, spectrum = pair.damped(rule), torch.linalg.eigvalsh(pair.inverse)
        s, y, stated = damped.step, damped.change, rule.bounds(pair.damping, spectrum[0], spectrum[-1])
        for name, factor, found in (
            ("s's", None if stated.floor is None else 1.0 / stated.floor, s @ s),
            ("y'Hy", stated.weighted, y @ pair.inverse @ y),
            ("y'y", stated.growth, y @ y),
        ):
            if factor is not None:
                most = float(factor * (s @ y))
                what = f"{name} of a damped pair (mu2 = {pair.damping:g})"
                require_bound(what, found, "at most", most, slack=1e-9 * most)


@contract("pair-scale", _KIND, "a pair c times as long is damped to a pair c times as long")
def pair_scale(rule: Any, case: Case) -> None:
    """c = 2^10, so that scaling itself does not round."""
    for pair in pairs_for(rule, case):
        longer = SecantPair(1024.0 * pair.step, 1024.0 * pair.change, pair.inverse, pair.damping)
        one, two = pair.damped(rule), longer.damped(rule)
        require_close("s of a longer pair", two.step, 1024.0 * one.step)
        require_close("y of a longer pair", two.change, 1024.0 * one.change)


@contract("pair-rotation", _KIND, "damping does not depend on the coordinates")
def pair_rotation(rule: Any, case: Case) -> None:
    """s, y and H in an orthogonally changed basis give the damped pair in that basis."""
    basis = torch.linalg.qr(case.randn(_SIZE, _SIZE, key=6))[0]
    for pair in pairs_for(rule, case):
        turned = SecantPair(basis @ pair.step, basis @ pair.change, basis @ pair.inverse @ basis.T, pair.damping)
        one, two = pair.damped(rule), turned.damped(rule)
        require_close("s in other coordinates", two.step, basis @ one.step, tolerance=1e-7)
        require_close("y in other coordinates", two.change, basis @ one.change, tolerance=1e-7)


@contract("pair-flags", _KIND, "a pair that no stage reports as changed is the given pair")
def pair_flags(rule: Any, case: Case) -> None:
    """``first`` and ``second`` are 0-dimensional bools and tell the truth."""
    for pair in pairs_for(rule, case):
        damped = pair.damped(rule)
        for name, flag in (("first", damped.first), ("second", damped.second)):
            fits = flag.dtype == torch.bool and flag.ndim == 0
            require(fits, f"{name} is {flag.dtype} of shape {tuple(flag.shape)}, not a 0-dimensional bool")
        if not bool(damped.first) and not bool(damped.second):
            require_close("s of a pair reported as unchanged", damped.step, pair.step, tolerance=1e-12)
            require_close("y of a pair reported as unchanged", damped.change, pair.change, tolerance=1e-12)


@contract("pair-degenerate", _KIND, "zero and parallel pairs give finite pairs")
def pair_degenerate(rule: Any, case: Case) -> None:
    """s = 0, y = 0, both, s = Hy, s'y = 0, and a y so small that its square underflows."""
    for pair in pairs_for(rule, case, degenerate=True):
        damped = pair.damped(rule)
        require_finite("a damped degenerate pair", damped.step, damped.change)


@contract("pair-dtype", _KIND, "a damped pair has the precision and device of the pair")
def pair_dtype(rule: Any, case: Case) -> None:
    """float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        for pair in pairs_for(rule, case.to(dtype=dtype)):
            damped = pair.damped(rule)
            for value in (damped.step, damped.change):
                fits = value.dtype == dtype and value.device == pair.step.device
                require(fits, f"a pair in {dtype} became {value.dtype} on {value.device}")


@contract(
    "pair-mapped",
    _KIND,
    "a rule takes many pairs at once, with batch axes in front, and damps each as if it were alone",
)
def pair_mapped(rule: Any, case: Case) -> None:
    """Together as one by one; a rule that looks at the values of tensors in Python cannot be batched."""
    for damping in _DAMPINGS:
        pairs = [pair for pair in pairs_for(rule, case) if pair.damping == damping]
        if not pairs:
            continue
        steps = torch.stack([pair.step for pair in pairs])
        changes = torch.stack([pair.change for pair in pairs])
        products = torch.stack([pair.inverse @ pair.change for pair in pairs])

        try:
            mapped: DampedPair = rule.damp(steps, changes, products, damping)
        except Exception as error:  # whatever it is, training would meet it in training
            raise ContractViolation(f"damping stacked pairs raises {type(error).__name__}: {error}") from error
        for index, pair in enumerate(pairs):
            alone = pair.damped(rule)
            require_close("s of a mapped pair", mapped.step[index], alone.step)
            require_close("y of a mapped pair", mapped.change[index], alone.change)
            require_equal(
                "flags of a stacked pair",
                torch.stack([mapped.first[index], mapped.second[index]]),
                torch.stack([alone.first, alone.second]),
            )


CONTRACTS = contracts_of(globals())
