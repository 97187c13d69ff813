"""``osc.build(..., backend=...)``: the same trajectory whoever measures."""

import copy

import osculate as osc
import pytest
import torch
from small_nets import METHODS, batches, build, closure_of, everything, make, train
from torch import Tensor, nn

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def net(name: str) -> nn.Module:
    """A network that every backend can measure: no dropout, batch normalisation with fixed statistics."""
    model = make(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def end_of(name: str, kind: str, backend: str) -> dict[str, Tensor]:
    """Parameters after three steps."""
    model = net(kind)
    optimizer = build(name, model, backend=backend)
    data = batches(kind, 3, 8)
    if optimizer.has_warm_start:
        optimizer.warm_start([lambda x=x: model(x) for x, _ in data])
    train(optimizer, model, data)
    return everything(model)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_every_method_goes_the_same_way(name: str, kind: str) -> None:
    """Secant pairs are the only thing that a backend may refuse, and it does so at construction."""
    hooks, start = end_of(name, kind, "hooks"), everything(net(kind))
    assert any(not torch.equal(start[key], hooks[key]) for key in start)
    backends = ["func"]
    if osc.Needs.PAIRS in osc.registry.method(name).needs:
        with pytest.raises(osc.CompatibilityError, match="secant pairs"):
            build(name, net(kind), backend="backpack")
    else:
        backends.append("backpack")
    for backend in backends:
        found = end_of(name, kind, backend)
        for key, value in hooks.items():
            torch.testing.assert_close(found[key], value, **CLOSE)


def test_gradient_accumulation_counts_every_pass() -> None:
    ends = []
    for backend in ("hooks", "func"):
        model = net("mlp")
        optimizer = build("kfac", model, backend=backend)
        for x, y in batches("mlp", 2, 8):
            for part in range(2):
                rows = slice(4 * part, 4 * part + 4)
                nn.functional.cross_entropy(model(x[rows]), y[rows]).div(2).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(everything(model))
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, **CLOSE)


def test_what_was_thrown_away_and_what_was_only_looked_at_leaves_no_trace() -> None:
    ends = []
    for idle in (False, True):
        model = net("mlp")
        optimizer = build("kfac", model, backend="func")
        for x, y in batches("mlp", 3, 8):
            if idle:
                model(x)
                with torch.no_grad():
                    model(2 * x)
                nn.functional.cross_entropy(model(3 * x), y).backward()
                optimizer.zero_grad()
            optimizer.step(closure_of(optimizer, model, x, y))
        ends.append(everything(model))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_clearing_gradients_between_forward_and_backward_keeps_the_pass() -> None:
    ends = []
    for backend in ("hooks", "func"):
        model = net("mlp")
        optimizer = build("kfac", model, backend=backend)
        for x, y in batches("mlp", 2, 8):
            output = model(x)
            optimizer.zero_grad()
            nn.functional.cross_entropy(output, y).backward()
            optimizer.step()
        ends.append(everything(model))
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, **CLOSE)


def test_a_copy_measures_its_own_model_and_an_abandoned_pass_is_forgotten() -> None:
    model = net("mlp")
    optimizer = build("kfac", model, backend="func")
    x, y = batches("mlp", 1, 8)[0]
    model(x)
    assert optimizer.capture._passes == []
    twin_model, twin = copy.deepcopy((model, optimizer))
    for _ in range(2):
        twin.step(closure_of(twin, twin_model, x, y))
    assert all(torch.equal(a, b) for a, b in zip(net("mlp").parameters(), model.parameters(), strict=True))
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model, x, y))
    assert all(torch.equal(a, b) for a, b in zip(twin_model.parameters(), model.parameters(), strict=True))


def test_an_unknown_backend_is_named_with_near_misses_and_a_coupled_model_is_refused() -> None:
    with pytest.raises(osc.UnknownNameError, match="did you mean 'func'"):
        build("kfac", make("mlp"), backend="funk")
    model = make("cnn")
    optimizer = build("kfac", model, backend="func")
    before = everything(model)
    x, y = batches("cnn", 1, 8)[0]
    with pytest.raises(osc.CompatibilityError, match="couples its samples"):
        optimizer.step(closure_of(optimizer, model, x, y))
    after = everything(model)
    trained = [key for key, _ in model.named_parameters()]
    assert all(torch.equal(before[key], after[key]) for key in trained)


def test_closing_removes_the_hook() -> None:
    model = make("mlp")
    optimizer = build("kfac", model, backend="func")
    assert model._forward_hooks
    optimizer.close()
    assert not model._forward_hooks
