"""Contracts of momentum, weight decay and averages: rules on a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.declarations import AverageDeclarations, MomentumDeclarations, declared
from ...curvature.layers.discovery import discover_layers
from ...errors import ArgumentError
from ...preconditioners.structures.identity import Identity
from ..optimizer.blocks import Block, make_blocks
from ..optimizer.team import Team
from .cases import Case
from .contract import contract, contracts_of, require, require_bound, require_close, undeclared

__all__ = ["CONTRACTS"]


def _block(case: Case) -> Block:
    """A block of one small layer under the identity, to let momentum run on."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(3, 2).to(case.device, case.dtype)
    (block,) = make_blocks(discover_layers(model), Identity(), Identity(), strict=False)
    return block


def _gradients(block: Block, case: Case, key: int) -> tuple[Tensor, ...]:
    return tuple(case.randn(*p.shape, key=100 * key + index) for index, p in enumerate(block.parameters))


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def _directions(rule: Any, case: Case, sequence: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """What is preconditioned after each gradient, as vectors."""
    team, found = Team([_block(case)]), []
    for gradients in sequence:
        team.accumulate(rule, list(gradients), None)
        found.append(_flat(team.directions(rule)[0]).clone())
    return found


@contract(
    "momentum-closed-form",
    "momentum",
    "M = add * sum of keep^(t-k) g_k, and what is followed is correction (a M + b g)",
)
def momentum_closed_form(rule: Any, case: Case) -> None:
    """With the coefficients, blend and corrections that it states; the same ones at every step."""
    block, (keep, add), (a, b) = _block(case), rule.coefficients(), rule.blend()
    team, sequence = Team([block]), [_gradients(block, case, key) for key in range(6)]
    for step, gradients in enumerate(sequence):
        team.accumulate(rule, list(gradients), None)
        terms = [add * keep ** (step - index) * _flat(entry) for index, entry in enumerate(sequence[: step + 1])]
        momentum = torch.stack(terms).sum(0)
        require_close("momentum", _flat(block.views), momentum)
        followed = rule.correction(step + 1) * (a * momentum + b * _flat(gradients))
        require_close("the vector that is preconditioned", _flat(team.directions(rule)[0]), followed)


@contract("momentum-stable", "momentum", "0 <= keep < 1, add > 0, and corrections are finite and positive")
def momentum_stable(rule: Any, case: Case) -> None:
    """For up to 1000 steps."""
    keep, add = rule.coefficients()
    require(0.0 <= keep < 1.0, f"keep is {keep:g}, but must be in [0, 1)")
    require(0.0 < add < math.inf, f"add is {add:g}, but must be finite and more than 0")
    for updates in (1, 2, 10, 1000):
        factor = rule.correction(updates)
        fits = 0.0 < factor < math.inf
        require(fits, f"the correction after {updates} steps is {factor:g}, but must be finite and more than 0")


@contract(
    "momentum-unbiased",
    "momentum",
    "for a constant gradient the corrected momentum is that gradient at every step",
    unless=undeclared(MomentumDeclarations, "unbiased"),
)
def momentum_unbiased(rule: Any, case: Case) -> None:
    """Five steps."""
    constant = _gradients(_block(case), case, 0)
    for found in _directions(rule, case, [constant] * 5):
        require_close("momentum of a constant gradient", found, _flat(constant))


@contract("decay-zero", "weight decay", "a decay of zero does nothing")
def decay_zero(rule: Any, case: Case) -> None:
    """Neither in the gradient nor before the step."""
    found = float(rule.gradient_factor(0.0)), float(rule.shrinkage(0.0, 0.1))
    require(found == (0.0, 0.0), f"gradient factor and shrinkage at zero are {found}")


@contract("decay-once", "weight decay", "a decay acts in the gradient or before the step, not in both")
def decay_once(rule: Any, case: Case) -> None:
    """Exactly one of the two is positive."""
    found = float(rule.gradient_factor(0.1)), float(rule.shrinkage(0.1, 0.1))
    require(min(found) == 0.0 < max(found), f"gradient factor and shrinkage for a decay of 0.1 are {found}")


@contract("decay-linear", "weight decay", "twice the decay decays twice as much")
def decay_linear(rule: Any, case: Case) -> None:
    """In both places."""
    for one, two in (
        (rule.gradient_factor(0.1), rule.gradient_factor(0.2)),
        (rule.shrinkage(0.1, 0.5), rule.shrinkage(0.2, 0.5)),
    ):
        require_bound("what twice the decay does", two, "exactly", 2.0 * one, slack=1e-12)


@contract("decay-range", "weight decay", "a decay that is negative, infinite or no number is refused")
def decay_range(rule: Any, case: Case) -> None:
    """With an ``ArgumentError``, by ``gradient_factor``, which every step asks first."""
    for value in (-1.0, math.inf, math.nan):
        try:
            rule.gradient_factor(value)
        except ArgumentError:
            continue
        require(False, f"a weight decay of {value} was accepted")


@contract("decay-purity", "weight decay", "the same question has the same answer, however often it is asked")
def decay_purity(rule: Any, case: Case) -> None:
    """Three decays, each asked three times in a row; bitwise."""
    for value in (0.0, 0.1, 2.0):
        asked = [(rule.gradient_factor(value), rule.shrinkage(value, 0.5)) for _ in range(3)]
        what = f"gradient factor and shrinkage for a decay of {value:g}, asked three times, are {asked}"
        require(asked[0] == asked[1] == asked[2], what)


def _averages(rule: Any, values: list[float]) -> list[tuple[float, float]]:
    """(average, weight) after each value."""
    average, weight, found = 0.0, 0.0, []
    for value in values:
        keep, add, weight = rule.coefficients(weight)
        average = keep * average + add * value
        found.append((average, weight))
    return found


@contract("average-coefficients", "average", "coefficients and weights are finite and not negative, and news counts")
def average_coefficients(rule: Any, case: Case) -> None:
    """keep >= 0, add > 0, weight > 0 over 200 values."""
    weight = 0.0
    for step in range(200):
        keep, add, weight = rule.coefficients(weight)
        fits = all(math.isfinite(value) for value in (keep, add, weight)) and keep >= 0.0 and add > 0.0 and weight > 0.0
        require(fits, f"coefficients after {step} values are {(keep, add)} with weight {weight}")


@contract(
    "average-weights",
    "average",
    "the coefficients of the old average and the new value sum to one",
    unless=lambda rule: None if declared(rule, AverageDeclarations).normalised else "declares normalised = False",
)
def average_weights(rule: Any, case: Case) -> None:
    """Over 50 values."""
    weight = 0.0
    for _ in range(50):
        keep, add, weight = rule.coefficients(weight)
        require_bound("keep + add", keep + add, "exactly", 1.0, slack=1e-12)


@contract(
    "average-unbiased",
    "average",
    "the average of a constant is that constant, from the first value on",
    unless=lambda rule: None if declared(rule, AverageDeclarations).unbiased else "declares unbiased = False",
)
def average_unbiased(rule: Any, case: Case) -> None:
    """Over 20 values."""
    for average, _ in _averages(rule, [3.0] * 20):
        require_bound("average of the constant 3", average, "exactly", 3.0, slack=1e-12 * 3.0)


@contract("average-purity", "average", "the same question has the same answer, however often it is asked")
def average_purity(rule: Any, case: Case) -> None:
    """Four weights, each asked three times in a row; bitwise. What was gathered is in the weight, and nowhere else."""
    for weight in (0.0, 0.1, 0.5, 1.0):
        asked = [rule.coefficients(weight) for _ in range(3)]
        what = f"coefficients for a weight of {weight:g}, asked three times, are {asked}"
        require(asked[0] == asked[1] == asked[2], what)


CONTRACTS = contracts_of(globals())
