"""T10: on a linear model the step size up to which mini-block steps converge like (1 - eta)^k is known exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..function_space.certificates import linear_limit, run
from ..function_space.function_models import LinearModel
from ..function_space.function_space import FunctionSpace, spectrum
from ..function_space.function_structures import PerOutputBlocks
from ..function_space.library_runs import disagreement, library_residuals
from ..theorem import Curve, Evidence, Inequality, Plot, Setting, Theorem, worst

__all__ = ["THEOREMS", "random_linear_model"]

_BLOCKS = PerOutputBlocks()
_T10_DAMPING, _T10_MODELS, _T10_STEPS = 0.05, 6, 10


def random_linear_model(setting: Setting, stream: int) -> LinearModel:
    """Six points, ten blocks of four parameters, N(0, 1) features and targets."""
    generator = setting.generator(stream)
    features = torch.randn(6, 10, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(6, generator=generator, dtype=torch.float64)
    return LinearModel(features.to(setting.device), targets.to(setting.device))


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
    engine = run(FunctionSpace(first), _BLOCKS, _T10_DAMPING, limits[0], _T10_STEPS)
    library = library_residuals(first, "per-output", _T10_DAMPING, limits[0], _T10_STEPS)
    return Evidence(
        (
            worst("|e_k|^2 / |e_0|^2 <= (1 - eta)^k at the limit", measured, bounds),
            worst("|e+ - (I - eta K) e| / (eta |e|) = 0", [entry.defect for entry in engine.records], 0.0),
            worst("worst start, 1.01 times the limit: ratio >= 1 - eta", above, above_bounds, ">="),
            Inequality("library's MBF against the function-space run", disagreement(library, engine.residuals), 1e-9),
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


THEOREMS: tuple[Theorem, ...] = (
    Theorem(
        "T10",
        "On a model linear in its parameters, mini-block steps converge like (1 - eta)^k from every start exactly up "
        "to a limit of eta",
        r"\|e_k\|^2 \le (1-\eta)^k \|e_0\|^2 \;\forall e_0 \iff \eta \le \min_i (2\kappa_i - 1)/\kappa_i^2",
        "ours, docs/PAPERS.md section 2.5, after arXiv:2202.04124 (set-up of its theorem)",
        _check_t10,
        _control_t10,
        "a step size 1 % above the limit",
    ),
)
