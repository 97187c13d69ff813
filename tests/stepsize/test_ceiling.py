"""A ceiling for the loss: rises do not add up, descents stay, and noise between mini-batches is no rise."""

import math
from itertools import pairwise
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from osculate import ArgumentError
from osculate.stepsize import Backtrack, Ceiling, Trial
from osculate.stepsize.ceiling import LowestMean
from small_nets import build, closure_of, data, make

losses = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30)


def seen(rule: Ceiling, before: list[float]) -> LowestMean:
    state = rule.init()
    for value in before:
        rule.record(state, Trial(value, value))
    return state


@given(losses, st.floats(0.0, 0.99))
def test_the_level_is_the_lowest_of_the_means_of_zhang_and_hager(before: list[float], memory: float) -> None:
    means = []
    for count in range(1, len(before) + 1):
        weights = [memory ** (count - 1 - index) for index in range(count)]
        pairs = zip(weights, before[:count], strict=True)
        means.append(sum(weight * value for weight, value in pairs) / sum(weights))
    state = seen(Ceiling(memory=memory), before)
    assert state.value == pytest.approx(means[-1]) and state.lowest == pytest.approx(min(means))
    assert min(before) - 1e-9 * max(before) <= state.lowest <= before[0]


@given(st.floats(1.001, 2.0), st.floats(0.0, 0.99), st.integers(1, 200), st.floats(1.0001, 1.5))
def test_rises_do_not_add_up(growth: float, memory: float, steps: int, greed: float) -> None:
    """One mini-batch, and an optimizer that takes every rise it is allowed: never above growth times the first loss."""
    rule = Ceiling(growth, memory)
    state, loss = rule.init(), 1.0
    for _ in range(steps):
        trial = Trial(loss, loss * greed)
        if rule.accepts(state, trial):
            rule.record(state, trial)
            loss = trial.after
    assert loss <= growth * (1 + 1e-12)
    creeping, loose = 1.0, Backtrack(growth)
    for _ in range(steps):
        creeping *= greed if loose.accepts(None, Trial(creeping, creeping * greed)) else 1.0
    assert creeping >= loss


@given(losses, st.floats(1e-3, 1e3), st.floats(0.0, 1.0))
def test_a_step_that_lifts_nothing_stays(before: list[float], loss: float, share: float) -> None:
    rule = Ceiling()
    assert rule.accepts(seen(rule, before), Trial(loss, share * loss))


@given(losses, st.floats(1e-3, 1e3), st.floats(1.0, 3.0))
def test_nothing_is_let_pass_that_backtracking_refuses(before: list[float], loss: float, lift: float) -> None:
    trial, rule = Trial(loss, lift * loss), Ceiling(1.3)
    assert Backtrack(1.3).accepts(None, trial) or not rule.accepts(seen(rule, before), trial)


@pytest.mark.parametrize(
    ("history", "before", "after", "accepted"),
    [
        ([], 2.0, 2.2, True),
        ([], 2.0, 2.2001, False),
        ([1.0], 2.0, 2.0, True),  # another mini-batch, on which the loss is higher
        ([1.0], 2.0, 2.0001, False),
        ([1.0], 1.05, 1.1, True),
        ([1.0], 0.5, 0.55, True),
        ([1.0], 0.5, 0.56, False),
        ([1.0, 4.0, 4.0], 1.0, 1.1, True),
        ([4.0, 1.0], 4.0, 4.1, False),  # what has been reached is held
        ([0.0], 1.0, 5.0, True),
        ([-1.0], 1.0, 5.0, True),
        ([-1.0], -1.0, math.inf, False),
        ([1.0], 1.0, math.nan, False),
    ],
)
def test_verdicts(history: list[float], before: float, after: float, accepted: bool) -> None:
    rule = Ceiling(growth=1.1, memory=0.0)
    assert rule.accepts(seen(rule, history), Trial(before, after)) == accepted


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"growth": 1.0}, "growth"),
        ({"growth": math.nan}, "growth"),
        ({"memory": 1.0}, "memory"),
        ({"memory": -0.1}, "memory"),
        ({"memory": None}, "memory"),
        ({"shrink": 1.0}, "shrink"),
        ({"attempts": 0}, "attempts"),
    ],
)
def test_numbers_are_checked(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        Ceiling(**options)


def test_full_batch_training_stays_below_the_ceiling() -> None:
    """A learning rate at which backtracking creeps: every loss of one mini-batch stays below 1.1 times the first."""

    def course(guard: Any) -> list[float]:
        model, (x, y) = make(), data(samples=32)
        method = osc.Method(guard=guard, momentum=osc.HeavyBall(0.95), defaults={"lr": 3.0})
        optimizer = build(method, model)
        found = []
        for _ in range(60):
            loss = optimizer.step(closure_of(optimizer, model, x, y))
            assert loss is not None
            found.append(float(loss))
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        return found

    held, free = course(osc.Ceiling(1.1, 0.0)), course(osc.Backtrack(1.1))
    assert max(held) <= 1.1 * held[0] * (1 + 1e-9)
    assert all(later <= 1.1 * min(held[: index + 1]) * (1 + 1e-9) for index, later in enumerate(held[1:]))
    assert max(b / a for a, b in pairwise(free)) > 1.0
