"""Differential equations with a known solution at the sizes of the literature, and a regression, in double precision.

Poisson and heat equations are those of arXiv:2405.15603 (experiments 9, 10 and 13 of its code): networks, solutions,
numbers of points, points of evaluation. Burgers' equation is that of Raissi, Perdikaris and Karniadakis (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...curvature.residuals.derivatives import derivatives
from ...errors import ArgumentError, require_positive_integer
from ..networks.models import seeded, smooth_network
from .problem import GENERATED_HERE, Data, Problem, Source, Target, is_small, require_seed
from .residual_problem import Equation, Layout, Redrawn, ResidualProblem

__all__ = ["burgers_1d", "burgers_solution", "heat_1d", "poisson_2d", "poisson_5d", "sine_regression"]

_VISCOSITY = 0.01 / math.pi
_NODES = 160
_PINN_KFAC = Source(
    "points drawn at random",
    GENERATED_HERE,
    "Dangel, Müller and Zeinhofer, Kronecker-Factored Approximate Curvature for Physics-Informed Neural Networks, 2024",
    "https://arxiv.org/abs/2405.15603",
)
_PINN = Source(
    "points drawn at random",
    GENERATED_HERE,
    "Raissi, Perdikaris and Karniadakis, Physics-informed neural networks, Journal of Computational Physics 378, 2019",
    "https://doi.org/10.1016/j.jcp.2018.10.045",
)
_SOLVED = Target("relative_l2", 1e-6)
_RAISSI = Target("relative_l2", 6.7e-4)
"""What Raissi, Perdikaris and Karniadakis publish for Burgers' equation, by L-BFGS."""

_INTERVAL = 10

Solution = Callable[[Tensor], Tensor]
"""Values (N, 1) at points (N, d)."""


def poisson_2d(size: str = "full", data_seed: int = 0, resample: bool = False) -> ResidualProblem:
    """Return -Laplace u = f on the unit square with u = sin(pi x) sin(pi y), values on the boundary given.

    Args:
        size: ``full``: 900 points within, 120 on the boundary, 64 hidden units; ``small``: 100, 40 and 12.
        data_seed: decides the points, >= 0.
        resample: whether all points are drawn anew at every step.
    """
    small = is_small(size)
    within, around = (100, 40) if small else (900, 120)
    return _poisson("poisson-2d", (2, 12 if small else 64, 1), _sine_product, 2, (within, around), data_seed, resample)


def poisson_5d(size: str = "full", data_seed: int = 0, resample: bool = False) -> ResidualProblem:
    """Return -Laplace u = f on the unit cube of five dimensions with u the sum of cos(pi x_i), u given on the boundary.

    Args:
        size: ``full``: 3000 points within, 500 on the boundary, 64 hidden units; ``small``: 150, 60 and 12.
        data_seed: decides the points, >= 0.
        resample: whether all points are drawn anew at every step.
    """
    small = is_small(size)
    within, around = (150, 60) if small else (3000, 500)
    return _poisson("poisson-5d", (5, 12 if small else 64, 1), _cosine_sum, 1, (within, around), data_seed, resample)


def heat_1d(size: str = "full", data_seed: int = 0, resample: bool = False) -> ResidualProblem:
    """Return u_t = u_xx / 4 for t and x in [0, 1] with u = exp(-pi^2 t / 4) sin(pi x), given at t = 0 and at both ends.

    Args:
        size: ``full``: 900 points within, 120 with values (half of them at t = 0), 64 hidden units; ``small``: 100, 40
            and 12.
        data_seed: decides the points, >= 0.
        resample: whether all points are drawn anew at every step.
    """
    small = is_small(size)
    within, around = (100, 40) if small else (900, 120)

    def layout(generator: torch.Generator) -> Tensor:
        ends = _on_boundary(_uniform(around // 2, 2, generator), range(1, 2), generator)
        start = _uniform(around - around // 2, 2, generator)
        start[:, 0] = 0.0
        return torch.cat([_uniform(within, 2, generator), ends, start])

    return _problem(
        "heat-1d",
        "u_t = u_xx / 4",
        (2, 12 if small else 64, 1),
        {"interior": _heat, "boundary": partial(_values, _decaying_sine)},
        (within, around),
        layout,
        _drawn_evaluation(_decaying_sine, 10 * within, 2),
        data_seed,
        resample,
    )


def burgers_1d(size: str = "full", points: int = 4000, data_seed: int = 0, resample: bool = False) -> ResidualProblem:
    """Return u_t + u u_x = (0.01 / pi) u_xx for t in [0, 1], x in [-1, 1], -sin(pi x) at first and 0 at both ends.

    Args:
        size: ``full``: three layers of 20, 200 points with values (half of them at t = 0); ``small``: two layers of 8,
            200 points within and 40 with values.
        points: within, of ``size="full"``, >= 1; the literature has 10000.
        data_seed: decides the points, >= 0.
        resample: whether all points are drawn anew at every step.
    """
    small = is_small(size)
    require_positive_integer("points", points)
    within, around = (200, 40) if small else (points, 200)

    def layout(generator: torch.Generator) -> Tensor:
        ends = _on_boundary(_uniform(around // 2, 2, generator), range(1, 2), generator)
        start = _uniform(around - around // 2, 2, generator)
        start[:, 0] = 0.0
        drawn = torch.cat([_uniform(within, 2, generator), ends, start])
        drawn[:, 1] = 2 * drawn[:, 1] - 1
        return drawn

    def evaluation(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        times, places = (25, 64) if small else (100, 256)
        grid = torch.cartesian_prod(_grid(0, 1, times), _grid(-1, 1, places))
        return grid, burgers_solution(grid)

    return _problem(
        "burgers-1d",
        "u_t + u u_x = 0.01 / pi u_xx",
        (2, 8, 8, 1) if small else (2, 20, 20, 20, 1),
        {"interior": _burgers, "boundary": partial(_values, _burgers_start)},
        (within, around),
        layout,
        evaluation,
        data_seed,
        resample,
        _PINN,
        _RAISSI,
    )


def sine_regression(size: str = "full", data_seed: int = 0) -> Problem:
    """Return the regression of sin(pi x) sin(pi y) on the square [-1, 1]^2: more parameters than samples, no noise.

    Args:
        size: ``full``: 200 samples, 501 parameters, 2-20-20-1; ``small``: 40 and 2-8-8-1.
        data_seed: decides the samples, >= 0.
    """
    small = is_small(size)
    require_seed(data_seed)
    samples, widths = (40, (2, 8, 8, 1)) if small else (200, (2, 20, 20, 1))

    def load(data_dir: Path | None) -> Data:
        generator = torch.Generator().manual_seed(data_seed)
        points, others = (2 * _uniform(count, 2, generator) - 1 for count in (samples, 10 * samples))
        described = f"{len(others)} points, against the function itself"
        return Data(points, _sine_product(points), others, _sine_product(others), test_set=described)

    return Problem(
        name="sine-regression",
        summary=f"{samples} values of a product of sines, {'-'.join(map(str, widths))}, tanh, half squared error",
        likelihood="gaussian",
        epochs=500,
        build_model=partial(seeded, partial(smooth_network, widths)),
        load=load,
        source=Source("values of a function", GENERATED_HERE, "ours"),
        target=Target("train_loss", 5e-9),
        interval=_INTERVAL,
        relative_error=True,
    )


def burgers_solution(points: Tensor) -> Tensor:
    """Return the solution of Burgers' equation (M, 1) at points (M, 2) of (t, x): Cole and Hopf's, by quadrature.

    u = -E[sin(pi (x - h)) w] / E[w], w = exp(-cos(pi (x - h)) / (2 pi nu)), h normal with variance 2 nu t, by 160 nodes
    of Gauss and Hermite: 1e-10 for the viscosity 0.01 / pi.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(_NODES)
    times, places = points.double().cpu().numpy().T[:, :, None]
    shifted = np.pi * (places - np.sqrt(4 * _VISCOSITY * times) * nodes)
    powers = -np.cos(shifted) / (2 * np.pi * _VISCOSITY) + np.log(weights)
    shares = np.exp(powers - powers.max(axis=1, keepdims=True))
    values: NDArray[np.float64] = -(np.sin(shifted) * shares).sum(axis=1) / shares.sum(axis=1)
    return torch.from_numpy(values[:, None]).to(points)


# -- equations ---------------------------------------------------------------------------------------------------------


def _laplace(solution: Solution, factor: float, model: nn.Module, points: Tensor) -> Tensor:
    """Of a solution whose negative Laplacian is ``factor`` pi^2 times itself."""
    laplacian = derivatives(model, points, laplacian=True).laplacian
    assert laplacian is not None
    return laplacian + factor * math.pi**2 * solution(points)


def _heat(model: nn.Module, points: Tensor) -> Tensor:
    found = derivatives(model, points, second=(1,))
    return found.first[:, 0] - found.second[:, 0] / 4


def _burgers(model: nn.Module, points: Tensor) -> Tensor:
    found = derivatives(model, points, second=(1,))
    return found.first[:, 0] + found.value * found.first[:, 1] - _VISCOSITY * found.second[:, 0]


def _values(solution: Solution, model: nn.Module, points: Tensor) -> Tensor:
    residual: Tensor = model(points) - solution(points)
    return residual


# -- solutions ---------------------------------------------------------------------------------------------------------


def _sine_product(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points).prod(1, keepdim=True)


def _cosine_sum(points: Tensor) -> Tensor:
    return torch.cos(math.pi * points).sum(1, keepdim=True)


def _decaying_sine(points: Tensor) -> Tensor:
    return torch.exp(-(math.pi**2) / 4 * points[:, [0]]) * torch.sin(math.pi * points[:, [1]])


def _burgers_start(points: Tensor) -> Tensor:
    """Its values where they are given: at t = 0, and 0 at both ends."""
    return torch.where(points[:, [0]] == 0, -torch.sin(math.pi * points[:, [1]]), 0.0)


# -- points ------------------------------------------------------------------------------------------------------------


def _uniform(count: int, dimensions: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, dimensions, generator=generator, dtype=torch.float64)


def _grid(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def _on_boundary(points: Tensor, coordinates: range, generator: torch.Generator) -> Tensor:
    """Points moved to a side of the unit cube, each along one of some coordinates."""
    count = len(points)
    moved = torch.randint(coordinates.start, coordinates.stop, (count, 1), generator=generator)
    sides = torch.randint(0, 2, (count, 1), generator=generator).to(points.dtype)
    return points.scatter(1, moved, sides)


def _drawn_evaluation(
    solution: Solution, count: int, dimensions: int
) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Points of evaluation within the unit cube, and the solution there."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        points = _uniform(count, dimensions, generator)
        return points, solution(points)

    return draw


# -- problems ----------------------------------------------------------------------------------------------------------


def _poisson(
    name: str,
    widths: tuple[int, ...],
    solution: Solution,
    factor: float,
    counts: tuple[int, int],
    data_seed: int,
    resample: bool,
) -> ResidualProblem:
    within, around = counts
    dimensions = widths[0]

    def layout(generator: torch.Generator) -> Tensor:
        boundary = _on_boundary(_uniform(around, dimensions, generator), range(dimensions), generator)
        return torch.cat([_uniform(within, dimensions, generator), boundary])

    equations: dict[str, Equation] = {
        "interior": partial(_laplace, solution, factor),
        "boundary": partial(_values, solution),
    }
    evaluation = _drawn_evaluation(solution, 10 * within, dimensions)
    return _problem(name, "-Laplace u = f", widths, equations, counts, layout, evaluation, data_seed, resample)


def _problem(
    name: str,
    equation: str,
    widths: tuple[int, ...],
    equations: dict[str, Equation],
    counts: tuple[int, int],
    layout: Layout,
    evaluation: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    data_seed: int,
    resample: bool,
    source: Source = _PINN_KFAC,
    target: Target = _SOLVED,
) -> ResidualProblem:
    """A problem with points of two kinds, drawn once, and with points of evaluation, the same for all seeds."""
    require_seed(data_seed)
    if not isinstance(resample, bool):
        raise ArgumentError(f"resample must be true or false, got {resample!r}")

    def load(data_dir: Path | None) -> Data:
        points = layout(torch.Generator().manual_seed(data_seed))
        kinds = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
        others, values = evaluation(torch.Generator().manual_seed(0))
        described = f"{len(others)} points, against the solution"
        return Data(points, kinds, others, values, test_set=described)

    network = f"{'-'.join(map(str, widths))}, tanh"
    return ResidualProblem(
        name=name,
        summary=f"{equation}, {counts[0]} + {counts[1]} points, {network}, half squared residuals",
        likelihood=None,
        epochs=1000,
        build_model=partial(seeded, partial(smooth_network, widths)),
        load=load,
        source=source,
        target=target,
        augmentation=Redrawn(layout) if resample else None,
        interval=_INTERVAL,
        relative_error=True,
        equations=equations,
    )
