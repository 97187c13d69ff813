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
