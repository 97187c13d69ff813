"""Parameter groups as torch users write them: values per group, one lr per layer, every scheduler."""

from __future__ import annotations

import inspect
from typing import Any

import osculate as osc
import pytest
import torch
from small_nets import METHODS, batches, build, closure_of, data, differences, everything, flat, make, plain_step, train
from torch import nn
from torch.optim import lr_scheduler

TORCH = {
    "sgdm": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.3),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.3),
}


@pytest.mark.parametrize("name", TORCH)
def test_groups_do_what_torch_does(name: str) -> None:
    """A smaller lr for the first layer, no decay on biases: the same trajectory as torch's own optimizer."""
    ours, theirs = make(), make()
    groups = [
        {"params": ["0.weight"], "lr": 0.01},
        {"params": ["0.bias"], "lr": 0.01, "weight_decay": 0.0},
        {"params": ["2.bias", "4.bias"], "weight_decay": 0.0},
    ]
    decay = 0.0 if name == "sgdm" else 0.3
    optimizer = osc.build(name, ours, lr=0.05, weight_decay=decay, groups=groups)
    named = dict(theirs.named_parameters())
    split = [{**group, "params": [named[n] for n in group["params"]]} for group in groups]
    taken = {id(p) for group in split for p in group["params"]}
    other = TORCH[name]([*split, {"params": [p for p in theirs.parameters() if id(p) not in taken]}])
    for x, y in batches(count=6):
        plain_step(optimizer, ours, x, y)
        plain_step(other, theirs, x, y)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_equal_groups_are_one_group(name: str) -> None:
    results = []
    for groups in (None, [{"params": ["0.*"]}, {"params": ["2.weight"]}, {"params": ["2.bias"]}]):
        model = make()
        optimizer = build(name, model, groups=groups)
        train(optimizer, model, batches(count=4))
        results.append((everything(model), optimizer.state_dict()["state"]))
    assert differences(*results) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_whose_group_has_lr_zero_stands_still_and_the_others_move_as_before(name: str) -> None:
    results = []
    for lr in (None, 0.0):
        model = make()
        groups = [{"params": ["2.*"]} | ({} if lr is None else {"lr": lr})]
        optimizer = build(name, model, groups=groups)
        start = everything(model)
        train(optimizer, model, batches(count=1))  # later batches see another loss
        results.append(everything(model))
    assert torch.equal(results[1]["2.weight"], start["2.weight"])
    assert torch.equal(results[0]["0.weight"], results[1]["0.weight"])


@pytest.mark.parametrize("name", ["kfac", "mbf", "kbfgs"])
def test_damping_of_a_group_reaches_its_layers_only(name: str) -> None:
    results = []
    for groups in ([{"params": ["4.*"]}], [{"params": ["4.*"], "damping": 0.9}]):
        model = make()
        optimizer = build(name, model, lr=0.01, groups=groups)
        train(optimizer, model, batches(count=1))
        results.append(everything(model))
    assert torch.equal(results[0]["0.weight"], results[1]["0.weight"])
    assert not torch.equal(results[0]["4.weight"], results[1]["4.weight"])
    damping = optimizer.last_report.damping
    assert isinstance(damping, dict) and damping["4"] == 0.9 and optimizer.last_report.as_dict()["damping"] == damping


def test_patterns_parameters_and_names_choose_the_same() -> None:
    for params in (["0.*"], "0.*", "named", "objects", "tensor by tensor"):
        model = make()
        chosen: Any = {
            "named": model[0].named_parameters(),  # type: ignore[index]
            "objects": model[0].parameters(),  # type: ignore[index]
            "tensor by tensor": [model[0].weight, "0.bias"],  # type: ignore[index]
        }.get(params if isinstance(params, str) else "", params)
        optimizer = build("kfac", model, groups=[{"params": chosen, "lr": 0.5, "name": "first"}])
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
        assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["name"] == "first"
        assert optimizer.param_groups[0]["params"][0] is model[0].weight  # type: ignore[index]


def test_groups_that_cannot_be_are_refused_with_the_way_out() -> None:
    foreign = nn.Parameter(torch.zeros(2))
    cases: list[tuple[Any, str]] = [
        ([{"params": ["0.*"], "weigth_decay": 0.1}], r"'weigth_decay'; did you mean 'weight_decay'"),
        ([{"params": ["0.*"], "momentum": 0.1}], r"'momentum'"),
        ([{"lr": 0.1}], r"'params'"),
        ([{"params": ["0.wieght"]}], r"'0.wieght'; did you mean '0.weight'"),
        ([{"params": [foreign]}], r"no parameter of the model"),
        ([{"params": ["0.*"]}, {"params": ["*.bias"]}], r"'0.bias' is in groups\[0\] and in groups\[1\]"),
        ([{"params": ["0.bias"], "lr": 0.1}], r"layer '0'(.|\n)*different lr(.|\n)*same lr"),
        ([{"params": ["0.bias"], "damping": 0.1}], r"layer '0'(.|\n)*different damping"),
        ([{"params": ["0.*"], "lr": -0.1}], r"lr must be(.|\n)*-0.1"),
    ]
    for groups, message in cases:
        with pytest.raises(osc.ArgumentError, match=message):
            build("kfac", make(), groups=groups)
    frozen = make("partly-frozen")
    with pytest.raises(osc.ArgumentError, match="no trainable parameter"):
        build("kfac", frozen, groups=[{"params": ["0.*"]}])


def test_a_scheduler_that_tears_a_layer_apart_is_refused_by_the_step() -> None:
    model = make()
    optimizer = build("kfac", model, groups=[{"params": ["0.bias"], "weight_decay": 0.0}])
    train(optimizer, model, batches(count=1))
    before = everything(model)
    optimizer.param_groups[0]["lr"] *= 2
    with pytest.raises(osc.ArgumentError, match=r"layer '0'(.|\n)*different lr"):
        train(optimizer, model, batches(count=1))
    assert differences(before, everything(model)) == []


def test_penalty_counts_each_group_with_its_own_decay() -> None:
    model = make()
    optimizer = build("adam", model, weight_decay=0.4, groups=[{"params": ["*.bias"], "weight_decay": 0.0}])
    expected = 0.2 * sum(float(m.weight.detach().square().sum()) for m in model if isinstance(m, nn.Linear))  # type: ignore[attr-defined]
    assert float(optimizer.penalty()) == pytest.approx(expected, rel=1e-12)


GROUPS = [{"params": ["0.*"], "lr": 0.02}]
SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda k: 1 / (1 + k), lambda k: 0.9**k]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda k: 0.9, lambda k: 0.8]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1e3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.02, 0.05], total_steps=8, cycle_momentum=False),
}


def test_the_table_has_every_scheduler_of_torch() -> None:
    def is_scheduler(value: object) -> bool:
        base = lr_scheduler.LRScheduler
        return inspect.isclass(value) and issubclass(value, base) and not value.__name__.startswith(("_", "LRS"))

    assert {name for name, value in vars(lr_scheduler).items() if is_scheduler(value)} == set(SCHEDULERS)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", ["kfac", "joint-sgdm", "kbfgs"])
def test_every_scheduler_of_torch_drives_every_group(name: str, kind: str) -> None:
    """Each layer moves by what its own group's lr says at that moment, as with lr set by hand."""
    model, twin = make(), make()
    optimizer, other = build(name, model, lr=0.05, groups=GROUPS), build(name, twin, lr=0.05, groups=GROUPS)
    scheduler = SCHEDULERS[kind](optimizer)
    seen = []
    for x, y in batches(count=5):
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, lr in zip(other.param_groups, rates, strict=True):
            group["lr"] = lr
        loss = optimizer.step(closure_of(optimizer, model, x, y))
        other.step(closure_of(other, twin, x, y))
        assert torch.equal(flat(model), flat(twin))
        scheduler.step(loss) if kind == "ReduceLROnPlateau" else scheduler.step()
        seen.append(rates)
    for column in zip(*seen, strict=True):
        assert len(set(column)) > 1


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_schedulers_that_cycle_the_momentum_say_that_there_is_none_to_cycle(kind: str) -> None:
    optimizer = build("kfac", make())
    with pytest.raises(ValueError, match="cycle_momentum"):
        if kind == "OneCycleLR":
            lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
        else:
            lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-1)


def test_groups_are_saved_and_loaded() -> None:
    model, other = make(), make()
    first = build("kfac", model, groups=GROUPS)
    train(first, model, batches(count=2))
    first.param_groups[0]["lr"] = 0.007
    second = build("kfac", other, groups=GROUPS)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.007
    train(first, model, [data()])
    train(second, other, [data()])
    assert differences((everything(model), first.state_dict()), (everything(other), second.state_dict())) == []
    with pytest.raises(osc.ArgumentError, match="groups"):
        build("kfac", make(), groups=[{"params": ["2.*"]}]).load_state_dict(first.state_dict())
