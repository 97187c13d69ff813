"""The first-order baselines are torch.optim's own to rounding."""

from __future__ import annotations

from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import batches, build, flat, make, plain_step

STEPS = 20


def follow(name: str, torch_class: Any, ours: dict[str, Any], theirs: dict[str, Any], net: str = "cnn") -> None:
    """Both optimizers on the same data; every step within 1e-10."""
    models = [make(net, seed=2), make(net, seed=2)]
    if net == "cnn":  # in front of BatchNorm a bias has no gradient but rounding, which these methods blow up
        for model in models:
            model.get_parameter("0.bias").requires_grad_(False)
    optimizers: list[torch.optim.Optimizer] = [
        build(name, models[0], **ours),
        torch_class(models[1].parameters(), **theirs),
    ]
    for x, y in batches(net, STEPS, samples=8):
        for model, optimizer in zip(models, optimizers, strict=True):
            with torch.random.fork_rng(devices=[]):  # the same dropout masks
                plain_step(optimizer, model, x, y)
        torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("net", ["cnn", "tokens"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "torch_class", "extra"),
    [
        ("sgdm", torch.optim.SGD, {"momentum": 0.9}),
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
        ("adagrad", torch.optim.Adagrad, {}),
        ("rmsprop", torch.optim.RMSprop, {}),
    ],
)
def test_baseline_equals_torch(
    name: str, torch_class: Any, extra: dict[str, Any], weight_decay: float, net: str
) -> None:
    common = {"lr": 0.01, "weight_decay": weight_decay}
    follow(name, torch_class, common, common | extra, net)


def test_default_numbers_are_those_of_torch_but_for_lr() -> None:
    """Three times the lr: at torch's, Adam ends behind default SGD-momentum on too many of the shipped problems."""
    methods = osc.registry.methods()
    for name, torch_class in (
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("adagrad", torch.optim.Adagrad),
    ):
        defaults = torch_class([torch.zeros(1, requires_grad=True)]).defaults
        assert methods[name].defaults["lr"] == pytest.approx(3 * defaults["lr"]), name
        assert methods[name].defaults["weight_decay"] == defaults["weight_decay"], name


@settings(max_examples=10)
@given(
    lr=st.floats(1e-4, 0.3),
    decay=st.floats(0.0, 0.3),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    epsilon=st.sampled_from([1e-8, 1e-4, 1e-2]),
)
def test_adam_and_adamw_with_any_numbers(lr: float, decay: float, beta1: float, beta2: float, epsilon: float) -> None:
    numbers = {"lr": lr, "weight_decay": decay}
    ours = numbers | {"beta1": beta1, "beta2": beta2, "epsilon": epsilon}
    theirs = numbers | {"betas": (beta1, beta2), "eps": epsilon}
    follow("adam", torch.optim.Adam, ours, theirs, "mlp")
    follow("adamw", torch.optim.AdamW, ours, theirs, "mlp")


@settings(max_examples=10)
@given(lr=st.floats(1e-4, 0.1), decay=st.floats(0.0, 0.1), momentum=st.floats(0.0, 0.99), rate=st.floats(0.0, 0.999))
def test_sgd_and_rmsprop_with_any_numbers(lr: float, decay: float, momentum: float, rate: float) -> None:
    numbers = {"lr": lr, "weight_decay": decay}
    follow("sgdm", torch.optim.SGD, numbers | {"momentum": momentum}, numbers | {"momentum": momentum}, "mlp")
    follow(
        "rmsprop", torch.optim.RMSprop, numbers | {"decay": rate, "epsilon": 1e-6},
        numbers | {"alpha": rate, "eps": 1e-6}, "mlp",
    )  # fmt: skip


def test_schedules_agree_with_torch() -> None:
    models = [make(), make()]
    optimizers = [build("sgdm", models[0], lr=0.1), torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10) for optimizer in optimizers]
    for x, y in batches(count=8):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            plain_step(optimizer, model, x, y)
            scheduler.step()
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-10, atol=1e-10)
