"""T11 and T12: the damping interval in which mini-block steps converge linearly, for wide nets (PAPERS 2.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from ..function_space.certificates import FunctionRun, certified_interval, damping_grid, run
from ..function_space.function_models import dense_tanh
from ..function_space.function_space import FunctionSpace, spectrum
from ..function_space.function_structures import PerOutputBlocks
from ..function_space.library_runs import disagreement, library_residuals
from ..theorem import Control, Curve, Evidence, Inequality, Plot, Setting, Theorem, worst

__all__ = ["THEOREMS", "wide_net"]

_SAMPLES, _INPUTS, _ETA = 12, 8, 0.01
_AGREEMENT = 1e-9
_BLOCKS = PerOutputBlocks()


def wide_net(setting: Setting, width: int) -> FunctionSpace:
    """Twelve points in eight dimensions, the same for every width."""
    return FunctionSpace(dense_tanh(_SAMPLES, _INPUTS, width, setting.generator(11), setting.device))


# -- T11 -------------------------------------------------------------------------------------------------------------

_T11_WIDTHS = (400,)
_T11_GRID = (1e-5, 1.0, 21)
_T11_STEPS = 40
_VANISHED = 1e-20
"""|e|^2 below which e+ - (I - eta K) e is rounding."""
_CUT = 0.05
"""Where a logarithmic axis of contractions ends: growth has none."""


def _interval(grid: Sequence[float], runs: Sequence[FunctionRun]) -> tuple[float, float]:
    return certified_interval(grid, [done.certified for done in runs])


def _interval_plots(width: int, grid: list[float], runs: list[FunctionRun]) -> tuple[Plot, Plot]:
    """Measured against certified contraction, and the two conditions that make the ends of the interval."""
    low, high = _interval(grid, runs)
    root = 1.0 + math.sqrt(1.0 - _ETA)
    lower = [min(entry.kappa_min - entry.stability for entry in done.records) * root for done in runs]
    upper = [max(entry.kappa_max + entry.stability for entry in done.records) * _ETA / root for done in runs]
    bounds = [max(entry.bound for entry in done.records) for done in runs]
    contraction = Plot(
        f"T11: width {width}, eta = {_ETA:g}, certified for lambda in [{low:.2g}, {high:.2g}]",
        "damping lambda",
        "smallest (1 - |e+|^2 / |e|^2) / eta",
        (
            Curve("measured", grid, [max(_CUT, (1.0 - done.worst_ratio) / _ETA) for done in runs]),
            Curve("from kappa and C'", grid, [max(_CUT, (1.0 - bound) / _ETA) for bound in bounds], "bound"),
            Curve("certified rate 1 - eta", grid, [1.0] * len(grid), "bound"),
        ),
        x_log=True,
        y_log=True,
    )
    conditions = Plot(
        f"T11: width {width}, conditions (first above 1, second below)",
        "damping lambda",
        f"worst of {_T11_STEPS} steps",
        (
            Curve("(kappa_min - C') (1 + sqrt(1 - eta))", grid, [max(_CUT, value) for value in lower]),
            Curve("(kappa_max + C') eta / (1 + sqrt(1 - eta))", grid, [max(_CUT, value) for value in upper]),
            Curve("1", grid, [1.0] * len(grid), "bound"),
        ),
        x_log=True,
        y_log=True,
    )
    return contraction, conditions


def _step_inequalities(name: str, runs: Sequence[FunctionRun]) -> tuple[Inequality, ...]:
    """What every step, every certified step and every certified run must obey."""
    steps = [entry for done in runs for entry in done.records]
    certified = [entry.ratio for entry in steps if entry.certified]
    exact = [entry for entry in steps if entry.error > _VANISHED]
    whole = [done for done in runs if done.certified]
    return (
        worst(name + "certified step: ratio <= 1 - eta", certified or [math.nan], 1.0 - _ETA),
        worst(
            name + "any step: |e+ - (I - eta K) e| <= eta C' |e|",
            [entry.defect for entry in exact],
            [entry.stability for entry in exact],
        ),
        worst(
            name + "any step: ratio <= (|I - eta K| + eta C')^2",
            [entry.ratio for entry in steps],
            [entry.bound for entry in steps],
        ),
        worst(
            name + "certified run: |theta_k - theta_0| <= R",
            [entry.distance for done in whole for entry in done.records] or [math.nan],
            [done.radius for done in whole for _ in done.records] or 0.0,
        ),
    )


def _width_evidence(setting: Setting, width: int) -> Evidence:
    grid, net = damping_grid(*_T11_GRID), wide_net(setting, width)
    runs = [run(net, _BLOCKS, damping, _ETA, _T11_STEPS) for damping in grid]
    low, high = _interval(grid, runs)
    middle = grid[len(grid) // 2] if math.isnan(low) else math.sqrt(low * high)
    engine = run(net, _BLOCKS, middle, _ETA, 5).residuals
    agreement = disagreement(library_residuals(net.model, "per-output", middle, _ETA, 5), engine)
    rank = float(spectrum(net.gram(net.model.initial))[0])
    name = f"width {width}: "
    return Evidence(
        (
            *_step_inequalities(name, runs),
            Inequality(name + "lower end lambda_low inside the grid", low, grid[1], ">="),
            Inequality(name + "upper end lambda_up inside the grid", high, grid[-2]),
            Inequality(name + "library's MBF against the function-space run", agreement, _AGREEMENT),
        ),
        (Inequality(name + "smallest eigenvalue of J J' > 0 (full row rank)", rank, 1e-12, ">="),),
        {f"lambda_low ({width})": low, f"lambda_up ({width})": high}
        | _constants(width, [done for done in runs if done.certified]),
        _interval_plots(width, grid, runs),
    )


def _constants(width: int, runs: Sequence[FunctionRun]) -> dict[str, float]:
    steps = [entry for done in runs for entry in done.records]
    if not steps:
        return {}
    return {
        f"smallest kappa_min, certified ({width})": min(entry.kappa_min for entry in steps),
        f"largest kappa_max, certified ({width})": max(entry.kappa_max for entry in steps),
        f"largest C', certified ({width})": max(entry.stability for entry in steps),
    }


def _joined(parts: Sequence[Evidence], constants: dict[str, float]) -> Evidence:
    for part in parts:
        constants |= part.constants
    return Evidence(
        tuple(entry for part in parts for entry in part.inequalities),
        tuple(entry for part in parts for entry in part.assumptions),
        constants,
        tuple(entry for part in parts for entry in part.plots),
    )


def _check_t11(setting: Setting) -> Evidence:
    widths = setting.widths or _T11_WIDTHS
    return _joined([_width_evidence(setting, width) for width in widths], {"eta": _ETA})


def _outside(setting: Setting, damping: float, steps: int) -> Evidence:
    """The rate is claimed for a damping beyond the grid, half a decade from its end."""
    width = (setting.widths or _T11_WIDTHS)[0]
    records = run(wide_net(setting, width), _BLOCKS, damping, _ETA, steps).records
    name = f"width {width}, lambda = {damping:.2g}: ratio <= 1 - eta"
    return Evidence((worst(name, [entry.ratio for entry in records], 1.0 - _ETA),))


# -- T12 -------------------------------------------------------------------------------------------------------------

_T12_GRID = (1e-4, 1e-1, 7)


def _step_lengths(setting: Setting, share: float) -> tuple[list[float], list[float]]:
    """|d|^2 of steps with damping ``share * lambda`` and e' K(lambda) e / (n lambda), along runs."""
    space = wide_net(setting, (setting.widths or _T11_WIDTHS)[0])
    lengths, bounds = [], []
    for damping in damping_grid(*_T12_GRID):
        theta = space.model.initial
        for _ in range(10):
            residual = space.residual(theta)
            solved = _BLOCKS.solve(space, theta, residual, share * damping)
            claimed = solved if share == 1.0 else _BLOCKS.solve(space, theta, residual, damping)
            lengths.append(float(solved.direction.square().sum()))
            bounds.append(float(residual @ claimed.kernel @ residual) / (space.samples * damping))
            theta = theta - _ETA * solved.direction
    return lengths, bounds


def _eigenvalue_bounds(
    space: FunctionSpace, grid: Sequence[float]
) -> tuple[tuple[Inequality, ...], list[float], list[float]]:
    """The bounds of the eigenvalues of K at the start; and the smallest and the largest, by damping."""
    theta = space.model.initial
    residual = space.residual(theta)
    gram = spectrum(space.gram(theta))
    largest, samples = space.largest_block(theta), space.samples
    kernels = [_BLOCKS.solve(space, theta, residual, damping).kernel for damping in grid]
    low, high = zip(*(spectrum(kernel)[[0, -1]].tolist() for kernel in kernels), strict=True)
    falls = [float(spectrum(one - two)[0]) for one, two in pairwise(kernels)]
    lower = [float(gram[0]) / (largest + samples * damping) for damping in grid]
    upper = [min(theta.shape[0], float(gram[-1]) / (samples * damping)) for damping in grid]
    claims = (
        worst("K(lambda) - K(lambda') >= 0 for lambda < lambda'", falls, 0.0, ">="),
        worst("kappa_min >= lambda_min(J J') / (max |G_b| + n lambda)", low, lower, ">="),
        worst("kappa_max <= min(blocks, |J|^2 / (n lambda))", high, upper),
    )
    return claims, list(low), list(high)


def _check_t12(setting: Setting) -> Evidence:
    lengths, bounds = _step_lengths(setting, 1.0)
    space = wide_net(setting, (setting.widths or _T11_WIDTHS)[0])
    grid = damping_grid(*_T12_GRID)
    claims, low, high = _eigenvalue_bounds(space, grid)
    plot = Plot(
        "T12: eigenvalues of K fall with the damping",
        "damping lambda",
        "kappa",
        (Curve("kappa_min", grid, low), Curve("kappa_max", grid, high)),
        x_log=True,
        y_log=True,
    )
    return Evidence(
        (worst("|d|^2 <= e' K e / (n lambda)", lengths, bounds), *claims),
        (),
        {"blocks": float(space.model.initial.shape[0]), "n": float(space.samples)},
        (plot,),
    )


def _control_t12(setting: Setting) -> Evidence:
    lengths, bounds = _step_lengths(setting, 1e-2)
    return Evidence((worst("|d|^2 <= e' K e / (n lambda), d damped by lambda / 100", lengths, bounds),))


THEOREMS: tuple[Theorem, ...] = (
    Theorem(
        "T11",
        "For a wide tanh net there is an interval of damping values in which mini-block steps are certified to "
        "converge like (1 - eta)^k",
        r"\kappa_{\min} - C' \ge \frac{1}{1+\sqrt{1-\eta}},\; \kappa_{\max} + C' \le \frac{1+\sqrt{1-\eta}}{\eta} "
        r"\;\Rightarrow\; \|e_k\|^2 \le (1-\eta)^k\|e_0\|^2",
        "ours, docs/PAPERS.md section 2.5, after arXiv:2202.04124 (set-up of its theorem)",
        _check_t11,
        partial(_outside, damping=_T11_GRID[0] / 3.0, steps=_T11_STEPS),
        "damping below the interval",
        (Control("damping above the interval", partial(_outside, damping=_T11_GRID[1] * 3.0, steps=4 * _T11_STEPS)),),
    ),
    Theorem(
        "T12",
        "The step is short where the damping is large, and K falls monotonically between two known bounds",
        r"\|d\|^2 \le \frac{e^\top K e}{n\lambda},\; \frac{\lambda_{\min}(JJ^\top)}{\max_b\|G_b\| + n\lambda} \le "
        r"\kappa \le \min\Big(B, \frac{\|J\|^2}{n\lambda}\Big)",
        "ours, docs/PAPERS.md section 2.5, after arXiv:2202.04124 (set-up of its theorem)",
        _check_t12,
        _control_t12,
        "the step is damped by a hundredth of the lambda of the bound",
    ),
)
