"""T19: what new mini-batches see on the way back from the weights to their average, by the library's own rule."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ...stepsize.joint import JointLayerwise
from ...stepsize.protocol import StepEvidence
from ...stepsize.trail_scaled import TrailScaled
from ..theorem import Control, Curve, Evidence, Inequality, Plot, Setting, Theorem, worst

__all__ = ["THEOREMS", "expected_shares", "trail"]

_SIZE, _STEPS = 12, 200
_CURVATURES = torch.logspace(0, -4, _SIZE, dtype=torch.float64)
_RUNS = tuple(product((0.05, 0.5, 1.5), (0.0, 0.8)))
"""Step sizes and momenta."""

Gradient = Callable[[Tensor], Tensor]


def trail(setting: Setting, rule: TrailScaled, gradient: Gradient, rate: float, momentum: float) -> list[Tensor]:
    """Weights of noisy gradient descent and their average, [theta_0, x_0, theta_1, x_1, ...], with jumps now and then.

    Args:
        setting: decides noise and jumps.
        rule: says what the average forgets.
        gradient: of the loss.
        rate: of learning.
        momentum: EMA, in [0, 1).
    """
    generator = setting.generator(round(100 * rate) + round(10 * momentum))
    theta = torch.randn(_SIZE, generator=generator, dtype=torch.float64)
    average, velocity, found = theta, torch.zeros_like(theta), [theta, theta]
    for step in range(_STEPS):
        noise = torch.randn(_SIZE, generator=generator, dtype=torch.float64)
        velocity = momentum * velocity + (1.0 - momentum) * (gradient(theta) + noise)
        theta = theta - rate * velocity + (noise.flip(0) if step % 50 == 49 else 0.0)
        average = rule.keeps(step) * average + (1.0 - rule.keeps(step)) * theta
        found += [theta, average]
    return found


def _shares(found: list[Tensor], gradient: Gradient, rule: TrailScaled, loss: Gradient) -> tuple[list[float], ...]:
    """rho of every step, what T19 says that it is, and both as the library's log factor after it."""
    state = rule.init(1, torch.zeros((), dtype=torch.float64))
    measured, stated, factors, expected = [], [], [], [0.0]
    for step in range(_STEPS):
        (theta, average), before = found[2 * step + 2 : 2 * step + 4], found[2 * step + 1]
        way, new = theta - average, 1.0 - rule.keeps(step)
        form = torch.dot(way, _CURVATURES * way)
        measured.append(float(torch.dot(gradient(theta), way) / form))
        gained = float(loss(before) - loss(average))
        stated.append((1.0 - new / 2) / (1.0 - new) - (1.0 - new) * gained / (new * float(form)))
        rule.propose(state, _evidence(theta, -way, gradient(theta)))
        factors.append(float(state.log_factor))
        change = max(-1.0, min(1.0, stated[-1] - rule.threshold))
        expected.append(min(expected[-1] - rule.gain * change, float(torch.tensor(rule.longest).double().log())))
    return measured, stated, factors, expected[1:]


def _evidence(theta: Tensor, back: Tensor, gradient: Tensor) -> StepEvidence:
    """Of one layer whose direction is its gradient, and the way back to its average."""
    rows = torch.stack([gradient, back])
    slopes = rows @ gradient
    return StepEvidence(["all"], 1.0, slopes, slopes, rows.square().sum(1), None, (rows * _CURVATURES) @ rows.T)


def _quadratic(theta: Tensor) -> Tensor:
    return 0.5 * torch.dot(theta, _CURVATURES * theta)


def _slope(theta: Tensor) -> Tensor:
    return _CURVATURES * theta


def expected_shares(curvature: float, rate: float, momentum: float, new: float) -> tuple[float, float, float]:
    """Of gradient descent with white noise on curvature theta^2 / 2, once its distribution stands still.

    The covariance of (theta, velocity, average) solves a linear equation; nothing is sampled.

    Args:
        curvature: > 0.
        rate: of learning.
        momentum: EMA, in [0, 1).
        new: c, what a new iterate weighs in the average.

    Returns:
        E <g, q> / E q'Mq with the gradient of a new mini-batch; the same with that of the mini-batch that made the last
        step; the spectral radius of the recurrence, < 1 where there is such a distribution.
    """
    keep = 1.0 - momentum
    velocity = [keep * curvature, momentum, 0.0]
    theta = [1.0 - rate * velocity[0], -rate * momentum, 0.0]
    matrix = torch.tensor(
        [theta, velocity, [new * theta[0], new * theta[1], 1.0 - new]],
        dtype=torch.float64,
    )
    noise = torch.tensor([-rate * keep, keep, -new * rate * keep], dtype=torch.float64)
    whole = torch.eye(9, dtype=torch.float64) - torch.kron(matrix, matrix)
    covariance = torch.linalg.solve(whole, torch.outer(noise, noise).flatten()).view(3, 3)
    way = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    form = curvature * float(way @ covariance @ way)
    fresh = curvature * float(covariance[0] @ way)
    # The old gradient, curvature theta + noise, is the one that (matrix, noise) has just applied.
    old = curvature * float(matrix @ covariance[:, 0] @ way) + float(noise @ way)
    return fresh / form, old / form, float(torch.linalg.eigvals(matrix).abs().max())


_STILL = tuple(product((1.0, 1e-2, 1e-4), (0.05, 0.5, 1.5), (0.0, 0.8), (0.02, 0.2, 0.5)))
"""Curvatures, step sizes, momenta, c."""


def _check(setting: Setting) -> Evidence:
    rule, gaps, differences, curves = TrailScaled(JointLayerwise()), [], [], []
    for rate, momentum in _RUNS:
        found = trail(setting, rule, _slope, rate, momentum)
        measured, stated, factors, expected = _shares(found, _slope, rule, _quadratic)
        gaps += [abs(one - two) / max(1.0, abs(two)) for one, two in zip(measured, stated, strict=True)]
        differences += [abs(one - two) for one, two in zip(factors, expected, strict=True)]
        if momentum:
            curves.append(Curve(f"step size {rate:g}", list(range(1, _STEPS + 1)), factors))
    still = [expected_shares(*numbers) for numbers in _STILL]
    formula = [(1.0 - numbers[3] / 2) / (1.0 - numbers[3]) for numbers in _STILL]
    errors = [abs(found[0] - wanted) for found, wanted in zip(still, formula, strict=True)]
    return Evidence(
        (
            worst("rho against the identity, relative", gaps, 1e-8),
            worst("log factor of the rule against the identity", differences, 1e-8),
            worst("nothing but noise: E<g, q> / E q'Mq >= 1", [found[0] for found in still], 1.0, ">="),
            worst("nothing but noise: against (1 - c/2) / (1 - c)", errors, 1e-6),
        ),
        (worst("spectral radius < 1", [found[2] for found in still], 1.0),),
        {"smallest curvature": float(_CURVATURES[-1]), "stationary cases": float(len(still))},
        (Plot("T19: the factor on all steps", "step", "log m", tuple(curves)),),
    )


def _same_mini_batch(setting: Setting) -> Evidence:
    found = [expected_shares(*numbers)[1] for numbers in _STILL]
    return Evidence((worst("slope of the mini-batch that made the step: E<g, q> / E q'Mq >= 1", found, 1.0, ">="),))


def _not_quadratic(setting: Setting) -> Evidence:
    """Half the curvature where the weights are large: f = sum h (sqrt(1 + theta^2) - 1)."""

    def loss(theta: Tensor) -> Tensor:
        return (_CURVATURES * ((1.0 + theta.square()).sqrt() - 1.0)).sum()

    def slope(theta: Tensor) -> Tensor:
        return _CURVATURES * theta / (1.0 + theta.square()).sqrt()

    rule = TrailScaled()
    measured, stated, _, _ = _shares(trail(setting, rule, slope, 0.5, 0.0), slope, rule, loss)
    gap = max(abs(one - two) / max(1.0, abs(two)) for one, two in zip(measured, stated, strict=True))
    return Evidence((Inequality("rho against the identity, relative", gap, 1e-8),))


THEOREMS: tuple[Theorem, ...] = (
    Theorem(
        "T19",
        "On a quadratic the share of the way back to the average is what noise alone makes it, at least 1 for every "
        "spectrum, step size and momentum, less what the average gains",
        r"\frac{\langle g_t, q_t\rangle}{q_t' M q_t} = \frac{1 - c/2}{1 - c} - "
        r"\frac{1 - c}{c}\,\frac{f(x_{t-1}) - f(x_t)}{q_t' M q_t}",
        "ours, docs/PAPERS.md section 7.4",
        _check,
        _same_mini_batch,
        "the slope is that of the mini-batch that made the step",
        (Control("a loss that is not quadratic", _not_quadratic),),
    ),
)
