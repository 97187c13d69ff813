"""Non-finite numbers at any point of a step: not one tensor of the state changes, and the event is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import (
    LOOKING_BACK,
    METHODS,
    batches,
    build,
    closure_of,
    cross_entropy,
    data,
    differences,
    everything,
    leaves,
    make,
)
from small_nets import train as train_on
from torch import Tensor, nn


@dataclass(frozen=True)
class Broken:
    """A step-size rule that breaks down at one step; it keeps a state, which must be rolled back too."""

    at: int = 2
    value: float = math.nan
    inner: Any = osc.JointLayerwise()  # noqa: RUF009

    @property
    def needs(self) -> Any:
        return self.inner.needs

    @property
    def curvature(self) -> Any:
        return self.inner.curvature

    def due(self, step: int) -> bool:
        return True

    def init(self, count: int, like: Tensor) -> Any:
        return self.inner.init(count, like)

    def propose(self, state: Any, evidence: Any) -> Any:
        sizes = self.inner.propose(state, evidence)
        Broken.calls += 1
        return torch.full_like(sizes, self.value) if Broken.calls == self.at + 1 else sizes

    calls = 0


def attempt(optimizer: osc.SecondOrder, closure: Callable[[], Tensor], policy: str, words: str) -> None:
    """One step that must be refused as the policy says."""
    count = optimizer.skipped_steps
    if policy == "raise":
        with pytest.raises(osc.NumericalError, match=words):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
    report = optimizer.last_report
    assert report.skipped is not None and optimizer.skipped_steps == count + 1
    plain = report.as_dict()
    assert plain["skipped_because"] == report.skipped_because == report.skipped and plain["skipped"] == 1
    assert report.as_dict()["skipped"] == 1 and report.damping == optimizer.param_groups[0]["damping"]


def unchanged(before: Any, model: nn.Module, optimizer: osc.SecondOrder) -> None:
    """Parameters, buffers and every part of the state but the counters of evaluations, bitwise."""
    state = optimizer.state_dict()
    now = (everything(model), leaves({key: state[key] for key in ("state", "step_size")}), state["progress"]["step"])
    assert differences(before, now) == []


def remember(model: nn.Module, optimizer: osc.SecondOrder) -> Any:
    state = optimizer.state_dict()
    return everything(model), leaves({key: state[key] for key in ("state", "step_size")}), state["progress"]["step"]


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("base", ["kfac", "adam", "kbfgs", "mbf"])
def test_a_step_size_that_is_not_finite_leaves_no_trace(base: str, value: float, policy: str) -> None:
    """Momentum, statistics, inverses and the rule's own averages have been written by then: all come back."""
    Broken.calls = 0
    method = replace(osc.registry.method(base), step_size=Broken(value=value))
    model = make()
    optimizer = build(method, model, on_nonfinite=policy)  # type: ignore[arg-type]
    train_on(optimizer, model, batches(count=2))
    before = remember(model, optimizer)
    attempt(optimizer, closure_of(optimizer, model, *data()), policy, "Broken proposed a step size")
    unchanged(before, model, optimizer)
    losses = train_on(optimizer, model, [data(samples=64)] * 4)
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_state_says_to_replace_is_never_written_into(name: str) -> None:
    """So nobody has to copy it before a step that may be taken back."""
    model = make()
    optimizer = build(name, model)
    for x, y in batches(count=4):
        states = [block.state for block in optimizer.blocks]
        written = {id(value) for state in states for value in state.written()}
        kept = [value for state in states for value in state.tensors() if id(value) not in written]
        copies = [value.clone() for value in kept]
        optimizer.step(closure_of(optimizer, model, x, y))
        assert all(map(torch.equal, kept, copies))


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_run_goes_on_after_a_refused_step_as_if_it_had_not_been_tried(policy: str) -> None:
    results = []
    for at in (2, 99):
        Broken.calls = 0
        model = make()
        method = replace(osc.registry.method("kfac", statistics="empirical"), step_size=Broken(at=at))
        optimizer = build(method, model, on_nonfinite=policy)  # type: ignore[arg-type]
        for index, (x, y) in enumerate(batches(count=5)):
            if index == 2 and at == 2:
                attempt(optimizer, closure_of(optimizer, model, x, y), policy, "step size")
            optimizer.step(closure_of(optimizer, model, x, y))
        results.append((everything(model), leaves(optimizer.state_dict()["state"])))
    assert differences(*results) == []


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_whose_square_overflows_enters_no_second_moment(name: str, policy: str) -> None:
    model = make()
    optimizer = build(name, model, on_nonfinite=policy)
    train_on(optimizer, model, batches(count=2))
    before = remember(model, optimizer)
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        (loss * 1e200).backward()
        return loss

    attempt(optimizer, closure, policy, "square that is not finite in layers")
    unchanged(before, model, optimizer)
    assert all(math.isfinite(value) for value in train_on(optimizer, model, [(x, y)] * 3))


class Gate(nn.Module):
    """A layer whose inputs can be huge while its contribution to the loss, and so every gradient, is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        return self.head(hidden * self.scale).clamp(-1e3, 1e3)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(
    "name", ["kfac", "kbfgs", "kbfgs-l", "joint-kfac", "joint-kfac-momentum", "joint-kfac-noise-aware"]
)
def test_a_statistic_that_overflows_beside_finite_gradients_is_found(name: str, policy: str) -> None:
    torch.manual_seed(0)
    model = Gate().double()
    optimizer = build(name, model, on_nonfinite=policy)
    train_on(optimizer, model, batches(count=2))
    before = remember(model, optimizer)
    model.scale = 1e200  # the second moment of the head's inputs overflows; the clamp stops every gradient
    x, y = data()
    cross_entropy(model(x), y).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    attempt(optimizer, closure_of(optimizer, model, x, y), policy, "statistics of layer head overflow")
    unchanged(before, model, optimizer)
    model.scale = 1.0
    assert all(math.isfinite(value) for value in train_on(optimizer, model, [(x, y)] * 3))


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("name", ["kbfgs", "kbfgs-l"])
def test_a_loss_that_is_not_finite_after_an_unguarded_step_takes_the_step_back(name: str, policy: str) -> None:
    model = make()
    optimizer = build(name, model, on_nonfinite=policy, growth=math.inf)
    train_on(optimizer, model, batches(count=2))
    before = remember(model, optimizer)
    x, y = data()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) * (math.nan if calls == 2 else 1.0)
        loss.backward()
        return loss

    attempt(optimizer, closure, policy, "after the step is nan")
    unchanged(before, model, optimizer)
    assert all(math.isfinite(value) for value in train_on(optimizer, model, [(x, y)] * 3))


@pytest.mark.parametrize("layer", ["0", "4"])
@pytest.mark.parametrize("name", METHODS)
def test_one_bad_entry_of_one_gradient_is_found_and_named(name: str, layer: str) -> None:
    model = make()
    optimizer = build(name, model, on_nonfinite="skip")
    train_on(optimizer, model, batches(count=1))
    before = remember(model, optimizer)
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        model.get_parameter(f"{layer}.bias").grad[0] = math.nan  # type: ignore[index]
        return loss

    attempt(optimizer, closure, "skip", "")
    assert f"layers {layer}" in str(optimizer.last_report.skipped)
    unchanged(before, model, optimizer)


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_a_closure_does_not_run_again_after_a_loss_that_is_not_finite(name: str) -> None:
    model = make()
    optimizer, calls = build(name, model, on_nonfinite="skip"), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        x, y = data()
        loss = cross_entropy(model(x), y) * math.nan
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert calls == 1 and optimizer.skipped_steps == 1


def test_the_count_of_skipped_steps_is_saved() -> None:
    model = make()
    optimizer = build("sgdm", model, on_nonfinite="skip")
    for scale in (1.0, math.nan, math.inf, 1.0):
        x, y = data()
        (cross_entropy(model(x), y) * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 2
    other = build("sgdm", make())
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 2
