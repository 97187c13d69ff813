"""Armijo and the non-monotone guard: sufficient decrease with the slope of the whole step, whatever moves it."""

from __future__ import annotations

import copy
import math
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from osculate.stepsize.guard import Level
from small_nets import batches, closure_of, cross_entropy, data, differences, everything, flat, make, train
from torch import Tensor

rates = st.floats(1e-3, 1e4)


def objective(model: torch.nn.Module, x: Tensor, y: Tensor, tau: float) -> Tensor:
    penalty = 0.5 * tau * sum(parameter.square().sum() for parameter in model.parameters())
    return cross_entropy(model(x), y) + penalty


@settings(max_examples=25)
@given(
    rates,
    st.sampled_from([1e-4, 0.1, 0.6]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([osc.Coupled(), osc.Decoupled()]),
    st.sampled_from([osc.NoMomentum(), osc.HeavyBall(0.9)]),
)
def test_every_accepted_step_decreases_sufficiently(lr: float, c: float, tau: float, decay: Any, momentum: Any) -> None:
    """The condition, with the slope from autograd and the displacement that was really made."""
    model = make()
    method = osc.Method(momentum=momentum, guard=osc.Armijo(c, 0.5, 60), weight_decay=decay, defaults={"lr": lr})
    optimizer = osc.build(method, model, weight_decay=tau)
    penalty = tau if isinstance(decay, osc.Coupled) else 0.0
    for x, y in batches(count=4):
        value = objective(model, x, y, penalty)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
        start, before = flat(model), float(value.detach())
        optimizer.step(closure_of(optimizer, model, x, y))
        after = float(objective(model, x, y, penalty).detach())
        slope = float(gradient @ (flat(model) - start))  # of the fraction that was taken
        assert after <= before + c * min(slope, 0.0) + 1e-12 * abs(before)
        assert after <= before + 1e-12 * abs(before)  # in particular it never rises
        assert torch.as_tensor(optimizer.last_report.loss_after) == cross_entropy(model(x), y).detach()


@pytest.mark.parametrize("c", [1e-4, 0.3])
def test_one_shortening_fewer_would_not_have_done(c: float) -> None:
    for lr in (1.0, 30.0, 1e3):
        model, (x, y) = make(), data()
        method = osc.Method(momentum=osc.NoMomentum(), guard=osc.Armijo(c, 0.5, 60), defaults={"lr": lr})
        optimizer = osc.build(method, model)
        start = everything(model)
        before = float(optimizer.step(closure_of(optimizer, model, x, y)))  # type: ignore[arg-type]
        gradients = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        slope = -lr * float(sum(g.square().sum() for g in gradients))
        shortened = optimizer.last_report.shortened
        if not shortened:
            continue
        model.load_state_dict(start)
        t = 0.5 ** (shortened - 1)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(t * lr * gradient)
        assert not float(cross_entropy(model(x), y).detach()) <= before + c * t * slope


def test_a_step_against_the_gradient_is_taken_back_whole() -> None:
    """Momentum from another mini-batch may point uphill on this one: then nothing that rises stays."""
    model, (x, y) = make(), data()
    method = osc.Method(momentum=osc.HeavyBall(0.99), guard=osc.Armijo(attempts=3), defaults={"lr": 1e-3})
    optimizer = osc.build(method, model)
    optimizer.step(closure_of(optimizer, model, x, y))
    for block in optimizer.blocks:
        for value in block.storage:
            value.mul_(-100.0)
    start = everything(model)
    optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.last_report.shortened == 3 and differences(start, everything(model)) == []


@pytest.mark.parametrize("name", ["kbfgs", "kfac", "mbf", "joint-kbfgs", "adam"])
def test_armijo_guards_every_method(name: str) -> None:
    from dataclasses import replace

    model = make()
    method = replace(osc.registry.method(name), guard=osc.Armijo())
    optimizer = osc.build(method, model, likelihood="categorical", lr=2.0)
    assert optimizer.needs_closure
    for x, y in batches(count=5):
        optimizer.step(closure_of(optimizer, model, x, y))
        report = optimizer.last_report.as_dict()
        assert report["loss_after"] <= report["loss"]


# -- the non-monotone guard -----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-3, 0.5), st.floats(0.01, 1.0)), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.5, 0.85]),
)
def test_the_level_is_zhang_and_hagers(steps: list[tuple[float, float, float]], memory: float) -> None:
    """Full batch: the objective after a step is the one before the next; C and Q as their Algorithm 1.1 writes them."""
    guard, c = osc.Nonmonotone(memory, c=0.1), 0.1
    state = guard.init()
    f, C, Q = 1.0, 1.0, 1.0
    for change, slope, fraction in steps:
        trial = osc.Trial(f, f + change, slope, fraction)
        expected = trial.after <= C + c * fraction * min(slope, 0.0)
        if abs(trial.after - C - c * fraction * min(slope, 0.0)) < 1e-9:
            return
        frozen = copy.copy(state)
        assert guard.accepts(state, trial) == expected
        assert frozen == state  # only a step that stays is taken in
        if not expected:
            continue
        guard.record(state, trial)
        f = trial.after
        Q, C = memory * Q + 1, (memory * Q * C + f) / (memory * Q + 1)
        assert state.value == pytest.approx(C, abs=1e-9) and state.weight == pytest.approx(Q)
        assert f - 1e-9 <= C  # their Lemma 1.1


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-3, 3), st.floats(0.01, 1.0), st.floats(0, 5))
def test_without_memory_it_is_armijo(before: float, after: float, slope: float, fraction: float, past: float) -> None:
    trial, level = osc.Trial(before, after, slope, fraction), Level()
    guard = osc.Nonmonotone(0.0, 0.3)
    assert guard.accepts(level, trial) == osc.Armijo(0.3).accepts(None, trial)
    if past <= before:
        assert guard.accepts(Level(past, 1.0), trial) == osc.Armijo(0.3).accepts(None, trial)


@pytest.mark.parametrize("guard", [osc.Armijo(), osc.Nonmonotone()])
@pytest.mark.parametrize(("after", "slope"), [(math.nan, -1.0), (math.inf, -1.0), (0.0, math.nan), (0.0, -math.inf)])
def test_what_is_not_finite_is_refused(guard: Any, after: float, slope: float) -> None:
    assert not guard.accepts(guard.init(), osc.Trial(1.0, after, slope))


def test_the_level_is_saved_and_missing_state_is_named() -> None:
    method = osc.Method(guard=osc.Nonmonotone(), defaults={"lr": 0.5})
    model = make()
    optimizer = osc.build(method, model)
    train(optimizer, model, batches(count=3))
    saved = optimizer.state_dict()
    assert saved["guard"]["weight"] > 1.0
    other = osc.build(method, make())
    other.load_state_dict(saved)
    assert other.state_dict()["guard"] == saved["guard"]
    with pytest.raises(osc.ArgumentError, match="guard"):
        osc.build(method, make()).load_state_dict({key: value for key, value in saved.items() if key != "guard"})
    plain = osc.build(osc.Method(guard=osc.Armijo()), make())
    assert plain.state_dict()["guard"] == {}


@pytest.mark.parametrize(
    ("make_guard", "word"),
    [
        *((lambda kind=kind, bad=bad: kind(c=bad), "c of") for kind in (osc.Armijo, osc.Nonmonotone)
          for bad in (0.0, 1.0, math.nan, "1e-4")),
        *((lambda kind=kind: kind(shrink=1.0), "shrink") for kind in (osc.Armijo, osc.Nonmonotone)),
        *((lambda kind=kind: kind(attempts=0), "attempts") for kind in (osc.Armijo, osc.Nonmonotone)),
        *((lambda bad=bad: osc.Nonmonotone(bad), "memory") for bad in (1.0, -0.1, None)),
    ],
)  # fmt: skip
def test_numbers_are_checked(make_guard: Any, word: str) -> None:
    with pytest.raises(osc.ArgumentError, match=word):
        make_guard()
