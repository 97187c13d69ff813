"""Damping as a function of the step: equal to a user who writes every value by hand, reported, checked, resumed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import batches, differences, everything, make, train


def method(damping: Any, factor: Any = None) -> osc.Method:
    structure = osc.Kronecker(factor or osc.Covariance(), osc.Covariance(), osc.Schedule(inverses=2))
    return osc.Method(structure, osc.EmpiricalFisher(), damping, defaults={"lr": 0.05, "damping": 0.5})


@pytest.mark.parametrize("inner", [osc.ConstantDamping(), osc.Split(), osc.Factored()])
def test_it_is_what_a_user_would_write_by_hand(inner: Any) -> None:
    values = [0.5, 0.1, 2.0, 0.0625, 1.0]
    first, second = make(), make()
    scheduled = osc.build(method(osc.Scheduled(inner, lambda step: values[step])), first, damping=0.4)
    by_hand = osc.build(method(inner), second, damping=0.4)
    reported = []
    for value, batch in zip(values, batches(count=5), strict=True):
        by_hand.param_groups[0]["damping"] = value * 0.4
        train(by_hand, second, [batch])
        train(scheduled, first, [batch])
        reported.append(scheduled.last_report.damping)
    assert differences(everything(first), everything(second)) == []
    assert reported == [value * 0.4 for value in values]
    assert scheduled.param_groups[0]["damping"] == 0.4


def test_groups_keep_their_own_values_and_a_run_resumes() -> None:
    groups = [{"params": ["0.*"], "damping": 0.1}]
    ends = []
    for interrupted in (False, True):
        model = make()
        optimizer = osc.build(method(osc.Scheduled(osc.Split(), osc.Geometric(0.5, 0.3))), model, groups=groups)
        train(optimizer, model, batches(count=2))
        assert optimizer.damping["0"] == 0.1 * 0.3 and optimizer.last_report.damping["0"] == 0.1 * 0.5
        if interrupted:
            state = optimizer.state_dict()
            optimizer = osc.build(method(osc.Scheduled(osc.Split(), osc.Geometric(0.5, 0.3))), model, groups=groups)
            optimizer.load_state_dict(state)
        train(optimizer, model, batches(count=4)[2:])
        ends.append(everything(model))
    assert differences(*ends) == []


def test_a_value_that_a_part_refuses_is_found_before_the_step_that_would_use_it() -> None:
    structure = osc.Kronecker(osc.Covariance(), osc.BFGS(pairs=osc.DoubleDamping()))
    rule = osc.Scheduled(factor=lambda step: 1.0 if step < 2 else 3.0)
    chosen = osc.Method(structure, osc.WithPairs(), rule, defaults={"lr": 0.01, "damping": 0.4})
    model = make()
    optimizer = osc.build(chosen, model)
    train(optimizer, model, batches(count=2))
    before = everything(model)
    with pytest.raises(osc.ArgumentError, match=r"1\.2"):
        train(optimizer, model, batches(count=3)[2:])
    assert differences(before, everything(model)) == []


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), "a", None, True])
def test_a_factor_that_is_no_number_is_named_with_its_step(factor: Any) -> None:
    model = make()
    with pytest.raises(osc.ArgumentError, match=r"factor of Scheduled must return .* at step 0"):
        osc.build(method(osc.Scheduled(factor=lambda step: factor)), model)


@pytest.mark.parametrize(
    ("make_rule", "message"),
    [
        (lambda: osc.Scheduled(osc.LevenbergMarquardt()), "change lambda twice"),
        (lambda: osc.Scheduled(osc.Scheduled()), "change lambda twice"),
        (lambda: osc.LevenbergMarquardt(osc.Scheduled()), "adapt lambda twice"),
        (lambda: osc.Scheduled(factor=0.9), "factor of Scheduled must be a function, got 0.9"),
        (lambda: osc.Geometric(0.0), "rate must lie in"),
        (lambda: osc.Geometric(0.5, 1.5), "lowest must lie in"),
    ],
)
def test_what_makes_no_sense_is_refused(make_rule: Any, message: str) -> None:
    with pytest.raises(osc.ArgumentError, match=message):
        make_rule()


def test_the_geometric_factor() -> None:
    assert [osc.Geometric(0.5, 0.2)(step) for step in range(4)] == [1.0, 0.5, 0.25, 0.2]
    assert osc.Geometric(2.0)(3) == 8.0


def test_copies_and_pickles() -> None:
    chosen = method(osc.Scheduled(osc.Split()))
    assert pickle.loads(pickle.dumps(chosen)) == copy.deepcopy(chosen) == chosen


def test_it_is_certified_and_trains_like_its_reference() -> None:
    certificate = osc.contracts.certify(osc.Scheduled(osc.Split(), osc.Geometric(0.5)))
    certificate.require()
    assert certificate.rows
    model, other = make(), make()
    chosen = method(osc.Scheduled(osc.Split(), osc.Geometric(0.5)))
    train(osc.build(chosen, model), model, batches(count=4))
    train(osc.build(chosen.reference(), other), other, batches(count=4))
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)
