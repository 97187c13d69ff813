"""Freezing and unfreezing in the middle of a run: blocks sit out, and layers join by torch's add_param_group."""

from __future__ import annotations

import io

import osculate as osc
import pytest
import torch
from small_nets import METHODS, batches, build, cross_entropy, data, differences, everything, leaves, make, train
from torch import nn


def frozen_backbone() -> nn.Module:
    """The MLP with its first two layers frozen."""
    model = make()
    for layer in (model[0], model[2]):  # type: ignore[index]
        layer.requires_grad_(False)
    return model


def joined(name: str, model: nn.Module, **group: float) -> osc.SecondOrder:
    """Three steps of the head alone, then the second layer joins."""
    optimizer = build(name, model)
    train(optimizer, model, batches(count=3))
    model[2].requires_grad_(True)  # type: ignore[index]
    optimizer.add_param_group({"params": model[2].parameters(), **group})  # type: ignore[index]
    return optimizer


@pytest.mark.parametrize("name", METHODS)
def test_unfrozen_layers_join_and_train(name: str) -> None:
    model = frozen_backbone()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=3))
    start, head = everything(model), optimizer.state_dict()["state"]["4"]["updates"]
    optimizer = joined(name, frozen_backbone())
    model = optimizer.model
    losses = train(optimizer, model, [data(samples=64)] * 6)
    assert losses[-1] < losses[0]
    after = everything(model)
    assert torch.equal(after["0.weight"], start["0.weight"]) and not torch.equal(after["2.weight"], start["2.weight"])
    rows = {row.layer: row.part for row in optimizer.layer_table()}
    fresh = {row.layer: row.part for row in build(name, make()).layer_table()}
    assert rows["2"] == fresh["2"]
    state = optimizer.state_dict()["state"]
    assert state["4"]["updates"] == head + 6 and state["2"]["updates"] == 6


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "mbf", "adam"])
def test_a_layer_that_joins_starts_as_one_that_was_there_from_the_first_step(name: str) -> None:
    """The blocks of a layer that joins after three steps equal those of an optimizer that is built then."""
    options = {"statistics": "empirical"} if name == "kfac" else {}
    model = frozen_backbone()
    optimizer = build(name, model, lr=0.0, **options)  # with lr = 0 both see the same gradients
    train(optimizer, model, batches(count=3))
    model[2].requires_grad_(True)  # type: ignore[index]
    optimizer.add_param_group({"params": ["2.*"]})
    later = build(name, model, lr=0.0, **options)
    for x, y in batches(count=4):
        train(optimizer, model, [(x, y)])
        train(later, model, [(x, y)])
    one, other = optimizer.state_dict()["state"]["2"], later.state_dict()["state"]["2"]
    assert one.pop("born") == 3 and other.pop("born") == 0
    assert differences(one, other) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_unfreezing_is_resumed_bit_for_bit(name: str) -> None:
    model = frozen_backbone()
    optimizer = joined(name, model, lr=0.01)
    train(optimizer, model, batches(count=2))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = frozen_backbone()
    other.load_state_dict(saved["model"])
    resumed = build(name, other)
    with pytest.raises(osc.ArgumentError, match="unfrozen"):
        resumed.load_state_dict(saved["optimizer"])
    other[2].requires_grad_(True)  # type: ignore[index]
    resumed.load_state_dict(saved["optimizer"])
    assert len(resumed.param_groups) == 2 and resumed.param_groups[1]["lr"] == 0.01
    train(optimizer, model, batches(count=3))
    train(resumed, other, batches(count=3))
    assert differences((everything(model), optimizer.state_dict()), (everything(other), resumed.state_dict())) == []


@pytest.mark.parametrize("name", METHODS)
def test_the_other_half_of_a_partly_frozen_layer_joins(name: str) -> None:
    """A bias frozen at first (layer 2) and a weight frozen at first (layer 4)."""
    model = make("partly-frozen")
    optimizer = build(name, model)
    train(optimizer, model, batches(count=2))
    start = everything(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if n in ("2.bias", "4.weight")]})
    model[0].requires_grad_(False)  # type: ignore[index]
    losses = train(optimizer, model, [data(samples=64)] * 5)
    assert losses[-1] < losses[0]
    changed = {key for key, value in everything(model).items() if not torch.equal(value, start[key])}
    assert changed == {"2.weight", "2.bias", "4.weight", "4.bias"}
    served = [f"{row.layer.split(':')[0]}.{p}" for row in optimizer.layer_table() for p in row.parameters]
    assert sorted(served) == ["2.bias", "2.weight", "4.bias", "4.weight"]


def test_a_parameter_that_nobody_owns_is_never_silently_untrained() -> None:
    model = frozen_backbone()
    optimizer = build("kfac", model)
    train(optimizer, model, batches(count=1))
    before = everything(model), leaves(optimizer.state_dict()["state"])
    model[2].requires_grad_(True)  # type: ignore[index]
    with pytest.raises(osc.ArgumentError, match=r"2.weight, 2.bias(.|\n)*add_param_group"):
        train(optimizer, model, batches(count=1))
    assert differences(before, (everything(model), leaves(optimizer.state_dict()["state"]))) == []
    optimizer.zero_grad()
    model[2].requires_grad_(False)  # type: ignore[index]
    model.zero_grad()
    train(optimizer, model, batches(count=1))


def test_groups_that_cannot_join_are_refused_and_change_nothing() -> None:
    model = frozen_backbone()
    optimizer = build("kfac", model)
    train(optimizer, model, batches(count=1))
    before = leaves(optimizer.state_dict())
    foreign = nn.Parameter(torch.zeros(1))
    for group, message in (
        ({"params": [foreign]}, "no parameter of the model"),
        ({"params": ["2.*"]}, "'2.weight' is frozen(.|\n)*requires_grad_"),
        ({"params": ["4.*"]}, "'4.weight' is in a group"),
        ({"params": []}, "empty"),
    ):
        with pytest.raises(osc.ArgumentError, match=message):
            optimizer.add_param_group(group)
    model[2].requires_grad_(True)  # type: ignore[index]
    with pytest.raises(osc.ArgumentError, match="lr must be"):
        optimizer.add_param_group({"params": ["2.*"], "lr": -1.0})
    assert len(optimizer.param_groups) == 1 and len(optimizer.layer_table()) == 1
    assert differences(before, leaves(optimizer.state_dict())) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_frozen_for_a_while_sits_out_and_comes_back(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=2))
    model[2].requires_grad_(False)  # type: ignore[index]
    kept, momentum = everything(model), leaves(optimizer.state_dict()["state"]["2"]["momentum"])
    train(optimizer, model, batches(count=3))
    after = everything(model)
    assert torch.equal(after["2.weight"], kept["2.weight"]) and torch.equal(after["2.bias"], kept["2.bias"])
    assert not torch.equal(after["0.weight"], kept["0.weight"])
    assert differences(momentum, leaves(optimizer.state_dict()["state"]["2"]["momentum"])) == []
    model[2].requires_grad_(True)  # type: ignore[index]
    losses = train(optimizer, model, [data(samples=64)] * 6)
    assert losses[-1] < losses[0] and not torch.equal(everything(model)["2.weight"], kept["2.weight"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_half_a_layer_frozen_for_a_while(name: str, part: str) -> None:
    """The other half trains on: a layer is never silently left out because one of its parameters is frozen."""
    model = make()
    optimizer = build(name, model, weight_decay=0.1)
    train(optimizer, model, batches(count=2))
    model.get_parameter(f"2.{part}").requires_grad_(False)
    kept = everything(model)
    train(optimizer, model, batches(count=3))
    after = everything(model)
    other = "bias" if part == "weight" else "weight"
    assert torch.equal(after[f"2.{part}"], kept[f"2.{part}"])
    assert not torch.equal(after[f"2.{other}"], kept[f"2.{other}"])
    model.get_parameter(f"2.{part}").requires_grad_(True)
    train(optimizer, model, batches(count=2))
    assert not torch.equal(everything(model)[f"2.{part}"], kept[f"2.{part}"])
    assert all(torch.isfinite(value).all() for value in everything(model).values())


def test_a_frozen_parameter_with_an_old_gradient_stays() -> None:
    model = make()
    optimizer = build("adamw", model, weight_decay=0.1)
    x, y = data()
    for _ in range(2):
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        model[2].requires_grad_(False)  # type: ignore[index]
        kept = model[2].weight.detach().clone()  # type: ignore[index]
    assert torch.equal(model[2].weight, kept)  # type: ignore[index]
