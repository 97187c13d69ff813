"""T10-T13: linear convergence of mini-block natural gradient steps in function space (PAPERS 2.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .certificates import Run, certified_interval, linear_limit, run
from .function_models import LinearModel, dense_tanh
from .function_space import FunctionSpace, spectrum
from .function_structures import PerOutputBlocks, WholeFisher
from .library_runs import library_residuals
from .theorem import Curve, Evidence, Inequality, Plot, Setting, Theorem, worst

__all__ = ["THEOREMS", "damping_grid", "disagreement", "random_linear_model", "wide_net"]

_SAMPLES, _INPUTS, _ETA = 12, 8, 0.01
_AGREEMENT = 1e-9
_BLOCKS = PerOutputBlocks()


def damping_grid(low: float, high: float, count: int) -> list[float]:
    """``count`` values from ``low`` to ``high``, both included, in equal ratios."""
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).tolist()


def disagreement(library: Sequence[Tensor], engine: Sequence[Tensor]) -> float:
    """Largest difference of two sequences of residuals, relative to the first residual."""
    pairs = zip(library, engine, strict=False)
    return max(float((left - right).norm()) for left, right in pairs) / float(engine[0].norm())


def random_linear_model(setting: Setting, stream: int, targets: Tensor | None = None) -> LinearModel:
    """Six points, ten blocks of four parameters, N(0, 1) features; targets N(0, 1) unless given."""
    generator = setting.generator(stream)
    features = torch.randn(6, 10, 4, generator=generator, dtype=torch.float64)
    drawn = torch.randn(6, generator=generator, dtype=torch.float64)
    return LinearModel(features.to(setting.device), (drawn if targets is None else targets).to(setting.device))


def wide_net(setting: Setting, width: int) -> FunctionSpace:
    """Twelve points in eight dimensions, the same for every width."""
    return FunctionSpace(dense_tanh(_SAMPLES, _INPUTS, width, setting.generator(11), setting.device))


# -- T10 -------------------------------------------------------------------------------------------------------------

_T10_DAMPING, _T10_MODELS, _T10_STEPS = 0.05, 6, 10


def _starts(model: LinearModel, kernel: Tensor, setting: Setting, stream: int) -> list[Tensor]:
    """Every eigenvector of K and four random vectors."""
    drawn = torch.randn(4, kernel.shape[0], generator=setting.generator(1000 + stream), dtype=torch.float64)
    return [*torch.linalg.eigh(kernel).eigenvectors.T, *drawn.to(kernel)]


def _linear_rates(setting: Setting, factor: float) -> tuple[list[float], list[float]]:
    """|e_k|^2 / |e_0|^2 and (1 - eta)^k over models, starts and steps, at ``factor`` times the limit."""
    measured, bounds = [], []
    for stream in range(_T10_MODELS):
        model = random_linear_model(setting, stream)
        kernel = _kernel(model)
        eta = factor * linear_limit(kernel)
        for start in _starts(model, kernel, setting, stream):
            space = FunctionSpace(LinearModel(model.features, -start))
            done = run(space, _BLOCKS, _T10_DAMPING, eta, _T10_STEPS)
            errors = [entry.next_error / done.records[0].error for entry in done.records]
            measured += errors
            bounds += [(1.0 - eta) ** (k + 1) for k in range(len(errors))]
    return measured, bounds


def _kernel(model: LinearModel) -> Tensor:
    space = FunctionSpace(model)
    return _BLOCKS.solve(space, model.initial, model.targets, _T10_DAMPING).kernel


def _above_limit(setting: Setting) -> tuple[list[float], list[float]]:
    """Ratio of the first step from the worst start, and 1 - eta, at 1.01 times the limit."""
    ratios, bounds = [], []
    for stream in range(_T10_MODELS):
        model = random_linear_model(setting, stream)
        values, vectors = torch.linalg.eigh(_kernel(model))
        limits = (2.0 * values - 1.0) / values.square()
        eta = 1.01 * float(limits.min())
        space = FunctionSpace(LinearModel(model.features, -vectors[:, limits.argmin()]))
        ratios.append(run(space, _BLOCKS, _T10_DAMPING, eta, 1).worst_ratio)
        bounds.append(1.0 - eta)
    return ratios, bounds


def _limit_plot(setting: Setting) -> Plot:
    """Worst ratio over all starts against eta, one model."""
    kappa = spectrum(_kernel(random_linear_model(setting, 0)))
    limit = float(((2.0 * kappa - 1.0) / kappa.square()).min())
    shares = torch.linspace(0.05, 1.3, 60, dtype=torch.float64)
    etas = limit * shares
    ratios = (1.0 - etas.unsqueeze(1) * kappa.cpu()).square().max(1).values
    return Plot(
        "T10: the step-size limit of a linear model",
        "eta / limit",
        "worst |e+|^2 / |e|^2",
        (
            Curve("worst start", shares.tolist(), ratios.tolist()),
            Curve("1 - eta", shares.tolist(), (1.0 - etas).tolist(), "bound"),
        ),
    )


def _check_t10(setting: Setting) -> Evidence:
    measured, bounds = _linear_rates(setting, 1.0)
    above, above_bounds = _above_limit(setting)
    models = [random_linear_model(setting, stream) for stream in range(_T10_MODELS)]
    smallest = [float(spectrum(_kernel(model))[0]) for model in models]
    rank = [float(spectrum(FunctionSpace(model).gram(model.initial))[0]) for model in models]
    limits = [linear_limit(_kernel(model)) for model in models]
    first = models[0]
    engine = run(FunctionSpace(first), _BLOCKS, _T10_DAMPING, limits[0], _T10_STEPS).residuals
    library = library_residuals(first, "per-output", _T10_DAMPING, limits[0], _T10_STEPS)
    return Evidence(
        (
            worst("|e_k|^2 / |e_0|^2 <= (1 - eta)^k at the limit", measured, bounds),
            worst("worst start, 1.01 times the limit: ratio >= 1 - eta", above, above_bounds, ">="),
            Inequality("library's MBF against the function-space run", disagreement(library, engine), _AGREEMENT),
        ),
        (
            worst("kappa_min > 1/2", smallest, 0.5, ">=", 0.0),
            worst("smallest eigenvalue of J J' > 0 (full row rank)", rank, 1e-12, ">=", 0.0),
        ),
        {"lambda": _T10_DAMPING, "eta limit (first model)": limits[0], "kappa_min (first model)": smallest[0]},
        (_limit_plot(setting),),
    )


def _control_t10(setting: Setting) -> Evidence:
    measured, bounds = _linear_rates(setting, 1.01)
    return Evidence((worst("|e_k|^2 / |e_0|^2 <= (1 - eta)^k at 1.01 times the limit", measured, bounds),))


# -- T11 -------------------------------------------------------------------------------------------------------------

_T11_WIDTHS = (400,)
_T11_GRID = (1e-5, 1.0, 21)
_T11_STEPS = 40


def _sweep(setting: Setting, width: int) -> tuple[list[float], list[Run]]:
    grid = damping_grid(*_T11_GRID)
    space = wide_net(setting, width)
    return grid, [run(space, _BLOCKS, damping, _ETA, _T11_STEPS) for damping in grid]


def _interval(grid: Sequence[float], runs: Sequence[Run]) -> tuple[float, float]:
    return certified_interval(grid, [done.certified for done in runs])


def _interval_plot(width: int, grid: list[float], runs: list[Run]) -> Plot:
    low, high = _interval(grid, runs)
    inside = [(damping, done) for damping, done in zip(grid, runs, strict=True) if low <= damping <= high]
    return Plot(
        f"T11: width {width}, certified for lambda in [{low:.2g}, {high:.2g}]",
        "damping lambda",
        f"worst |e+|^2 / |e|^2 of {_T11_STEPS} steps",
        (
            Curve("measured", grid, [done.worst_ratio for done in runs]),
            Curve("certified rate 1 - eta", grid, [1.0 - _ETA] * len(grid), "bound"),
            Curve("bound from kappa and C'", grid, [_worst_bound(done) for done in runs], "bound"),
            Curve("certified", [entry[0] for entry in inside], [entry[1].worst_ratio for entry in inside], "measured"),
        ),
        x_log=True,
        y_log=True,
    )


def _worst_bound(done: Run) -> float:
    return max(entry.bound for entry in done.records)


def _width_evidence(setting: Setting, width: int) -> Evidence:
    grid, runs = _sweep(setting, width)
    low, high = _interval(grid, runs)
    steps = [entry for done in runs for entry in done.records]
    certified = [entry for entry in steps if entry.certified]
    whole = [done for done in runs if done.certified]
    net = wide_net(setting, width)
    middle = grid[len(grid) // 2] if math.isnan(low) else math.sqrt(low * high)
    engine = run(net, _BLOCKS, middle, _ETA, 5).residuals
    agreement = disagreement(library_residuals(net.model, "per-output", middle, _ETA, 5), engine)
    name = f"width {width}: "
    return Evidence(
        (
            worst(name + "certified step: ratio <= 1 - eta", [e.ratio for e in certified] or [math.nan], 1.0 - _ETA),
            worst(name + "any step: ratio <= (|I - eta K| + eta C')^2", [e.ratio for e in steps], [e.bound for e in steps]),
            worst(
                name + "certified run: |theta_k - theta_0| <= R",
                [e.distance for done in whole for e in done.records] or [math.nan],
                [done.radius for done in whole for _ in done.records] or 0.0,
            ),
            Inequality(name + "lower end lambda_low inside the grid", low, grid[1], ">="),
            Inequality(name + "upper end lambda_up inside the grid", high, grid[-2]),
            Inequality(name + "library's MBF against the function-space run", agreement, _AGREEMENT),
        ),
        (
            Inequality(
                name + "smallest eigenvalue of J J' > 0 (full row rank)",
                float(spectrum(net.gram(net.model.initial))[0]),
                1e-12,
                ">=",
            ),
        ),
        {f"lambda_low ({width})": low, f"lambda_up ({width})": high} | _constants(width, whole),
        (_interval_plot(width, grid, runs),),
    )


def _constants(width: int, runs: Sequence[Run]) -> dict[str, float]:
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


def _control_t11(setting: Setting) -> Evidence:
    """Half a decade beyond either end of the damping grid, the rate is claimed all the same."""
    width = (setting.widths or _T11_WIDTHS)[0]
    space = wide_net(setting, width)
    low, high = _T11_GRID[0] / 3.0, _T11_GRID[1] * 3.0
    below = run(space, _BLOCKS, low, _ETA, _T11_STEPS)
    above = run(space, _BLOCKS, high, _ETA, 4 * _T11_STEPS)
    return Evidence(
        tuple(
            worst(f"lambda = {damping:.2g}: ratio <= 1 - eta", [entry.ratio for entry in done.records], 1.0 - _ETA)
            for damping, done in ((low, below), (high, above))
        )
    )


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


def _eigenvalue_bounds(space: FunctionSpace, grid: Sequence[float]) -> tuple[Inequality, ...]:
    theta = space.model.initial
    residual = space.residual(theta)
    gram = spectrum(space.gram(theta))
    largest, samples = space.largest_block(theta), space.samples
    kernels = [_BLOCKS.solve(space, theta, residual, damping).kernel for damping in grid]
    kappa = [spectrum(kernel) for kernel in kernels]
    falls = [float(spectrum(one - two)[0]) for one, two in zip(kernels, kernels[1:], strict=False)]
    lower = [float(gram[0]) / (largest + samples * damping) for damping in grid]
    upper = [min(theta.shape[0], float(gram[-1]) / (samples * damping)) for damping in grid]
    return (
        worst("K(lambda) - K(lambda') >= 0 for lambda < lambda'", falls, 0.0, ">="),
        worst("kappa_min >= lambda_min(J J') / (max |G_b| + n lambda)", [float(k[0]) for k in kappa], lower, ">="),
        worst("kappa_max <= min(blocks, |J|^2 / (n lambda))", [float(k[-1]) for k in kappa], upper),
    )


def _check_t12(setting: Setting) -> Evidence:
    lengths, bounds = _step_lengths(setting, 1.0)
    space = wide_net(setting, (setting.widths or _T11_WIDTHS)[0])
    grid = damping_grid(*_T12_GRID)
    kappa = [spectrum(_BLOCKS.solve(space, space.model.initial, space.model.targets, d).kernel) for d in grid]
    plot = Plot(
        "T12: eigenvalues of K fall with the damping",
        "damping lambda",
        "kappa",
        (
            Curve("kappa_min", grid, [float(entry[0]) for entry in kappa]),
            Curve("kappa_max", grid, [float(entry[-1]) for entry in kappa]),
        ),
        x_log=True,
        y_log=True,
    )
    return Evidence(
        (worst("|d|^2 <= e' K e / (n lambda)", lengths, bounds), *_eigenvalue_bounds(space, grid)),
        (),
        {"blocks": float(space.model.initial.shape[0]), "n": float(space.samples)},
        (plot,),
    )


def _control_t12(setting: Setting) -> Evidence:
    lengths, bounds = _step_lengths(setting, 1e-2)
    return Evidence((worst("|d|^2 <= e' K e / (n lambda), d damped by lambda / 100", lengths, bounds),))


# -- T13 -------------------------------------------------------------------------------------------------------------

_T13_WIDTH, _T13_SAMPLES, _T13_STEPS = 4000, 6, 15


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
            worst("|e_k|^2 <= (1 - eta)^k |e_0|^2, lambda = 0", errors, rates),
        ),
        (
            Inequality("C < 1/2", constant, 0.5, tolerance=-1e-12),
            Inequality("C measured on the path <= C assumed", measured, constant),
            Inequality("|theta - theta_0| <= 3 |e_0| / sqrt(lambda_min(G_0))", distance, 3 * math.sqrt(errors[0] / smallest)),
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


Check = Callable[[Setting], Evidence]

_SECTION = "ours, docs/PAPERS.md section 2.5, after arXiv:2202.04124 (set-up of its theorem)"

THEOREMS: tuple[Theorem, ...] = (
    Theorem(
        "T10",
        "On a model linear in its parameters, mini-block steps converge like (1 - eta)^k from every start exactly up "
        "to a limit of eta",
        r"\|e_k\|^2 \le (1-\eta)^k \|e_0\|^2 \;\forall e_0 \iff \eta \le \min_i (2\kappa_i - 1)/\kappa_i^2",
        _SECTION,
        _check_t10,
        _control_t10,
        "a step size 1 % above the limit",
    ),
    Theorem(
        "T11",
        "For a wide tanh net there is an interval of damping values in which mini-block steps are certified to "
        "converge like (1 - eta)^k",
        r"\kappa_{\min} - C' \ge \frac{1}{1+\sqrt{1-\eta}},\; \kappa_{\max} + C' \le \frac{1+\sqrt{1-\eta}}{\eta} "
        r"\;\Rightarrow\; \|e_k\|^2 \le (1-\eta)^k\|e_0\|^2",
        _SECTION,
        _check_t11,
        _control_t11,
        "damping below and above the interval",
    ),
    Theorem(
        "T12",
        "The step is short where the damping is large, and K falls monotonically between two known bounds",
        r"\|d\|^2 \le \frac{e^\top K e}{n\lambda},\; \frac{\lambda_{\min}(JJ^\top)}{\max_b\|G_b\| + n\lambda} \le "
        r"\kappa \le \min\Big(B, \frac{\|J\|^2}{n\lambda}\Big)",
        _SECTION,
        _check_t12,
        _control_t12,
        "the step is damped by a hundredth of the lambda of the bound",
    ),
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
