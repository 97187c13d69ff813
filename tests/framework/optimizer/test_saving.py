"""state_dict: resume bit for bit, arguments stay as they are, what does not fit is named."""

from __future__ import annotations

import copy
import io
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import METHODS, batches, build, data, differences, everything, leaves, make, train
from torch import nn


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """torch.save and a safe torch.load."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    result: dict[str, Any] = torch.load(buffer, weights_only=True)
    return result


@pytest.mark.parametrize("net", ["cnn", "tokens"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_continues_bit_for_bit(name: str, net: str) -> None:
    torch.manual_seed(0)
    model = make(net)
    optimizer = build(name, model)
    if optimizer.has_warm_start:
        optimizer.warm_start([lambda x=x: model(x) for x, _ in batches(net, 2)])
    train(optimizer, model, batches(net, 4))
    checkpoint = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    random = torch.get_rng_state()
    expected_losses = train(optimizer, model, batches(net, 8)[4:])
    expected = (everything(model), optimizer.state_dict())

    other = make(net, seed=9)
    resumed = build(name, other)
    other.load_state_dict(checkpoint["model"])
    untouched = leaves(checkpoint["optimizer"])
    resumed.load_state_dict(checkpoint["optimizer"])
    assert differences(resumed.state_dict(), checkpoint["optimizer"]) == []
    torch.set_rng_state(random)
    losses = train(resumed, other, batches(net, 8)[4:])
    assert losses == expected_losses
    assert differences((everything(other), resumed.state_dict()), expected) == []
    assert differences(untouched, leaves(checkpoint["optimizer"])) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_state_lives_its_own_life(name: str) -> None:
    """Neither optimizer writes into the other after a load, nor into a deep copy of a state."""
    model, other = make(), make()
    first, second = build(name, model), build(name, other)
    train(first, model, batches(count=2))
    kept = copy.deepcopy(first.state_dict())
    copies = leaves(kept)
    second.load_state_dict(first.state_dict())
    before = leaves(second.state_dict())
    train(first, model, batches(count=3))
    assert differences(before, leaves(second.state_dict())) == []
    assert differences(copies, leaves(kept)) == []


@pytest.mark.parametrize("name", METHODS)
def test_states_hold_only_tensors_and_numbers_keyed_by_name(name: str) -> None:
    model = make("cnn")
    optimizer = build(name, model)
    train(optimizer, model, batches("cnn", 2))
    state = optimizer.state_dict()
    words = state.pop("method")
    assert all(isinstance(value, str) for value in words.values())
    assert all(isinstance(value, torch.Tensor | int | float | bool) for value in leaves(state).values())
    names = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert {key.split(":")[0] for key in state["state"]} == names


def test_schedulers_resume_with_the_optimizer() -> None:
    lrs = []
    for interrupted in (False, True):
        model = make()
        optimizer = build("kfac", model, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
        for index, batch in enumerate(batches(count=6)):
            if interrupted and index == 4:
                saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
                optimizer = build("kfac", model, lr=0.7)
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
                optimizer.load_state_dict(saved["optimizer"])
                scheduler.load_state_dict(saved["scheduler"])
            train(optimizer, model, [batch])
            scheduler.step()
            lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[:6] == lrs[6:]


def test_a_state_of_another_model_is_refused_by_name() -> None:
    model = make()
    optimizer = build("kfac", model)
    train(optimizer, model, [data()])
    state = optimizer.state_dict()
    longer = nn.Sequential(*make(), nn.Linear(3, 3).double())
    with pytest.raises(osc.ArgumentError, match=r"missing \['5'\](.|\n)*same model and method"):
        build("kfac", longer).load_state_dict(state)
    wider = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    target = build("kfac", wider)
    with pytest.raises(osc.ArgumentError, match=r"'state', 2(.|\n)*shape"):
        target.load_state_dict(state)


KINDS = ("kbfgs", "kbfgs-l", "mbf", "mbf-released", "joint-kfac", "joint-sgdm", "kfac", "sgdm", "adam", "adamw")
PAIRS = [(a, b) for a in KINDS for b in KINDS if a != b]


def _layout(state: dict[str, Any]) -> dict[str, Any]:
    """Names and shapes; of words, the words."""
    return {
        path: getattr(value, "shape", value if isinstance(value, str) else None)
        for path, value in leaves(state).items()
    }


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_a_state_of_another_method_is_refused_unless_it_is_of_the_same_kind(saved: str, loaded: str) -> None:
    model, other = make(), make()
    first, second = build(saved, model), build(loaded, other)
    train(first, model, [data()])
    state = first.state_dict()
    if _layout(state) == _layout(second.state_dict()):  # e.g. adam and adamw
        second.load_state_dict(state)
        return
    before = leaves(second.state_dict())
    with pytest.raises(osc.ArgumentError, match="built for the same model and method"):
        second.load_state_dict(state)
    assert differences(before, leaves(second.state_dict())) == []


def test_bytes_of_the_layer_table_are_the_bytes_of_the_state() -> None:
    for name in METHODS:
        model = make("cnn")
        optimizer = build(name, model)
        train(optimizer, model, batches("cnn", 2))
        tensors = [v for v in leaves(optimizer.state_dict()["state"]).values() if isinstance(v, torch.Tensor)]
        assert sum(row.bytes for row in optimizer.layer_table()) == sum(t.numel() * t.element_size() for t in tensors)
