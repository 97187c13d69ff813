"""The initial pass over the data: plain averages, and no trace anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import METHODS, batches, build, cross_entropy, data, differences, everything, leaves, make, train
from torch import nn

WARM = tuple(name for name in METHODS if build(name, make()).has_warm_start)


def closures(model: nn.Module, net: str = "mlp", count: int = 3) -> list[Callable[[], Any]]:
    return [lambda x=x: model(x) for x, _ in batches(net, count)]


def test_the_published_second_order_methods_have_one() -> None:
    assert {"kbfgs", "kbfgs-l", "mbf", "mbf-released", "kfac"} <= set(WARM)
    assert not {"sgdm", "adam", "lw-sgdm"} & set(WARM)


@pytest.mark.parametrize("net", ["cnn", "tokens"])
@pytest.mark.parametrize("name", WARM)
def test_it_leaves_no_trace_but_the_statistics(name: str, net: str) -> None:
    model = make(net)
    optimizer = build(name, model)
    x, y = data(net)
    cross_entropy(model(x), y).backward()  # a gradient that waits for its step
    gradients = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    before, random = everything(model), torch.get_rng_state()
    pristine = leaves(optimizer.state_dict())
    optimizer.warm_start(closures(model, net))
    assert differences(before, everything(model)) == []
    assert torch.equal(random, torch.get_rng_state())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    changed = differences(pristine, leaves(optimizer.state_dict()))
    assert changed and all("/state/" in path or path == "/progress/warm" for path in changed)
    assert not any("momentum" in path for path in changed)


@pytest.mark.parametrize("name", WARM)
def test_closures_may_also_run_backward(name: str) -> None:
    """The training closure is good enough; its gradients are thrown away, but tell the weights of the samples."""
    states = []
    for backward in (False, True):
        model = make()
        optimizer = build(name, model)

        def run(x: torch.Tensor, y: torch.Tensor, model=model, optimizer=optimizer, backward=backward) -> None:  # type: ignore[no-untyped-def]
            output = model(x)
            if backward:
                optimizer.zero_grad()
                cross_entropy(output, y).backward()

        optimizer.warm_start([lambda x=x, y=y, run=run: run(x, y) for x, y in batches(count=2)])
        assert all(parameter.grad is None for parameter in model.parameters())
        states.append(leaves(optimizer.state_dict()["state"]))
    for path, value in states[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(states[1][path], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["kbfgs", "kbfgs-l", "kfac"])
def test_input_moments_are_the_plain_average(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    optimizer.warm_start(closures(model))
    layer, moments = 0, []
    for x, _ in batches(count=3):
        rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        moments.append(rows.T @ rows / len(x))
    state = optimizer.state_dict()["state"][str(layer)]["state"]["inputs"]
    torch.testing.assert_close(state["second_moment"], torch.stack(moments).mean(0), rtol=1e-12, atol=1e-14)


def test_it_goes_on_where_it_stopped_and_stops_at_the_first_step() -> None:
    model = make()
    once, twice = build("kbfgs", model), build("kbfgs", model)
    once.warm_start(closures(model, count=4))
    twice.warm_start(closures(model, count=4)[:1])
    twice.warm_start(closures(model, count=4)[1:])
    torch.testing.assert_close(once.state_dict()["state"], twice.state_dict()["state"], rtol=1e-12, atol=1e-14)
    train(once, model, [data()])
    before = leaves(once.state_dict())
    with pytest.raises(osc.ArgumentError, match="before the first step, 1 steps"):
        once.warm_start(closures(model))
    assert differences(before, leaves(once.state_dict())) == []


def test_a_method_without_one_refuses() -> None:
    model = make()
    for optimizer in (build("sgdm", model), osc.build("mbf", model), osc.build("kfac", model, statistics="empirical")):
        assert not optimizer.has_warm_start
        with pytest.raises(osc.ArgumentError, match="no warm start"):
            optimizer.warm_start(closures(model))


@pytest.mark.parametrize("name", WARM)
def test_an_interrupted_one_leaves_a_usable_optimizer(name: str) -> None:
    model, other = make(), make()
    optimizer, twin = build(name, model), build(name, other)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.warm_start([interrupted])
    train(optimizer, model, batches(count=3))
    train(twin, other, batches(count=3))
    assert differences(everything(model), everything(other)) == []
    assert differences(optimizer.state_dict(), twin.state_dict()) == []


@pytest.mark.parametrize("name", ["kfac", "mbf"])
def test_sampled_warm_starts_need_gradients(name: str) -> None:
    model = make()
    optimizer = build(name, model)

    def blind() -> None:
        with torch.no_grad():
            model(data()[0])

    with pytest.raises(osc.OsculateError, match="no_grad"):
        optimizer.warm_start([blind])
