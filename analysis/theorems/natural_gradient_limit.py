"""T13: with one block the theory of mini-blocks is that of exact natural gradient descent (arXiv:1905.10961)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..function_space.certificates import damping_grid
from ..function_space.function_models import dense_tanh
from ..function_space.function_space import FunctionSpace, spectrum
from ..function_space.function_structures import WholeFisher
from ..theorem import Curve, Evidence, Inequality, Plot, Setting, Theorem, worst

__all__ = ["THEOREMS"]

_INPUTS = 8
_T13_WIDTH, _T13_SAMPLES, _T13_STEPS = 16_000, 6, 15


def _path(space: FunctionSpace, damping: float, eta: float) -> tuple[list[Tensor], list[float]]:
    """Points of an exact natural gradient run with the middle of every step, and |e_k|^2."""
    structure = WholeFisher()
    theta = space.model.initial
    points, errors = [], [float(space.residual(theta).square().sum())]
    for _ in range(_T13_STEPS):
        move = -eta * structure.solve(space, theta, space.residual(theta), damping).direction
        points += [theta + 0.5 * move, theta + move]
        theta = theta + move
        errors.append(float(space.residual(theta).square().sum()))
    return points, errors


def _stability_constant(space: FunctionSpace, points: list[Tensor], smallest: float) -> float:
    """Zhang et al.'s C: 3 |J(theta) - J(theta_0)| / sqrt(lambda_min(G_0)), the largest on the path."""
    return 3.0 * float(space.jacobian_change(space.model.initial, points).max()) / math.sqrt(smallest)


def _natural_gradient(setting: Setting) -> tuple[FunctionSpace, float]:
    width = max(setting.widths, default=_T13_WIDTH)
    model = dense_tanh(_T13_SAMPLES, _INPUTS, max(width, _T13_WIDTH), setting.generator(13), setting.device)
    space = FunctionSpace(model)
    return space, float(spectrum(space.gram(model.initial))[0])


def _zhang_rate(constant: float) -> float:
    return (1.0 - 2.0 * constant) / (1.0 + constant) ** 2


def _check_t13(setting: Setting) -> Evidence:
    space, smallest = _natural_gradient(setting)
    pilot, _ = _path(space, 0.0, 0.5)
    constant = 1.1 * _stability_constant(space, pilot, smallest)
    eta = _zhang_rate(min(constant, 0.49))
    points, errors = _path(space, 0.0, eta)
    measured = _stability_constant(space, points, smallest)
    theta, samples = space.model.initial, space.samples
    grid = damping_grid(1e-8, 1.0, 9)
    kernels = [WholeFisher().solve(space, theta, space.residual(theta), damping).kernel for damping in grid]
    identity = torch.eye(samples, dtype=theta.dtype, device=theta.device)
    gaps = [float(torch.linalg.matrix_norm(kernel - identity, 2)) for kernel in kernels]
    limits = [samples * damping / (smallest + samples * damping) for damping in grid]
    distance = max(float((point - theta).norm()) for point in points)
    rates = [(1.0 - eta) ** k * errors[0] for k in range(len(errors))]
    steps = [float(k) for k in range(len(errors))]
    return Evidence(
        (
            worst("|K - I| <= n lambda / (lambda_min(G) + n lambda)", gaps, limits, tolerance=1e-6),
            worst("|e_k|^2 <= (1 - eta)^k |e_0|^2, lambda = 0", errors[1:], rates[1:]),
        ),
        (
            Inequality("C < 1/2", constant, 0.5, tolerance=-1e-12),
            Inequality("C measured on the path <= C assumed", measured, constant),
            Inequality(
                "|theta - theta_0| <= 3 |e_0| / sqrt(lambda_min(G_0))", distance, 3 * math.sqrt(errors[0] / smallest)
            ),
        ),
        {"C": constant, "eta = (1 - 2C)/(1 + C)^2": eta, "lambda_min(G_0)": smallest},
        (
            Plot(
                "T13: exact natural gradient descent",
                "step",
                "|e|^2",
                (Curve("measured", steps, errors), Curve("(1 - eta)^k |e_0|^2", steps, rates, "bound")),
                y_log=True,
            ),
        ),
    )


def _control_t13(setting: Setting) -> Evidence:
    space, smallest = _natural_gradient(setting)
    eta = 0.3
    _, errors = _path(space, 10.0 * smallest / space.samples, eta)
    rates = [(1.0 - eta) ** k * errors[0] for k in range(len(errors))]
    return Evidence((worst("|e_k|^2 <= (1 - eta)^k |e_0|^2, lambda = 10 lambda_min(G) / n", errors, rates),))


THEOREMS: tuple[Theorem, ...] = (
    Theorem(
        "T13",
        "With one block and lambda to 0 the step is exact natural gradient descent, with the rate of Zhang et al.",
        r"\|K - I\| \le \frac{n\lambda}{\lambda_{\min}(G) + n\lambda},\; \eta \le \frac{1-2C}{(1+C)^2} "
        r"\Rightarrow \|e_k\|^2 \le (1-\eta)^k \|e_0\|^2",
        "arXiv:1905.10961, theorem 1 and its conditions 1 and 2; the first bound ours",
        _check_t13,
        _control_t13,
        "damping ten times the smallest eigenvalue of the Gram matrix",
    ),
)
