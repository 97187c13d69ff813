"""Copies and pickles: of the model alone, of model and optimizer together, of the optimizer alone."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import METHODS, batches, build, data, differences, everything, make, plain_step, train
from torch import nn


def whole(model: nn.Module, optimizer: osc.SecondOrder) -> Any:
    return everything(model), optimizer.state_dict()


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_both_lives_its_own_life_and_goes_the_same_way(name: str) -> None:
    torch.manual_seed(0)
    model = make("cnn")
    optimizer = build(name, model)
    train(optimizer, model, batches("cnn", 3))
    twin, other = copy.deepcopy((model, optimizer))
    assert other.model is twin and all(p is q for p, q in zip(twin.parameters(), other.model.parameters(), strict=True))
    before, random = copy.deepcopy(whole(model, optimizer)), torch.get_rng_state()
    expected = train(other, twin, batches("cnn", 3))
    assert differences(before, whole(model, optimizer)) == []  # nothing is shared
    torch.set_rng_state(random)
    assert train(optimizer, model, batches("cnn", 3)) == expected
    assert differences(whole(model, optimizer), whole(twin, other)) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_the_optimizer_copies_its_model_too(name: str) -> None:
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=2))
    other = copy.deepcopy(optimizer)
    assert other.model is not model
    train(other, other.model, batches(count=2))
    train(optimizer, model, batches(count=2))
    assert differences(whole(model, optimizer), whole(other.model, other)) == []


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_the_model_are_nobodys_model(name: str) -> None:
    """A teacher that is copied, run and trained by somebody else leaves no trace in the optimizer."""
    results = []
    for company in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = build(name, model)
        for x, y in batches(count=3):
            if company:
                teacher = copy.deepcopy(model)
                other = torch.optim.SGD(teacher.parameters(), lr=0.1)
                plain_step(other, teacher, 2 * x, y)
                averaged = torch.optim.swa_utils.AveragedModel(model)
                averaged(x).sum().backward()
            train(optimizer, model, [(x, y)])
        results.append(whole(model, optimizer))
    assert differences(*results) == []


def test_statistics_of_a_teacher_between_forward_and_backward_do_not_count() -> None:
    results = []
    for company in (False, True):
        model = make()
        optimizer = build("kfac", model, statistics="empirical")
        teacher = copy.deepcopy(model)
        for x, y in batches(count=3):
            output = model(x)
            if company:
                teacher(5 * x).sum().backward()
            nn.functional.cross_entropy(output, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(whole(model, optimizer))
    assert differences(*results) == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_model_and_optimizer_go_through_a_pickle(name: str, how: str) -> None:
    model = make()
    optimizer = build(name, model)
    train(optimizer, model, batches(count=2))
    if how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        buffer = io.BytesIO()
        torch.save((model, optimizer), buffer)
        buffer.seek(0)
        twin, other = torch.load(buffer, weights_only=False)
    assert other.model is twin
    train(other, twin, batches(count=3))
    train(optimizer, model, batches(count=3))
    assert differences(whole(model, optimizer), whole(twin, other)) == []


def test_a_whole_model_is_pickled_with_its_optimizer_alive() -> None:
    model = make("cnn")
    optimizer = build("kbfgs", model)
    train(optimizer, model, batches("cnn", 1))
    twin = pickle.loads(pickle.dumps(model.eval()))
    x, _ = data("cnn")
    assert torch.equal(model(x), twin(x))
    assert build("kfac", twin).layer_table()


def test_a_copy_under_a_scheduler_steps_itself() -> None:
    """A scheduler puts a wrapper around ``step`` into the optimizer; a copy must not step the original."""
    model = make()
    optimizer = build("sgdm", model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = everything(model)
    other = copy.deepcopy(optimizer)
    train(other, other.model, batches(count=1))
    assert differences(before, everything(model)) == []
    assert differences(before, everything(other.model)) != []


def test_a_copy_can_grow() -> None:
    model = make("partly-frozen")
    optimizer = build("kfac", model)
    train(optimizer, model, batches(count=1))
    twin, other = copy.deepcopy((model, optimizer))
    twin[0].requires_grad_(True)
    other.add_param_group({"params": ["0.*"], "lr": 0.1})
    start = twin[0].weight.detach().clone()
    twin[2].bias.requires_grad_(False)
    train(other, twin, batches(count=1))
    assert not torch.equal(twin[0].weight, start) and len(optimizer.param_groups) == 1
