"""Backtrack shortens a step that raises the loss of its own mini-batch; RelativeBound caps the step of a layer."""

from __future__ import annotations

from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import batches, build, closure_of, cross_entropy, data, differences, everything, flat, make, train

KBFGS = osc.registry.method("kbfgs")


def guarded(guard: Any, lr: float, **options: Any) -> osc.Method:
    return osc.Method(guard=guard, momentum=osc.NoMomentum(), defaults={"lr": lr}, **options)


@settings(max_examples=15)
@given(lr=st.floats(1.0, 1e4), shrink=st.floats(0.1, 0.9), growth=st.floats(1.01, 2.0))
def test_a_step_that_is_too_long_is_shortened(lr: float, shrink: float, growth: float) -> None:
    model, (x, y) = make(), data(samples=32)
    method = guarded(osc.Backtrack(growth, shrink, attempts=200), lr)
    optimizer = osc.build(method, model)
    before = flat(model)
    loss = optimizer.step(closure_of(optimizer, model, x, y))
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
    report = optimizer.last_report
    assert loss is not None and report.loss_after is not None
    after = cross_entropy(model(x), y).detach()
    assert float(after) <= growth * float(loss) * (1 + 1e-12)
    assert torch.equal(torch.as_tensor(report.loss_after), after)
    length = lr * shrink**report.shortened
    torch.testing.assert_close(flat(model), before - length * gradient, rtol=1e-9, atol=1e-9)
    assert report.step_sizes["0"] == pytest.approx(length, rel=1e-12)
    assert report.as_dict()["shortened"] == report.shortened
    if report.shortened:  # one attempt fewer would not have been accepted
        with torch.no_grad():
            position = 0
            for parameter in model.parameters():
                entry = (before - length / shrink * gradient)[position : position + parameter.numel()]
                parameter.copy_(entry.reshape(parameter.shape))
                position += parameter.numel()
            assert not float(cross_entropy(model(x), y)) <= growth * float(loss)


@pytest.mark.parametrize("lr", [1e6, 1e300])
@pytest.mark.parametrize("decay", [osc.Coupled(), osc.Decoupled()])
def test_a_hopeless_step_is_taken_back_bit_for_bit(lr: float, decay: Any) -> None:
    model, (x, y) = make(), data()
    method = guarded(osc.Backtrack(1.1, 0.9, attempts=3), lr, weight_decay=decay)
    optimizer = osc.build(method, model, weight_decay=0.1)
    before = everything(model)
    evaluations = optimizer.gradient_evaluations
    optimizer.step(closure_of(optimizer, model, x, y))
    assert differences(before, everything(model)) == []
    report = optimizer.last_report
    assert report.shortened == 3 and report.step_sizes["0"] == 0.0
    assert torch.equal(torch.as_tensor(report.loss_after), torch.as_tensor(report.loss))
    assert optimizer.gradient_evaluations - evaluations == 1 + 3


def test_a_quasi_newton_step_that_is_taken_back_teaches_nothing() -> None:
    model, (x, y) = make(), data()
    optimizer = build("kbfgs", model, lr=1e8, limit=float("inf"))
    optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.last_report.shortened > 0
    for block in optimizer.state_dict()["state"].values():
        output = block["state"]["outputs"]
        if optimizer.last_report.step_sizes["0"] == 0.0:
            assert torch.equal(output["inverse"], torch.eye(len(output["inverse"]), dtype=torch.float64))
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("name", ["kbfgs", "kbfgs-l", "joint-kbfgs"])
def test_a_guard_that_does_not_trigger_changes_no_bit(name: str) -> None:
    results = []
    for growth in (1.1, float("inf")):
        torch.manual_seed(1)
        model = make("cnn")
        optimizer = build(name, model, growth=growth, lr=0.01)
        shortened = []
        for x, y in batches("cnn", 6):
            optimizer.step(closure_of(optimizer, model, x, y))
            shortened.append(optimizer.last_report.shortened)
        assert not any(shortened)
        results.append((everything(model), optimizer.state_dict()))
    assert differences(results[0], results[1]) == []


def test_gradients_buffers_and_random_state_survive_a_shortened_step() -> None:
    model, twin = make("cnn"), make("cnn")
    optimizer = osc.build(guarded(osc.Backtrack(1.01, 0.5, attempts=4), 1e5), model)
    x, y = data("cnn")
    torch.manual_seed(8)
    cross_entropy(twin(x), y).backward()
    expected = torch.get_rng_state()
    torch.manual_seed(8)
    optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.last_report.shortened == 4
    assert torch.equal(torch.get_rng_state(), expected)
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, other.grad)


def test_the_guard_accepts_what_it_says() -> None:
    guard = osc.Backtrack(growth=1.5)

    def accepts(before: float, after: float) -> bool:
        return guard.accepts(None, osc.Trial(before, after))

    assert accepts(1.0, 1.5) and not accepts(1.0, 1.5000001)
    assert not accepts(1.0, float("nan")) and not accepts(1.0, float("inf"))
    assert accepts(-1.0, 5.0) and accepts(0.0, 5.0)
    assert not accepts(-1.0, float("nan"))
    assert osc.NoGuard().accepts(None, osc.Trial(1.0, float("inf")))
    for bad in ({"growth": 1.0}, {"growth": float("nan")}, {"shrink": 1.0}, {"shrink": 0.0}, {"attempts": 0}):
        with pytest.raises(osc.ArgumentError):
            osc.Backtrack(**bad)  # type: ignore[arg-type]


@settings(max_examples=15)
@given(limit=st.floats(1e-4, 0.5), lr=st.floats(1e-3, 1e3))
def test_the_relative_bound_holds_for_every_layer(limit: float, lr: float) -> None:
    model = make()
    method = osc.Method(step_size=osc.RelativeBound(limit=limit), momentum=osc.NoMomentum(), defaults={"lr": lr})
    optimizer = osc.build(method, model)
    for x, y in batches(count=3):
        before = {name: [p.detach().clone() for p in layer.parameters()] for name, layer in model.named_children()}
        optimizer.step(closure_of(optimizer, model, x, y))
        for name, layer in model.named_children():
            old = before[name]
            if not old:
                continue
            norm = torch.cat([p.flatten() for p in old]).norm()
            move = torch.cat([(p - q).detach().flatten() for p, q in zip(layer.parameters(), old, strict=True)]).norm()
            gradient = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()  # type: ignore[union-attr]
            expected = min(lr * float(gradient), limit * float(norm))
            assert float(move) == pytest.approx(expected, rel=1e-9)


def test_a_bound_that_is_never_reached_changes_nothing() -> None:
    results = []
    for rule in (osc.ConstantStep(), osc.RelativeBound(osc.ConstantStep(), limit=1e9)):
        model = make()
        optimizer = osc.build(osc.Method(step_size=rule, defaults={"lr": 0.1}), model)
        train(optimizer, model, batches(count=4))
        results.append(flat(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=0)


def test_a_layer_of_zeros_is_not_bounded() -> None:
    model = make()
    with torch.no_grad():
        for parameter in model.get_submodule("4").parameters():
            parameter.zero_()
    optimizer = osc.build(osc.Method(step_size=osc.RelativeBound(limit=0.1), defaults={"lr": 0.1}), model)
    train(optimizer, model, [data()])
    assert model.get_parameter("4.bias").abs().max() > 0
    with pytest.raises(osc.ArgumentError, match="limit"):
        osc.RelativeBound(limit=0.0)
