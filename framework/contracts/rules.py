"""Contracts of additive damping, momentum, weight decay, averages and guards: rules on a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.layers import discover_layers
from ...errors import ArgumentError
from ...preconditioners.damping import MeanEigenvalues
from ...preconditioners.identity import Identity
from ...stepsize.guard import Trial
from ..blocks import Block, make_blocks
from .cases import Case
from .contract import Contract, contract, require, require_close

__all__ = ["CONTRACTS"]

_VALUES = (0.0, 1e-8, 0.01, 0.3, 1.0, 50.0)
_POSITIONS = (1, 4, 49)


def _known(rule: Any) -> tuple[MeanEigenvalues | None, ...]:
    """What a rule may be told of a layer's factors."""
    uses = getattr(rule, "uses_eigenvalues", False)
    return (None, MeanEigenvalues(4.0, 0.01), MeanEigenvalues(0.0, 1.0)) if uses else (None,)


def _sides(rule: Any, value: float, positions: int, known: MeanEigenvalues | None) -> tuple[float, float, float]:
    found = rule.sides(value, positions, known)
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
                require(fits, f"{name} for lambda = {value:g}, S = {positions}", value=found, bound=0.0)


@contract("damping-monotone", "damping", "a larger lambda damps no matrix less")
def damping_monotone(rule: Any, case: Case) -> None:
    """From 0 to 50."""
    for positions, known in _layers(rule):
        table = [_sides(rule, value, positions, known) for value in _VALUES]
        for value, lower, higher in zip(_VALUES[1:], table, table[1:], strict=False):
            for less, more in zip(lower, higher, strict=True):
                require(more >= less, f"damping at lambda = {value:g}", value=more, bound=less)


@contract(
    "damping-product",
    "damping",
    "the dampings of the two sides multiply to that of the whole matrix",
    unless=lambda rule: None if getattr(rule, "splits", False) else "does not declare splits",
)
def damping_product(rule: Any, case: Case) -> None:
    """inputs * outputs = whole."""
    for value in _VALUES:
        for positions, known in _layers(rule):
            whole, inputs, outputs = _sides(rule, value, positions, known)
            error = abs(inputs * outputs - whole)
            require(error <= 1e-12 * whole, f"product of sides at S = {positions}", value=inputs * outputs, bound=whole)


@contract("damping-range", "damping", "a lambda that is negative, infinite or no number is refused")
def damping_range(rule: Any, case: Case) -> None:
    """With an ``ArgumentError``."""
    for value in (-1.0, math.inf, math.nan):
        try:
            rule.sides(value, 1)
        except ArgumentError:
            continue
        require(False, f"lambda = {value} was accepted")


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
    block, found = _block(case), []
    for gradients in sequence:
        block.accumulate(rule, gradients, [0.0] * len(gradients))
        found.append(_flat(block.direction(rule)).clone())
    return found


@contract(
    "momentum-closed-form",
    "momentum",
    "M = add * sum of keep^(t-k) g_k, and what is followed is correction (a M + b g)",
)
def momentum_closed_form(rule: Any, case: Case) -> None:
    """With the coefficients, blend and corrections that it states; the same ones at every step."""
    block, (keep, add), (a, b) = _block(case), rule.coefficients(), rule.blend()
    sequence = [_gradients(block, case, key) for key in range(6)]
    for step, gradients in enumerate(sequence):
        block.accumulate(rule, gradients, [0.0] * len(gradients))
        terms = [add * keep ** (step - index) * _flat(entry) for index, entry in enumerate(sequence[: step + 1])]
        momentum = torch.stack(terms).sum(0)
        require_close("momentum", _flat(block.views), momentum)
        followed = rule.correction(step + 1) * (a * momentum + b * _flat(gradients))
        require_close("the vector that is preconditioned", _flat(block.direction(rule)), followed)


@contract("momentum-stable", "momentum", "0 <= keep < 1, add > 0, and corrections are finite and positive")
def momentum_stable(rule: Any, case: Case) -> None:
    """For up to 1000 steps."""
    keep, add = rule.coefficients()
    require(0.0 <= keep < 1.0, "keep is not in [0, 1)", value=keep, bound=1.0)
    require(0.0 < add < math.inf, "add is not a finite number > 0", value=add, bound=0.0)
    for updates in (1, 2, 10, 1000):
        factor = rule.correction(updates)
        require(0.0 < factor < math.inf, f"correction after {updates} steps", value=factor, bound=0.0)


@contract(
    "momentum-unbiased",
    "momentum",
    "for a constant gradient the corrected momentum is that gradient at every step",
    unless=lambda rule: None if getattr(rule, "unbiased", False) else "does not declare unbiased",
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
        require(abs(2.0 * one - two) <= 1e-12, "twice the decay", value=float(two), bound=2.0 * float(one))


@contract("decay-range", "weight decay", "a decay that is negative, infinite or no number is refused")
def decay_range(rule: Any, case: Case) -> None:
    """With an ``ArgumentError``, by ``gradient_factor``, which every step asks first."""
    for value in (-1.0, math.inf, math.nan):
        try:
            rule.gradient_factor(value)
        except ArgumentError:
            continue
        require(False, f"a weight decay of {value} was accepted")


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
    unless=lambda rule: None if getattr(rule, "normalised", True) else "declares normalised = False",
)
def average_weights(rule: Any, case: Case) -> None:
    """Over 50 values."""
    weight = 0.0
    for _ in range(50):
        keep, add, weight = rule.coefficients(weight)
        require(abs(keep + add - 1.0) <= 1e-12, "keep + add", value=keep + add, bound=1.0)


@contract(
    "average-unbiased",
    "average",
    "the average of a constant is that constant, from the first value on",
    unless=lambda rule: None if getattr(rule, "unbiased", True) else "declares unbiased = False",
)
def average_unbiased(rule: Any, case: Case) -> None:
    """Over 20 values."""
    for average, _ in _averages(rule, [3.0] * 20):
        require(abs(average - 3.0) <= 1e-12 * 3.0, "average of the constant 3", value=average, bound=3.0)


@contract("guard-numbers", "guard", "attempts is an integer >= 0, and a step that is tried again is shorter")
def guard_numbers(rule: Any, case: Case) -> None:
    """0 < shrink < 1 where there are attempts."""
    attempts = rule.attempts
    require(isinstance(attempts, int) and attempts >= 0, f"attempts is {attempts!r}")
    require(attempts == 0 or 0.0 < rule.shrink < 1.0, "shrink is not in (0, 1)", value=float(rule.shrink), bound=1.0)


def _passive(rule: Any) -> str | None:
    return None if rule.attempts else "attempts = 0: every step stays"


def _accepts(rule: Any, before: float, after: float) -> bool:
    """The verdict of a guard that has seen nothing yet on a whole step that promised a decrease of 0.5."""
    return bool(rule.accepts(rule.init(), Trial(before, after, slope=-0.5)))


@contract("guard-nonfinite", "guard", "a loss that is not finite is refused", unless=_passive)
def guard_nonfinite(rule: Any, case: Case) -> None:
    """Infinity and NaN."""
    for after in (math.inf, math.nan):
        require(not _accepts(rule, 1.0, after), f"a loss of {after} after the step was accepted")


@contract("guard-descent", "guard", "a step that lowers the loss enough stays")
def guard_descent(rule: Any, case: Case) -> None:
    """From 1 to 0.01, and from -1 to -2."""
    for before, after in ((1.0, 0.01), (-1.0, -2.0)):
        require(_accepts(rule, before, after), f"a step from loss {before:g} to {after:g} was refused")


@contract("guard-monotone", "guard", "if a loss is accepted, so is every lower one")
def guard_monotone(rule: Any, case: Case) -> None:
    """On a grid around the loss before the step."""
    accepted = [_accepts(rule, 1.0, 0.05 * index) for index in range(80)]
    require(accepted == sorted(accepted, reverse=True), "a higher loss was accepted where a lower one was refused")


CONTRACTS: tuple[Contract, ...] = (
    damping_positive,
    damping_monotone,
    damping_product,
    damping_range,
    momentum_closed_form,
    momentum_stable,
    momentum_unbiased,
    decay_zero,
    decay_once,
    decay_linear,
    decay_range,
    average_coefficients,
    average_weights,
    average_unbiased,
    guard_numbers,
    guard_nonfinite,
    guard_descent,
    guard_monotone,
)
