"""Rules in whole methods on problems whose answer is known: quadratics, self-concordant losses, logistic regression."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import flat
from torch import Tensor, nn

seeds = st.integers(0, 2**31)
Loss = Callable[[Tensor], Tensor]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(method: osc.Method, model: nn.Module, x: Tensor, loss: Loss, steps: int = 1, **options: Any) -> list[float]:
    """The losses before the first and after every step."""
    optimizer = osc.build(method, model, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x))
        value.backward()
        return value

    losses = [float(optimizer.step(closure)) for _ in range(steps)]  # type: ignore[arg-type]
    return [*losses, float(loss(model(x)).detach())]


def linear(seed: int, inputs: int = 4, outputs: int = 2) -> nn.Module:
    model = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        model.weight.copy_(randn(seed, outputs, inputs))
    return model


@settings(max_examples=20)
@given(seeds, st.floats(0.01, 100.0))
def test_a_newton_direction_of_any_length_solves_a_quadratic_in_one_step(seed: int, scale: float) -> None:
    """The Hessian of scale * half squares is scale * A (x) I, the direction scale * g A^-1: the step is 1 / scale."""
    x, target, model = randn(seed, 30, 4), randn(seed + 1, 30, 2), linear(seed)

    def loss(output: Tensor) -> Tensor:
        return 0.5 * scale * (output - target).square().sum() / len(output)

    method = osc.Method(
        osc.Kronecker(osc.Covariance(), osc.IdentityFactor()),
        momentum=osc.NoMomentum(),
        step_size=osc.GlobalQuadratic(osc.ExactHessian()),
        defaults={"lr": 1.0, "damping": 1e-13},
    )
    losses = stepped(method, model, x, loss)
    homogeneous = torch.cat([x, torch.ones(30, 1).double()], 1)
    best = torch.linalg.lstsq(homogeneous, target).solution
    expected = float(loss(homogeneous @ best))
    assert losses[-1] == pytest.approx(expected, rel=1e-9)
    assert flat(model).allclose(torch.cat([best[:-1].T.flatten(), best[-1]]), rtol=1e-7, atol=1e-7)


class Sum(nn.Module):
    """Two layers whose outputs add: linear in all parameters, with curvature between the layers."""

    def __init__(self, seed: int):
        super().__init__()
        self.first, self.second = linear(seed), linear(seed + 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, :4]) + self.second(x[:, 2:5])


@settings(max_examples=20)
@given(seeds)
def test_the_global_step_is_an_exact_line_search_on_a_quadratic(seed: int) -> None:
    x, target, model = randn(seed, 20, 5), randn(seed + 1, 20, 2), Sum(seed)

    def loss(output: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum() / len(output)

    before = flat(model)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x)), list(model.parameters()))])
    step = osc.GlobalQuadratic(osc.ExactHessian())
    stepped(osc.Method(momentum=osc.NoMomentum(), step_size=step, defaults={"lr": 1.0}), model, x, loss)
    moved = before - flat(model)
    alpha = moved @ gradient / (gradient @ gradient)
    assert moved.allclose(alpha * gradient, rtol=1e-9, atol=1e-12)
    after = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x)), list(model.parameters()))])
    assert abs(float(after @ gradient)) <= 1e-9 * float(gradient @ gradient)


@settings(max_examples=20)
@given(seeds, st.floats(0.3, 3.0))
def test_a_self_concordant_loss_falls_by_what_the_theorem_says(seed: int, lr_of_direction: float) -> None:
    """sum(w z - log z) over z = a.theta > 0 is standard self-concordant; the direction is a plain gradient."""
    x = randn(seed, 12, 3).abs() + 0.1
    weights = randn(seed + 1, 12, 1).exp()
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(lr_of_direction)

    def loss(z: Tensor) -> Tensor:
        return (weights * z - z.log()).sum()

    for _ in range(4):
        z = model(x).detach()
        gradient = (x * (weights - 1 / z)).sum(0)
        hessian = x.T @ (x / z.square())
        delta = float((gradient @ hessian @ gradient).sqrt())
        eta = float(gradient @ gradient) / delta
        method = osc.Method(
            momentum=osc.NoMomentum(), step_size=osc.SelfConcordant(osc.ExactHessian()), defaults={"lr": 1.0}
        )
        before, after = stepped(method, model, x, loss, loss_reduction="sum")
        assert (model(x) > 0).all()  # the step stays in the domain
        promised = eta - math.log1p(eta)
        assert before - after >= promised * (1 - 1e-9) - 1e-12 * abs(before)


@settings(max_examples=10)
@given(seeds)
def test_self_concordant_steps_lower_logistic_regression_at_every_step(seed: int) -> None:
    x, model = randn(seed, 40, 4), nn.Linear(4, 1).double()
    labels = (randn(seed + 1, 40, 1) + x[:, :1] > 0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    def loss(output: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(output, labels)

    rule = osc.SelfConcordant(osc.ExactHessian())
    losses = stepped(osc.Method(momentum=osc.NoMomentum(), step_size=rule, defaults={"lr": 1.0}), model, x, loss, 15)
    assert all(after < before for before, after in pairwise(losses))


@settings(max_examples=15)
@given(seeds, st.floats(1e-6, 10.0))
def test_a_clipped_natural_gradient_step_stays_within_its_divergence(seed: int, kappa: float) -> None:
    """Gaussian, linear: the divergence is half the mean squared change of the outputs, exactly; the clip bounds it."""
    x, target, model = randn(seed, 25, 4), randn(seed + 1, 25, 2), linear(seed)

    def loss(output: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum() / len(output)

    before = model(x).detach()
    method = osc.Method(
        osc.Kronecker(osc.Covariance(), osc.IdentityFactor()),
        momentum=osc.NoMomentum(),
        step_size=osc.KLClip(kappa=kappa),
        defaults={"lr": 1.0, "damping": 1e-13},
    )
    stepped(method, model, x, loss)
    divergence = 0.5 * float((model(x).detach() - before).square().sum() / len(x))
    assert divergence <= 0.5 * kappa * (1 + 1e-7) <= kappa
    free = 0.5 * float((before - target).square().sum() / len(x) - 2 * loss(_projected(x, target)))
    if divergence < 0.5 * kappa * (1 - 1e-6):  # not clipped: the whole Newton step
        assert divergence == pytest.approx(free, rel=1e-6)


def _projected(x: Tensor, target: Tensor) -> Tensor:
    homogeneous = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    result: Tensor = homogeneous @ torch.linalg.lstsq(homogeneous, target).solution
    return result
