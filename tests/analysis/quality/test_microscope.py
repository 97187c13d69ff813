"""Counterfactual steps on a problem whose quadratic model is exact."""

from __future__ import annotations

import copy
import math

import osculate as osc
import pytest
import torch
from osculate.analysis.quality.exact_blocks import Probe
from osculate.analysis.quality.microscope import compare_steps, settle
from torch import Tensor, nn


def squared(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum() / len(output)


def linear_case() -> tuple[nn.Module, Probe, list[Probe]]:
    """Linear least squares: the loss is its quadratic model."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2).double()
    batches = [Probe(torch.randn(30, 6).double(), torch.randn(30, 2).double(), squared, "gaussian") for _ in range(4)]
    return model, batches[0], batches[1:]


def built(model: nn.Module, *names: str) -> dict[str, osc.SecondOrder]:
    return {name: osc.build(name, copy.deepcopy(model), likelihood="gaussian") for name in names}


def test_on_a_quadratic_the_prediction_is_exact() -> None:
    model, probe, history = linear_case()
    for quality in compare_steps(built(model, "kbfgs", "kfac", "mbf", "adam"), probe, history):
        assert quality.actual == pytest.approx(quality.predicted, rel=1e-8)
        assert quality.ratio == pytest.approx(1.0) and quality.norm > 0.0
        assert quality.best_multiple == pytest.approx(-quality.slope / quality.curvature)
        assert quality.cosines is not None and quality.cosines[quality.method] == pytest.approx(1.0)


def test_a_gradient_step_has_the_numbers_a_hand_computes() -> None:
    model, probe, _ = linear_case()
    method = osc.Method(momentum=osc.NoMomentum(), defaults={"lr": 0.2})
    loss = squared(model(probe.inputs), probe.targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    homogeneous = torch.cat([probe.inputs, torch.ones(30, 1, dtype=torch.float64)], 1)
    moment = homogeneous.T @ homogeneous / 30
    rows = torch.cat([gradient[:12].reshape(2, 6), gradient[12:].unsqueeze(1)], 1)
    curvature = 0.04 * float((rows @ moment * rows).sum())
    (quality,) = compare_steps({"gd": osc.build(method, copy.deepcopy(model))}, probe)
    assert quality.loss == pytest.approx(loss.item())
    assert quality.slope == pytest.approx(-0.2 * float(gradient.square().sum()))
    assert quality.curvature == pytest.approx(curvature)
    assert quality.norm == pytest.approx(0.2 * float(gradient.norm()))


def test_newtons_step_wants_no_other_length() -> None:
    """Exact curvature of this mini-batch and no damping to speak of: p = -H^-1 g, so the best multiple is 1."""
    model, probe, _ = linear_case()
    dense = osc.Dense(average=osc.MovingAverage(0.0))
    method = osc.Method(dense, osc.ExactGGN(), momentum=osc.NoMomentum(), defaults={"lr": 1.0, "damping": 1e-10})
    (quality,) = compare_steps({"newton": osc.build(method, model, likelihood="gaussian")}, probe)
    assert quality.best_multiple == pytest.approx(1.0, rel=1e-6)
    assert quality.predicted == pytest.approx(-0.5 * quality.slope, rel=1e-6)


def test_settling_leaves_the_parameters_and_teaches_the_method() -> None:
    model, probe, history = linear_case()
    before = [value.detach().clone() for value in model.parameters()]
    optimizer = osc.build("kbfgs", model, lr=0.1, damping=0.3)
    settle(optimizer, [probe, *history])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not torch.equal(optimizer.blocks[0].state.outputs.inverse, torch.eye(2, dtype=torch.float64))


def test_a_method_that_breaks_down_is_reported_beside_the_others() -> None:
    model, probe, _ = linear_case()
    wild = osc.Method(momentum=osc.NoMomentum(), guard=osc.NoGuard(), defaults={"lr": 1e308})
    method = osc.Method(
        osc.Kronecker(osc.HessianActionBFGS(), osc.BFGS(), osc.Schedule(inverses=None)),
        osc.SecantPairs(),
        defaults={"lr": wild.defaults["lr"], "damping": 0.3},
    )
    optimizers = {"wild": osc.build(method, copy.deepcopy(model))} | built(model, "adam")
    broken, fine = compare_steps(optimizers, probe)
    assert broken.trouble and math.isnan(broken.actual) and broken.cosines is None
    assert not fine.trouble and fine.cosines is not None and set(fine.cosines) == {"adam"}


def test_models_must_be_separate_and_equal() -> None:
    model, probe, _ = linear_case()
    with pytest.raises(osc.ArgumentError, match="model of its own"):
        compare_steps({"a": osc.build("sgdm", model), "b": osc.build("adam", model)}, probe)
    optimizers = built(model, "sgdm", "adam")
    nn.init.zeros_(optimizers["adam"].model.weight)
    with pytest.raises(osc.ArgumentError, match="differ"):
        compare_steps(optimizers, probe)
