"""What a method does that nobody tuned: a network with BatchNorm, and the forms of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import osculate as osc
import pytest
import torch
from osculate.experiments.data.shipped import load_digits
from osculate.experiments.problems.problem import PUBLISHED
from osculate.stepsize import ConstantStep, RelativeBound
from torch import Tensor, nn
from torch.nn import functional


def normalised() -> nn.Module:
    """A small convolutional network that normalises after every convolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


def images() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    pixels = torch.from_numpy(digits.train_images[:300].copy()).float().reshape(-1, 1, 8, 8) / 16.0
    return pixels, torch.from_numpy(digits.train_labels[:300].copy()).long()


def trained(name: str, **options: Any) -> float:
    """The loss after one epoch, 12 steps."""
    model, (x, y) = normalised(), images()
    optimizer = osc.build(name, model, likelihood="categorical", **options)

    def closure_of(inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        return closure

    for inputs, targets in zip(x.split(25), y.split(25), strict=True):
        optimizer.step(closure_of(inputs, targets))
    with torch.no_grad():
        return float(functional.cross_entropy(model(x), y))


def test_defaults_train_a_network_with_batchnorm() -> None:
    """One epoch: MBF at its earlier default (1e-3, 0.3) ended where default SGD ends."""
    plain = trained("sgdm")
    earlier = trained("mbf", lr=1e-3, damping=0.3, units="absolute", limit=math.inf)
    assert earlier > plain
    assert trained("mbf") < 0.85 * plain
    assert trained("kfac") < 0.7 * plain


def test_the_papers_forms_are_options() -> None:
    plain = osc.registry.method("mbf", units="absolute", limit=math.inf)
    assert plain.damping == osc.ConstantDamping() and plain.step_size == ConstantStep()
    assert plain.defaults["damping"] == 0.3 and plain.defaults["lr"] == 1e-3
    released = osc.registry.method("mbf-released", limit=math.inf)
    assert released.damping == osc.ConstantDamping() and released.step_size == ConstantStep()
    for name in PUBLISHED:
        decrease = math.inf if name == "shampoo" else 0.5
        assert osc.registry.method(name).step_size == RelativeBound(limit=0.05, decrease=decrease), name
        assert osc.registry.method(name, limit=math.inf).step_size == ConstantStep(), name
    with pytest.raises(osc.ArgumentError, match="pass largest=4096"):
        osc.registry.method("ngd-exact", limit=4096)
    with pytest.raises(osc.ArgumentError, match="units must be one of curvature, absolute, got 'mean'"):
        osc.registry.method("mbf", units="mean")
    with pytest.raises(osc.ArgumentError, match="limit"):
        osc.registry.method("kfac", limit=0.0)


BOUNDED = sorted(PUBLISHED)


@pytest.mark.parametrize("name", sorted(set(BOUNDED) - {"mbf", "mbf-released"}))  # these are slower than the bound
def test_a_layer_of_one_number_can_change_its_sign(name: str) -> None:
    """y = -2 x from w = 1: a bound that shrinks with the layer would end at 0."""
    torch.manual_seed(0)
    model, x = nn.Linear(1, 1, bias=False).double(), torch.randn(64, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = osc.build(name, model, likelihood=osc.Gaussian(weight=1.0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (model(x) + 2 * x).square().mean()
        loss.backward()
        return loss

    for _ in range(400):
        optimizer.step(closure)
    assert float(model.weight.detach()) < -0.5


@pytest.mark.parametrize("name", BOUNDED)
def test_a_layer_of_zeros_takes_bounded_steps_and_leaves(name: str) -> None:
    """Of a last layer that begins at zero every step is within the limit of what ``nn.Linear`` would begin with."""
    model, (x, y) = normalised(), images()
    last = model[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    optimizer = osc.build(name, model, likelihood="categorical")
    usual = math.sqrt((last.weight.numel() + last.bias.numel()) / (3 * 192))
    before = after = math.inf
    for step, (inputs, targets) in enumerate(zip(x.repeat(3, 1, 1, 1).split(25), y.repeat(3).split(25), strict=True)):

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        after = float(optimizer.step(closure))
        before = after if step == 0 else before
        norm = math.hypot(*(float(parameter.detach().norm()) for parameter in last.parameters()))
        assert norm <= 0.1 * usual * 0.05 * (step + 1) * 1.001 or norm <= 0.1 * usual * 1.05 ** (step + 1)
    assert after < 0.95 * before
