"""What must not matter: names of layers, order of samples, sum or mean, seeds and unused options."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from osculate.preconditioners.structures import spectral
from small_nets import METHODS, batches, build, closure_of, cross_entropy, data, differences, flat, leaves, make, train
from torch import nn

UNSAMPLED = tuple(name for name, entry in osc.registry.methods().items() if not entry.factory().needs_likelihood)
NAMES = st.lists(
    st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=6), min_size=3, max_size=3, unique=True
)


def renamed(names: list[str], depth: int) -> nn.Module:
    """The MLP of the other tests with other names, nested ``depth`` modules deep."""
    linear = [module for module in make() if isinstance(module, nn.Linear)]  # type: ignore[attr-defined]
    first, second, third = (f"layer_{name}" for name in names)
    model: nn.Module = nn.Sequential(
        OrderedDict([(first, linear[0]), ("r", nn.ReLU()), (second, linear[1]), ("t", nn.Tanh()), (third, linear[2])])
    )
    for level in range(depth):
        model = nn.Sequential(OrderedDict([(f"inner{level}", model)]))
    return model


@settings(max_examples=3)
@given(names=NAMES, depth=st.integers(0, 2))
def test_renamed_layers_give_the_same_trajectory(names: list[str], depth: int) -> None:
    for name in METHODS:
        model, other = make(), renamed(names, depth)
        train(build(name, model), model, batches(count=3))
        train(build(name, other), other, batches(count=3))
        assert torch.equal(flat(model), flat(other)), name


@pytest.mark.parametrize("name", UNSAMPLED)
def test_permuted_samples_give_the_same_trajectory(name: str) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    model, other = make(), make()
    options = {"lr": 1e-3} if name == "soap" else {}  # rounding decides eigenvectors of what has no gradient
    train(build(name, model, **options), model, batches(count=5))
    train(build(name, other, **options), other, [(x[order], y[order]) for x, y in batches(count=5)])
    torch.testing.assert_close(flat(other), flat(model), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["kfac", "kbfgs", "kbfgs-l", "joint-kfac", "joint-kfac-momentum", "lw-sgdm"])
def test_sum_and_mean_measure_the_same_curvature(name: str) -> None:
    """With the summed loss the gradient is N times the mean one; statistics per sample must not see the difference."""
    model, other = make(), make()
    first, second = build(name, model), build(name, other, loss_reduction="sum")
    x, y = data()
    first.step(closure_of(first, model, x, y))
    other.load_state_dict(model.state_dict())  # so that a look back sees the same point as well
    second = build(name, other, loss_reduction="sum", lr=0.0)
    first = build(name, model, lr=0.0)
    first.step(closure_of(first, model, x, y))
    second.step(closure_of(second, other, x, y, "sum"))
    for key, block in first.state_dict()["state"].items():
        torch.testing.assert_close(
            second.state_dict()["state"][key]["state"], block["state"], rtol=1e-9, atol=1e-12, msg=key
        )


@pytest.mark.parametrize(
    ("name", "options"), [("sgdm", {}), ("kbfgs", {}), ("kbfgs-l", {}), ("kfac", {"statistics": "empirical"})]
)
def test_sum_and_mean_give_the_same_trajectory(name: str, options: dict[str, Any]) -> None:
    """The gradient of the summed loss is N times as long, so the same trajectory takes lr / N and nothing else."""
    results = []
    for reduction, lr in (("mean", 0.1), ("sum", 0.1 / 16)):
        model = make()
        optimizer = build(name, model, lr=lr, loss_reduction=reduction, **options)
        for x, y in batches(count=4):
            optimizer.step(closure_of(optimizer, model, x, y, reduction))
        results.append(flat(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["joint-kfac", "joint-kfac-momentum", "joint-kfac-noise-aware", "joint-kbfgs", "joint-sgdm", "lw-sgdm"]
)
def test_steps_that_a_method_chooses_are_those_of_the_mean(name: str) -> None:
    """Slopes of the summed loss are N times as large, and so is the curvature of what the rule minimises."""
    results = []
    for reduction in ("mean", "sum"):
        model = make()
        optimizer = build(name, model, loss_reduction=reduction)
        for x, y in batches(count=6):
            optimizer.step(closure_of(optimizer, model, x, y, reduction))
        results.append(flat(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(UNSAMPLED)))
def test_the_seed_decides_the_sampled_labels_and_nothing_else_does(name: str) -> None:
    results = {}
    for key, seed, global_seed in (("a", 0, 0), ("b", 0, 99), ("c", 1, 0)):
        torch.manual_seed(global_seed)
        model = make()
        optimizer = build(name, model, seed=seed)
        train(optimizer, model, batches(count=3))
        results[key] = leaves((flat(model), optimizer.state_dict()))
    assert differences(results["a"], results["b"]) == []
    assert differences(results["a"], results["c"])


@pytest.mark.parametrize("name", UNSAMPLED)  # labels are drawn in the model's own precision
def test_single_precision_stays_near_double(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a damping above rounding: one far below it (SOAP's epsilon) lets rounding errors grow to whole steps.

    Muon on a device without units for bfloat16, where it would iterate in that.
    """
    monkeypatch.setattr(spectral, "has_bfloat16_units", lambda device: False)
    results = []
    default = osc.registry.methods()[name].defaults["damping"]
    damping = max(default, 0.1) if default else 0.0
    for dtype in (torch.float64, torch.float32):
        model = make(dtype=dtype)
        optimizer = build(name, model, damping=damping)
        train(optimizer, model, batches(count=3, samples=64, dtype=dtype))
        assert all(value.dtype == dtype for value in (p for p in model.parameters()))
        results.append(flat(model).double())
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_two_optimizers_on_two_parts_of_a_model_do_not_disturb_each_other() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.encoder(x)))

    torch.manual_seed(0)
    model = Two().double()
    optimizers = [build("mbf", model.encoder), build("sgdm", model.head)]
    before = flat(model)
    for x, y in batches(count=3):
        cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert not torch.equal(flat(model), before)
    optimizers[0].close()
    model(data()[0])
