"""Closures that are not all of the mini-batch, skip it, or fail when the method looks back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import (
    LOOKING_BACK,
    METHODS,
    WITHOUT_CLOSURE,
    batches,
    build,
    cross_entropy,
    data,
    differences,
    everything,
    make,
    train,
)
from torch import Tensor, nn

Closure = Callable[[], Any]


def state_of(optimizer: osc.SecondOrder) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def backward(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over equal micro-batches, as loops with accumulation scale it."""
    losses = []
    for x, y in parts:
        loss = cross_entropy(model(x), y) / 4
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


# -- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clears", ["optimizer", "model", "model, in place", "parameters", "in the closure"])
@pytest.mark.parametrize("backend", ["hooks", "func"])
@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_the_closure_of_the_last_micro_batch_steps_with_all_of_them(name: str, backend: str, clears: str) -> None:
    if backend == "func" and name not in ("kfac", "ekfac", "ngd-exact"):
        pytest.skip("three methods show it")
    results = []
    for in_a_closure in (False, True):
        model = make()
        try:
            optimizer = build(name, model, backend=backend)
        except osc.CompatibilityError:
            pytest.skip("the backend refuses")
        for step in range(3):
            parts = batches(count=4, samples=8)
            if clears == "model":
                model.zero_grad()
            elif clears == "model, in place":
                model.zero_grad(set_to_none=False)
            elif clears == "parameters":
                for parameter in model.parameters():
                    parameter.grad = None
            else:
                optimizer.zero_grad()
            parts = [(x + step, y) for x, y in parts]
            if clears == "in the closure":  # the first three are thrown away by it
                backward(model, parts[:3]) if in_a_closure else None

                def last(parts: Any = parts, model: Any = model, optimizer: Any = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    return backward(model, parts[3:])

                optimizer.step(last) if in_a_closure else (last(), optimizer.step())
            else:
                backward(model, parts[:3])
                if in_a_closure:
                    optimizer.step(lambda model=model, parts=parts: backward(model, parts[3:]))
                else:
                    backward(model, parts[3:])
                    optimizer.step()
        results.append((everything(model), optimizer.state_dict()["state"]))
    assert differences(*results) == []


@pytest.mark.parametrize("clear", [nn.Module.zero_grad, lambda model: model.zero_grad(set_to_none=False)])
def test_earlier_passes_whose_gradient_the_closure_clears_behind_our_back_do_not_count(
    clear: Callable[[nn.Module], None],
) -> None:
    results = []
    for company in (False, True):
        model = make()
        optimizer = build("kfac", model, statistics="empirical")
        if company:
            backward(model, batches(count=2))

        def closure(model: Any = model) -> Tensor:
            clear(model)
            return backward(model, batches(count=1))

        optimizer.step(closure)
        results.append((everything(model), optimizer.state_dict()))
    assert differences(*results) == []


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_a_method_that_looks_back_sees_the_whole_mini_batch_or_refuses(name: str) -> None:
    model = make("cnn")
    optimizer = build(name, model)
    train(optimizer, model, batches("cnn", 2))
    optimizer.zero_grad()
    parts = batches("cnn", 4)
    backward(model, parts[:3])
    before, state = everything(model), state_of(optimizer)
    words = "added its gradient to one that was there before.*no parameter and no state was changed.*every micro-batch"
    with pytest.raises(osc.ArgumentError, match=words):
        optimizer.step(lambda: backward(model, parts[3:]))
    names = {name for name, _ in model.named_parameters()}
    assert differences({k: v for k, v in everything(model).items() if k in names}, {k: before[k] for k in names}) == []
    assert differences(state, optimizer.state_dict()) == []

    def whole() -> Tensor:
        optimizer.zero_grad()
        return backward(model, parts)

    optimizer.step(whole)  # the way out
    assert differences(state, optimizer.state_dict()) != []


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_a_closure_that_never_clears_is_refused_from_its_second_step_on(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    optimizer.step(lambda: backward(model, batches(count=1)))
    with pytest.raises(osc.ArgumentError, match="zero_grad"):
        optimizer.step(lambda: backward(model, batches(count=1)))


@pytest.mark.parametrize("where", ["before", "inside", "after the forward pass"])
@pytest.mark.parametrize("clear", ["optimizer", "optimizer, in place", "model", "model, in place", "parameters"])
def test_every_way_to_clear_is_understood(clear: str, where: str) -> None:
    results = []
    for way in ("optimizer", clear):
        model = make()
        optimizer = build("kbfgs", model)

        def clearing(model: Any = model, optimizer: Any = optimizer, way: str = way) -> None:
            owner, _, place = way.partition(", ")
            if owner == "parameters":
                for parameter in model.parameters():
                    parameter.grad = None
            else:
                {"optimizer": optimizer, "model": model}[owner].zero_grad(set_to_none=not place)

        for x, y in batches(count=3):

            def closure(x: Any = x, y: Any = y, model: Any = model, clearing: Any = clearing) -> Tensor:
                if where == "inside":
                    clearing()
                output = model(x)
                if where == "after the forward pass":
                    clearing()
                loss = cross_entropy(output, y)
                loss.backward()
                return loss

            if where == "before":
                clearing()
            optimizer.step(closure)
        results.append((everything(model), optimizer.state_dict()))
    assert differences(*results) == []


def test_gradients_for_somebody_else_in_the_closure_are_no_accumulation() -> None:
    model = make()
    optimizer = build("kbfgs", model)
    for x, y in batches(count=3):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            torch.autograd.grad(model(x).sum(), list(model.parameters()))  # before anything was cleared
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


# -- skipped batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", ["nothing", "the last gradients", "zeros", "three micro-batches"])
@pytest.mark.parametrize("name", METHODS)
def test_a_closure_that_returns_none_is_a_skipped_and_counted_step(name: str, leaves: str) -> None:
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=2))
    if leaves == "three micro-batches":
        optimizer.zero_grad()
        backward(model, batches(count=3))

    def closure() -> None:
        if leaves == "nothing":
            optimizer.zero_grad()
        elif leaves == "zeros":
            optimizer.zero_grad(set_to_none=False)
        model(data()[0])  # a forward pass of which nothing comes

    before, state = everything(model), state_of(optimizer)
    assert optimizer.step(closure) is None
    assert optimizer.skipped_steps == 1 and "None" in str(optimizer.last_report.skipped)
    state["progress"]["skipped_steps"] = 1
    assert differences(before, everything(model)) == [] and differences(state, optimizer.state_dict()) == []
    twin = make()
    other = build(name, twin)
    train(other, twin, batches(count=2))
    train(other, twin, batches(count=1)), train(optimizer, model, batches(count=1))
    assert differences(everything(model), everything(twin)) == []


# -- look backs that fail -------------------------------------------------------------------------------------------


class Calls:
    """A closure whose second call goes wrong in one of several ways."""

    def __init__(self, optimizer: osc.SecondOrder, model: nn.Module, net: str, wrong: str, at: int = 2):
        self.optimizer, self.model, self.net, self.wrong, self.at, self.count = optimizer, model, net, wrong, at, 0

    def __call__(self) -> Any:
        self.count += 1
        x, y = data(self.net)
        if self.count == self.at:
            if self.wrong == "another size":
                x, y = x[:-3], y[:-3]
            elif self.wrong == "raises":
                raise StopIteration("no more data")
            elif self.wrong == "interrupted":
                self.model(x)
                raise KeyboardInterrupt
            elif self.wrong == "raises in the backward":
                self.model(x).register_hook(lambda _: 1 / 0)
        self.optimizer.zero_grad()
        output = self.model(x)
        if self.count == self.at and self.wrong == "raises in the backward":
            output.register_hook(lambda gradient: 1 / 0)
        loss = cross_entropy(output, y)
        if self.count == self.at and self.wrong == "returns None":
            return None
        loss.backward()
        return loss


FAILURES = {
    "another size": osc.ArgumentError,
    "raises": StopIteration,
    "interrupted": KeyboardInterrupt,
    "raises in the backward": ZeroDivisionError,
    "returns None": osc.ArgumentError,
}


@pytest.mark.parametrize("wrong", FAILURES)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("name", LOOKING_BACK)
def test_a_look_back_that_fails_takes_the_step_back(name: str, net: str, wrong: str) -> None:
    if wrong == "another size" and not any(block.asked.looks_back for block in build(name, make(net)).blocks):
        pytest.skip("its guard alone looks back, at the loss")
    results = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = make(net)
        optimizer = build(name, model)
        train(optimizer, model, batches(net, 3))
        if fails:
            before, state, random = everything(model), state_of(optimizer), torch.get_rng_state()
            with pytest.raises(FAILURES[wrong]):
                optimizer.step(Calls(optimizer, model, net, wrong))
            assert differences(before, everything(model)) == []
            assert differences(state, optimizer.state_dict()) == []
            assert torch.equal(random, torch.get_rng_state())
            assert all(parameter.requires_grad for parameter in model.parameters())
        train(optimizer, model, batches(net, 2))
        results.append((everything(model), optimizer.state_dict()))
    assert differences(*results) == []


@pytest.mark.parametrize("wrong", ["raises", "interrupted"])
def test_a_look_back_that_fails_while_the_guard_shortens(wrong: str) -> None:
    model = make()
    optimizer = build("kbfgs", model, lr=1e3, limit=float("inf"))
    before, state = everything(model), state_of(optimizer)
    with pytest.raises(FAILURES[wrong]):
        optimizer.step(Calls(optimizer, model, "mlp", wrong, at=4))
    assert differences(before, everything(model)) == [] and differences(state, optimizer.state_dict()) == []


@pytest.mark.parametrize("wrong", ["raises", "interrupted"])
def test_the_state_of_a_guard_is_taken_back(wrong: str) -> None:
    model = make()
    optimizer = osc.build(
        osc.Method(
            osc.Kronecker(osc.Covariance(), osc.Covariance()),
            osc.SampledFisher(),
            guard=osc.Nonmonotone(),
            defaults={"lr": 0.1, "damping": 0.1},
        ),
        model,
        likelihood="categorical",
    )
    train(optimizer, model, batches(count=2))
    before, state = everything(model), state_of(optimizer)
    with pytest.raises(FAILURES[wrong]):
        optimizer.step(Calls(optimizer, model, "mlp", wrong))
    assert differences(before, everything(model)) == [] and differences(state, optimizer.state_dict()) == []


@pytest.mark.parametrize("name", ["kbfgs", "kbfgs-l", "mini-block-lbfgs"])
@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_a_closure_that_draws_another_batch_of_equal_size_is_refused(name: str, backend: str) -> None:
    if name == "mini-block-lbfgs" and backend == "func":
        pytest.skip("one backend shows it")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = iter(torch.randn(8, 5, 3).double())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = osc.build(name, model, backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(next(batches)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(osc.ArgumentError, match="other data"):
        optimizer.step(closure)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    x = next(batches)

    def copying() -> Tensor:
        optimizer.zero_grad()
        loss = model(x.clone()).square().mean()
        loss.backward()
        return loss

    optimizer.step(copying)


def test_gradients_that_are_never_cleared_are_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = osc.build("kfac", model, likelihood="categorical", damping=0.1)
    x, labels = torch.randn(6, 3).double(), torch.arange(6) % 2
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()
    before = model[0].weight.detach().clone()
    nn.functional.cross_entropy(model(x), labels).backward()
    with pytest.raises(osc.ArgumentError, match="does not explain"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "joint-kfac"])
def test_a_step_inside_autocast_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    optimizer = osc.build(name, model, likelihood="categorical")
    before = model[0].weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), torch.arange(6) % 2)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(osc.ArgumentError, match="inside torch\\.autocast"):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, before)
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, before)
