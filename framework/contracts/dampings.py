"""Contracts of additive damping."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

from ...curvature.declarations import DampingDeclarations, declared
from ...errors import ArgumentError
from ...preconditioners.damping.split import MeanEigenvalues
from .cases import Case
from .contract import contract, contracts_of, require, require_bound, undeclared

__all__ = ["CONTRACTS"]

_VALUES = (0.0, 1e-8, 0.01, 0.3, 1.0, 50.0)
_POSITIONS = (1, 4, 49)
_RANGE = "finite and more than 0 (0 only where lambda is 0)"


def _known(rule: Any) -> tuple[MeanEigenvalues | None, ...]:
    """What a rule may be told of a layer's factors."""
    uses = declared(rule, DampingDeclarations).uses_eigenvalues
    return (None, MeanEigenvalues(4.0, 0.01), MeanEigenvalues(0.0, 1.0)) if uses else (None,)


def _sides(rule: Any, value: float, positions: int, known: MeanEigenvalues | None) -> tuple[float, float, float]:
    found = rule.sides(value, positions, known)
    fits = all(hasattr(found, name) for name in ("whole", "inputs", "outputs"))
    require(fits, f"sides({value!r}, {positions}) returns {found!r}, but must return an osculate.SideDamping")
    return float(found.whole), float(found.inputs), float(found.outputs)


def _layers(rule: Any) -> list[tuple[int, MeanEigenvalues | None]]:
    return [(positions, known) for positions in _POSITIONS for known in _known(rule)]


@contract("damping-positive", "damping", "every damping is finite, and positive for lambda > 0")
def damping_positive(rule: Any, case: Case) -> None:
    """For all lambda, numbers of positions and mean eigenvalues; zero may stay zero."""
    for value in _VALUES:
        for positions, known in _layers(rule):
            for name, found in zip(("whole", "inputs", "outputs"), _sides(rule, value, positions, known), strict=True):
                fits = math.isfinite(found) and (found > 0.0 or (value == 0.0 and found == 0.0))
                require(
                    fits, f"damping ({name}) for lambda = {value:g}, S = {positions} is {found:g}, but must be {_RANGE}"
                )


@contract("damping-monotone", "damping", "a larger lambda damps no matrix less")
def damping_monotone(rule: Any, case: Case) -> None:
    """From 0 to 50."""
    for positions, known in _layers(rule):
        table = [_sides(rule, value, positions, known) for value in _VALUES]
        for value, lower, higher in zip(_VALUES[1:], table, table[1:], strict=False):
            for less, more in zip(lower, higher, strict=True):
                require_bound(f"damping at lambda = {value:g}", more, "at least", less)


@contract(
    "damping-product",
    "damping",
    "the dampings of the two sides multiply to that of the whole matrix",
    unless=undeclared(DampingDeclarations, "splits"),
)
def damping_product(rule: Any, case: Case) -> None:
    """inputs * outputs = whole."""
    for value in _VALUES:
        for positions, known in _layers(rule):
            whole, inputs, outputs = _sides(rule, value, positions, known)
            what = f"product of sides at S = {positions}"
            require_bound(what, inputs * outputs, "exactly", whole, slack=1e-12 * whole)


@contract("damping-range", "damping", "a lambda that is negative, infinite or no number is refused")
def damping_range(rule: Any, case: Case) -> None:
    """With an ``ArgumentError``."""
    for value in (-1.0, math.inf, math.nan):
        try:
            rule.sides(value, 1)
        except ArgumentError:
            continue
        require(False, f"lambda = {value} was accepted")


@contract("damping-purity", "damping", "the same question has the same answer, however often it is asked")
def damping_purity(rule: Any, case: Case) -> None:
    """Every lambda twice, the second time in the opposite order; bitwise."""
    questions = [(value, *layer) for value in _VALUES for layer in _layers(rule)]
    first = [_sides(rule, *question) for question in questions]
    for question, found in reversed(list(zip(questions, first, strict=True))):
        again = _sides(rule, *question)
        what = f"the dampings for lambda = {question[0]:g}, S = {question[1]} are {again}, when first asked {found}"
        require(again == found, f"{what}; a rule keeps no memory of its own")


_VERBS = ("minimum", "maximum", "curvature", "needs", "due")


@contract(
    "damping-adapted",
    "damping",
    "an adapted lambda is finite, positive and inside the rule's own minimum and maximum",
    unless=lambda rule: None if hasattr(rule, "adapted") else "adapts no lambda",
)
def damping_adapted(rule: Any, case: Case) -> None:
    """For all lambda, and reductions that are large, small, zero, negative, infinite and no number."""
    missing = [name for name in _VERBS if not hasattr(rule, name)]
    require(not missing, f"it has adapted, but lacks {', '.join(missing)}, so that its lambda is never adapted")
    low, high = float(rule.minimum), float(rule.maximum)
    require(0.0 < low <= high < math.inf, f"the bounds are [{low:g}, {high:g}], but must be finite and more than 0")
    reductions = (-math.inf, -1e12, -1.0, 0.0, 1e-12, 0.3, 1.0, 1e12, math.inf, math.nan)
    for value in (*_VALUES, low, math.sqrt(low) * math.sqrt(high), high):
        for actual, predicted in product(reductions, reductions):
            found = rule.adapted(value, actual, predicted)
            what = f"lambda = {value:g} becomes {found!r} where the loss fell by {actual:g}, predicted {predicted:g}"
            fits = isinstance(found, float | int) and low <= found <= high
            require(fits, f"{what}; it must be a number in [{low:g}, {high:g}]")
            again = rule.adapted(value, actual, predicted)
            require(again == found, f"{what}, and {again!r} when asked again")


CONTRACTS = contracts_of(globals())
