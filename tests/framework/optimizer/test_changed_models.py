"""Models that change after the optimizer was built: followed where that is right, else refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import osculate as osc
import pytest
import torch
from small_nets import METHODS, batches, build, closure_of, data, differences, everything, make, plain_step, train
from torch import nn
from torch.nn.utils import prune as pruning

SOME = ("sgdm", "adam", "kfac", "kbfgs", "lw-sgdm", "soap")


def replace_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(5, 4)


def replace_by_the_same_weights(model: nn.Sequential) -> None:
    model[2] = copy.deepcopy(model[2])


def share_the_old_weights(model: nn.Sequential) -> None:
    fresh = nn.Linear(5, 4)
    fresh.weight, fresh.bias = model[2].weight, model[2].bias  # type: ignore[assignment]
    model[2] = fresh


def remove_layer(model: nn.Sequential) -> None:
    model[2] = nn.Identity()
    model[4] = nn.Linear(5, 3)


def create_weight_again(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.randn(5, 6))


def create_bias_again(model: nn.Sequential) -> None:
    model[4].bias = nn.Parameter(torch.zeros(3))


def assign(model: nn.Sequential) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def parametrise(model: nn.Sequential) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[0])


def prune(model: nn.Sequential) -> None:
    pruning.l1_unstructured(model[0], "weight", 2)


CHANGES: dict[Callable[[nn.Sequential], None], tuple[str, ...]] = {
    replace_layer: ("2.weight", "2.bias", "no longer in the model"),
    replace_by_the_same_weights: ("2.weight", "no longer in the model"),
    share_the_old_weights: ("2.weight", "no longer in the model"),
    remove_layer: ("2.weight", "4.bias", "no longer in the model"),
    create_weight_again: ("0.weight", "created again"),
    create_bias_again: ("4.bias", "created again"),
    assign: ("0.weight", "4.bias", "assign=True"),
    parametrise: ("0.weight", "created again"),
    prune: ("0.weight", "created again"),
    nn.Module.double: ("0.weight", "float32", "float64"),
    nn.Module.half: ("0.weight", "float32", "float16"),
    lambda model: model[2].to(torch.bfloat16): ("2.weight", "float32", "bfloat16"),
}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_is_trained_is_refused_by_name(name: str, change: Callable[[nn.Module], None]) -> None:
    model = make(dtype=torch.float32)
    optimizer = build(name, model)
    train(optimizer, model, batches(count=2, dtype=torch.float32))
    x, y = data(dtype=torch.float32)
    change(model)
    if (
        CHANGES[change][-1] in ("float16", "bfloat16") and not optimizer.needs_closure
    ):  # no forward pass of mixed layers; the gradients suffice
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    elif not optimizer.needs_closure:
        x = x.to(model[0].weight.dtype)
        nn.functional.cross_entropy(model(x), y).backward()
    before = everything(model)
    state = {block.key: copy.deepcopy(block.to_dict()) for block in optimizer.blocks}
    with pytest.raises(osc.ArgumentError) as caught:
        optimizer.step(closure_of(optimizer, model, x, y) if optimizer.needs_closure else None)
    for word in (*CHANGES[change], "no parameter and no state was changed", "build"):
        assert word in str(caught.value)
    assert differences(before, everything(model)) == []
    assert differences(state, {block.key: block.to_dict() for block in optimizer.blocks}) == []
    for question in (optimizer.state_dict, lambda: optimizer.warm_start([lambda: model(x)])):
        with pytest.raises(osc.ArgumentError):
            question()
    optimizer.close()
    if change is not parametrise and change is not prune:
        model.float()
        train(build(name, model), model, batches(count=1, dtype=torch.float32))  # the way out


@pytest.mark.parametrize("name", SOME)
def test_a_layer_that_joins_is_refused_until_it_is_given_to_the_optimizer(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=1))
    model.insert(1, nn.Linear(5, 5).double())
    before = everything(model)
    with pytest.raises(osc.ArgumentError, match=r"1\.weight, 1\.bias have a gradient.*add_param_group"):
        train(optimizer, model, batches(count=1))
    assert differences(before, everything(model)) == []
    optimizer.add_param_group({"params": ["1.*"]})
    train(optimizer, model, batches(count=2))
    assert not torch.equal(before["1.weight"], everything(model)["1.weight"])


@pytest.mark.parametrize("name", METHODS)
def test_changes_that_leave_the_layers_alone_are_followed(name: str) -> None:
    results = []
    for changed in (False, True):
        torch.manual_seed(0)
        model = make("called-twice")
        optimizer = build(name, model)
        train(optimizer, model, batches(count=1))
        if changed:
            model.note, model.idea = nn.Identity(), nn.Linear(2, 2).requires_grad_(False)
            model.inner = nn.Sequential(model.inner)  # moved into another module, the same one all the same
            model.float().double()
        else:
            for parameter in model.parameters():
                parameter.data = parameter.data.float().double()
        train(optimizer, model, batches(count=2))
        results.append([parameter.detach().clone() for parameter in list(model.parameters())[:4]])
    assert differences(*results) == []


def test_a_frozen_parameter_may_be_created_again() -> None:
    model = make("partly-frozen")
    optimizer = build("kfac", model)
    train(optimizer, model, batches(count=1))
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight), requires_grad=False)
    train(optimizer, model, batches(count=1))
    optimizer.zero_grad()
    model[0].weight.requires_grad_(True)
    with pytest.raises(osc.ArgumentError, match=r"0\.weight have a gradient"):
        train(optimizer, model, batches(count=1))


def test_a_probe_beside_the_model_that_another_optimizer_trains() -> None:
    model = make("called-twice")
    optimizer = build("sgdm", model)
    model.probe = nn.Linear(6, 3).double()
    x, y = data()
    plain_step(torch.optim.SGD(model.probe.parameters(), lr=0.1), model.probe, x, y)
    model.probe.zero_grad()
    train(optimizer, model, batches(count=1))


def test_copies_look_at_their_own_model() -> None:
    model = make()
    optimizer = build("kfac", model)
    train(optimizer, model, batches(count=1))
    twin, other = copy.deepcopy((model, optimizer))
    replace_layer(model)
    train(other, twin, batches(count=1))
    replace_layer(twin)
    with pytest.raises(osc.ArgumentError, match="no longer in the model"):
        train(other, twin, batches(count=1))
