"""Averages against their closed forms, additive damping, schedules, and what their constructors refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from osculate import ArgumentError
from osculate.preconditioners import (
    LBFGS,
    ByLayer,
    ConstantDamping,
    Diagonal,
    FlatChunk,
    MovingAverage,
    Observation,
    PerOutput,
    PlainAverage,
    RunningSum,
    Schedule,
    Split,
    ZeroStartAverage,
)
from osculate.preconditioners.averages import Average

values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12)
decays = st.floats(0.0, 0.999)


def run(rule: Average, xs: list[float], average: float = 0.0, weight: float = 0.0) -> float:
    for x in xs:
        keep, add, weight = rule.coefficients(weight)
        average = keep * average + add * x
    return average


@given(values, decays)
def test_moving_average_is_adams_corrected_average(xs: list[float], decay: float) -> None:
    n = len(xs)
    plain = sum((1 - decay) * decay ** (n - 1 - k) * x for k, x in enumerate(xs))
    assert run(MovingAverage(decay), xs) == pytest.approx(plain / (1 - decay**n), rel=1e-9, abs=1e-9)
    assert run(ZeroStartAverage(decay), xs) == pytest.approx(plain, rel=1e-9, abs=1e-9)


@given(values, decays, st.integers(1, 30), st.floats(-10, 10))
def test_after_a_warm_start_it_is_the_plain_rule(xs: list[float], decay: float, count: int, start: float) -> None:
    expected = start
    for x in xs:
        expected = decay * expected + (1 - decay) * x
    found = run(MovingAverage(decay), xs, start, float(count))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(values)
def test_plain_average_and_running_sum(xs: list[float]) -> None:
    assert run(PlainAverage(), xs) == pytest.approx(sum(xs) / len(xs), rel=1e-9, abs=1e-9)
    assert run(RunningSum(), xs) == pytest.approx(sum(xs), rel=1e-9, abs=1e-9)


@given(st.floats(0, 1e3), st.integers(1, 1000))
def test_split_damping_multiplies_to_the_whole(value: float, positions: int) -> None:
    sides = Split().sides(value, positions)
    assert sides.whole == value
    assert sides.inputs * sides.outputs == pytest.approx(value)
    assert sides.inputs == pytest.approx(math.sqrt(value) * math.sqrt(positions))
    constant = ConstantDamping().sides(value, positions)
    assert (constant.whole, constant.inputs, constant.outputs) == (value, value, value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None, "1"])
def test_damping_must_be_finite_and_not_negative(value: float) -> None:
    for rule in (Split(), ConstantDamping()):
        with pytest.raises(ArgumentError, match="damping"):
            rule.sides(value, 1)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 60))
def test_schedules(statistics: int, inverses: int, eager: int, step: int) -> None:
    schedule = Schedule(statistics, inverses, eager)
    assert schedule.statistics_due(step, warm=False) == (step % statistics == 0)
    due = step % inverses == 0 or (step <= eager and step % statistics == 0)
    assert schedule.inverses_due(step) == due
    once = Schedule(statistics, None)
    assert once.inverses_due(step) == (step == 0)


def test_a_fresh_warm_start_is_not_updated_at_once() -> None:
    schedule = Schedule(first=1)
    assert not schedule.statistics_due(0, warm=True)
    assert schedule.statistics_due(1, warm=True) and schedule.statistics_due(0, warm=False)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MovingAverage(1.0), "decay"),
        (lambda: MovingAverage(-0.1), "decay"),
        (lambda: MovingAverage(float("nan")), "decay"),
        (lambda: MovingAverage("0.9"), "decay"),
        (lambda: ZeroStartAverage(1.5), "decay"),
        (lambda: Schedule(statistics=0), "statistics"),
        (lambda: Schedule(inverses=0), "inverses"),
        (lambda: Schedule(statistics=1.5), "statistics"),
        (lambda: Schedule(statistics=True), "statistics"),
        (lambda: Schedule(eager=-1), "eager"),
        (lambda: Schedule(first=-1), "first"),
        (lambda: Diagonal(power=0.3), "power"),
        (lambda: Diagonal(epsilon=-1e-8), "epsilon"),
        (lambda: Diagonal(epsilon=float("inf")), "epsilon"),
        (lambda: Diagonal(source="grad"), "source"),
        (lambda: LBFGS(memory=0), "memory"),
        (lambda: LBFGS(memory=2.0), "memory"),
        (lambda: LBFGS(initial=0.0), "initial"),
        (lambda: LBFGS(initial=float("nan")), "initial"),
        (lambda: LBFGS(initial=float("inf")), "initial"),
        (lambda: LBFGS(initial="1"), "initial"),
        (lambda: PerOutput(limit=0), "limit"),
        (lambda: ByLayer({}), "ByLayer"),
    ],
)
def test_constructors_name_the_bad_argument(make: object, word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        make()


def test_coupled_decay_enters_the_observed_gradient_without_touching_it() -> None:
    gradient, parameter = torch.tensor([1.0, 2.0]), torch.tensor([10.0, -10.0])
    plain = Observation(None, (gradient,), (gradient,), 0.0, (parameter,))
    assert plain.regularised()[0] is gradient
    decayed = Observation(None, (gradient,), (gradient,), 0.1, (parameter,))
    assert torch.allclose(decayed.regularised()[0], torch.tensor([2.0, 1.0]))
    assert torch.equal(gradient, torch.tensor([1.0, 2.0]))


def test_parts_are_frozen_and_comparable() -> None:
    assert MovingAverage(0.5) == MovingAverage(0.5) and FlatChunk() == FlatChunk()
    with pytest.raises(AttributeError):
        MovingAverage(0.5).decay = 2.0  # type: ignore[misc]
