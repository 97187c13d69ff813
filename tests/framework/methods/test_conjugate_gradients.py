"""Joint steps along last steps, where the answer is known: conjugate gradients, linear models, the transcription."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import osculate as osc
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.last_step import LastStepRule
from reference.layerwise import MomentumDirection
from reference.network import GAUSSIAN, Batch, Layer, Parameters
from small_nets import flat
from torch import Tensor, nn

seeds = st.integers(0, 2**31)


def exact(**options: Any) -> osc.Method:
    """Gradient directions, exact curvature, no average and no ridge."""
    rule = osc.JointWithLastStep(osc.ExactHessian(), decay=0.0, relative_ridge=0.0, **options)
    return osc.Method(momentum=osc.NoMomentum(), step_size=rule, defaults={"lr": 1.0})


def least_squares(seed: int, samples: int = 20, inputs: int = 8) -> tuple[Tensor, Tensor]:
    """Singular values between 1 and 1/3, and targets."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((samples, inputs)))
    right, _ = np.linalg.qr(generator.standard_normal((inputs, inputs)))
    x = left * np.sqrt(samples) * np.geomspace(1.0, 1 / 3, inputs) @ right.T
    return torch.from_numpy(x), torch.from_numpy(generator.standard_normal((samples, 1)))


def squares(optimizer: osc.SecondOrder, model: nn.Module, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum() / len(x)
        loss.backward()
        return loss

    return closure


@settings(max_examples=10)
@given(seeds)
def test_one_layer_with_exact_curvature_is_conjugate_gradients(seed: int) -> None:
    x, y = least_squares(seed)
    model = nn.Linear(8, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = osc.build(exact(), model)
    H, theta = x.T @ x / len(x), torch.zeros(8, 1).double()
    residual = x.T @ y / len(x)
    direction = residual.clone()
    for _ in range(6):
        optimizer.step(squares(optimizer, model, x, y))
        size = residual.square().sum() / (direction * (H @ direction)).sum()
        theta, left = theta + size * direction, residual - size * H @ direction
        direction = left + left.square().sum() / residual.square().sum() * direction
        residual = left
        assert torch.allclose(model.weight.detach().T, theta, rtol=1e-8, atol=1e-8)
    assert float(residual.norm()) < 1e-2 * float((x.T @ y / len(x)).norm())


class Sum(nn.Module):
    """Two layers whose outputs add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, :5]) + self.second(x[:, 4:])


@settings(max_examples=10)
@given(seeds)
def test_on_a_linear_model_no_joint_step_from_the_same_point_is_better(seed: int) -> None:
    x, y = least_squares(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, other = Sum().double(), Sum().double()
    optimizer = osc.build(exact(sign=osc.Unrestricted()), model)
    rule = osc.JointLayerwise(osc.ExactHessian(), decay=0.0, relative_ridge=0.0, sign=osc.Unrestricted())
    for _ in range(6):
        other.load_state_dict(model.state_dict())
        shorter = osc.build(replace(exact(), step_size=rule), other)
        shorter.step(squares(shorter, other, x, y))
        optimizer.step(squares(optimizer, model, x, y))
        with torch.no_grad():
            found, bound = ((net(x) - y).square().sum() for net in (model, other))
        assert found <= bound * (1 + 1e-8)


class Recorded(osc.Gaussian):
    """Labels that were drawn before."""

    def __init__(self, noise: Tensor):
        self.noise, self.used = noise, 0

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self.used += 1
        return output + self.noise[self.used - 1]


@settings(max_examples=10)
@given(seeds, st.sampled_from([0.0, 0.6]))
def test_a_run_is_the_transcription(seed: int, decay: float) -> None:
    generator, sizes, steps = np.random.default_rng(seed), (4, 3, 2), 5
    layers = [Layer("dense", True, ("tanh",)), Layer("dense", True, ())]
    parameters: Parameters = [
        {"W": 0.5 * generator.standard_normal((o, i)), "b": 0.3 * generator.standard_normal(o)}
        for i, o in itertools.pairwise(sizes)
    ]
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for module, entry in zip((model[0], model[2]), parameters, strict=True):
            module.weight.copy_(torch.from_numpy(entry["W"]))
            module.bias.copy_(torch.from_numpy(entry["b"]))
    x, y = generator.standard_normal((steps, 12, 4)), generator.standard_normal((steps, 12, 2))
    noise = generator.standard_normal((steps, 12, 2))
    method = osc.Method(
        momentum=osc.CorrectedEMA(0.5), step_size=osc.JointWithLastStep(decay=decay), defaults={"lr": 1.0}
    )
    optimizer = osc.build(method, model, likelihood=Recorded(torch.from_numpy(noise)))
    momentum, rule = MomentumDirection(0.5), LastStepRule(decay)
    for k in range(steps):
        batch = Batch(layers, GAUSSIAN, x[k], y[k])
        evaluation = batch.evaluate(parameters)
        corrected, directions = momentum.propose(evaluation.gradients)
        labels = batch.resampled(evaluation.outputs + noise[k])
        parameters = rule.step(labels, parameters, evaluation.gradients, corrected, directions)
        optimizer.step(squares(optimizer, model, torch.from_numpy(x[k]), torch.from_numpy(y[k])))
        expected = np.concatenate([entry[name].ravel() for entry in parameters for name in ("W", "b")])
        assume(np.abs(expected).max() < 50)  # layers that saturate know no curvature and go anywhere
        assert np.abs(flat(model).numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


def test_an_adaptive_damping_judges_the_whole_step() -> None:
    """Exact forms of a quadratic: what the model predicts is what happens, along last steps too."""
    x, y = least_squares(5)
    model = nn.Linear(8, 1, bias=False).double()
    damping = osc.LevenbergMarquardt(curvature=osc.ExactHessian(), every=1)
    structure = osc.Kronecker(osc.Covariance(), osc.IdentityFactor())
    method = replace(exact(), preconditioner=structure, damping=damping, defaults={"lr": 1.0, "damping": 0.5})
    optimizer = osc.build(method, model)
    predictions: list[float] = []

    class Watch:
        def before_step(self, optimizer: Any) -> None: ...

        def after_step(self, optimizer: Any, trace: Any) -> None:
            predictions.append(float(trace.proposal.predicted))

    optimizer.observers.append(Watch())
    losses = [float(optimizer.step(squares(optimizer, model, x, y))) for _ in range(5)]  # type: ignore[arg-type]
    for (one, two), predicted in zip(itertools.pairwise(losses), predictions, strict=False):
        assert one - two == pytest.approx(predicted, rel=1e-7, abs=1e-12)
