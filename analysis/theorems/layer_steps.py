"""T14: layer-wise steps, run by the library's own rule (PAPERS 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ...framework.optimizer.second_order import SecondOrder
from ..theorem import Curve, Evidence, Inequality, Plot, Setting, Theorem, worst
from .layer_problems import STEPS, error_ratios, exact_layerwise_rule, random_problems, rule_optimizer, run_rule

__all__ = ["THEOREMS", "deep_net", "layer_jacobians"]

_T14_DAMPINGS = (0.0, 0.1)
_T14_SHARES = (0.5, 1.0, 1.5)
"""eta L, in (0, 2)."""


def _linear_rates(setting: Setting, step: Callable[[int, float], float]) -> tuple[list[float], list[float]]:
    """Ratios and the bound 1 - eta (2 - eta L) kappa, where eta = ``step(L, share)`` but the bound takes share / L."""
    ratios, bounds = [], []
    for damping in _T14_DAMPINGS:
        for problem in random_problems(setting, damping):
            for share in _T14_SHARES:
                claimed = share / problem.layers
                eta = step(problem.layers, share)
                found = error_ratios(run_rule(problem.model, exact_layerwise_rule(damping), eta, STEPS))
                ratios += found
                bounds += [1.0 - claimed * (2.0 - share) * problem.kappa] * len(found)
    return ratios, bounds


def _library_gap(setting: Setting) -> float:
    """Library against the formulas, over the problems."""
    gaps = []
    for problem in random_problems(setting, 0.1)[:6]:
        eta = 1.0 / problem.layers
        library = run_rule(problem.model, exact_layerwise_rule(0.1), eta, STEPS)
        pairs = zip(library, problem.reference(eta, STEPS), strict=True)
        gaps.append(max(float((a - b).norm() / problem.model.targets.norm()) for a, b in pairs))
    return max(gaps)


def _block_diagonals(setting: Setting) -> list[float]:
    """Smallest eigenvalues of L blockdiag(H) - H, relative to |H|, for random semi-definite H."""
    found = []
    generator = setting.generator(3000)
    for index in range(200):
        layers, size = 2 + index % 5, 1 + index % 4
        order = layers * size
        rank = 1 + index % order
        root = torch.randn(rank, order, generator=generator, dtype=torch.float64)
        matrix = root.T @ root
        mask = torch.block_diag(*[torch.ones(size, size, dtype=torch.float64)] * layers)
        gap = torch.linalg.eigvalsh(layers * matrix * mask - matrix)[0]
        found.append(float(gap / torch.linalg.matrix_norm(matrix, 2)))
    return found


def deep_net(setting: Setting) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A three-layer tanh net, eight points and their targets, float64, drawn from the setting's seed."""
    generator = setting.generator(3100)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).to(torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 1.0 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    points = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(8, generator=generator, dtype=torch.float64)
    return net.to(setting.device), points.to(setting.device), targets.to(setting.device)


def layer_jacobians(net: nn.Module, parameters: dict[str, Tensor], points: Tensor) -> list[Tensor]:
    """J_l, (n, P_l), of every layer: weight and bias together, row by row."""

    def output(values: dict[str, Tensor], point: Tensor) -> Tensor:
        result: Tensor = functional_call(net, values, (point.unsqueeze(0),))
        return result.squeeze()

    gradients = vmap(grad(output), (None, 0))(parameters, points)
    layers: dict[str, list[Tensor]] = {}
    for name, value in gradients.items():
        layers.setdefault(name.rpartition(".")[0], []).append(value.flatten(1))
    return [torch.cat(values, 1) for values in layers.values()]


def _nonlinear_rates(setting: Setting, damping: float, share: float, steps: int) -> tuple[list[float], list[float]]:
    """|e+| / |e| and sqrt(1 - eta (2 - eta L) kappa) + sup |J(theta_s) - J(theta)| |theta+ - theta| / |e|."""
    net, points, targets = deep_net(setting)
    optimizer = rule_optimizer(net, exact_layerwise_rule(damping), share / 3)
    before = [{name: value.detach().clone() for name, value in net.named_parameters()}]
    residuals = []
    for _ in range(steps):
        pair = _one_step(net, points, targets, optimizer)
        residuals.append(pair)
        before.append({name: value.detach().clone() for name, value in net.named_parameters()})
    optimizer.close()
    measured = [float(after.norm() / start.norm()) for start, after in residuals]
    bounds = [
        _deep_bound(net, points, (first, second), (damping, share), float(start.norm()))
        for first, second, (start, _) in zip(before, before[1:], residuals, strict=False)
    ]
    return measured, bounds


def _one_step(net: nn.Module, points: Tensor, targets: Tensor, optimizer: SecondOrder) -> tuple[Tensor, Tensor]:
    optimizer.zero_grad()
    start: Tensor = net(points).squeeze(1) - targets
    (0.5 * start.square().mean()).backward()
    optimizer.step()
    with torch.no_grad():
        return start.detach(), net(points).squeeze(1) - targets


def _deep_bound(
    net: nn.Module,
    points: Tensor,
    ends: tuple[dict[str, Tensor], dict[str, Tensor]],
    numbers: tuple[float, float],
    error: float,
) -> float:
    damping, share = numbers
    first, second = ends
    blocks = layer_jacobians(net, first, points)
    whole = torch.cat(blocks, 1)
    largest = max(float(torch.linalg.matrix_norm(block, 2)) ** 2 for block in blocks)
    kappa = float(torch.linalg.eigvalsh(whole @ whole.T)[0]) / (largest + len(points) * damping)
    eta = share / len(blocks)
    change = 0.0
    for point in torch.linspace(0.1, 1.0, 10, dtype=torch.float64).tolist():
        between = {name: torch.lerp(value, second[name], point) for name, value in first.items()}
        moved = torch.cat(layer_jacobians(net, between, points), 1)
        change = max(change, float(torch.linalg.matrix_norm(moved - whole, 2)))
    length = math.sqrt(sum(float((second[name] - value).square().sum()) for name, value in first.items()))
    return math.sqrt(1.0 - eta * (2.0 - share) * max(kappa, 0.0)) + change * length / error


_DEEP = ((0.0, 1.0), (0.0, 0.5), (0.1, 1.0), (1.0, 1.5))
_DEEP_STEPS = 20


def _check_t14(setting: Setting) -> Evidence:
    ratios, bounds = _linear_rates(setting, lambda layers, share: share / layers)
    runs = [_nonlinear_rates(setting, damping, share, _DEEP_STEPS) for damping, share in _DEEP]
    steps = list(range(1, _DEEP_STEPS + 1))
    rank = [problem.kappa for problem in random_problems(setting, 0.0)]
    return Evidence(
        (
            worst("linear model: |e+|^2 / |e|^2 <= 1 - eta (2 - eta L) kappa", ratios, bounds),
            worst("L blockdiag(H) - H >= 0, relative to |H|", _block_diagonals(setting), 0.0, ">=", 1e-12),
            worst("tanh net: |e+| / |e| <= sqrt(1 - eta (2 - eta L) kappa) + eta C'", _flat(runs, 0), _flat(runs, 1)),
            Inequality("library's LayerwiseQuadratic against the formula", _library_gap(setting), 1e-9),
        ),
        (worst("linear models: kappa > 0", rank, 1e-12, ">=", 0.0),),
        {"smallest kappa": min(rank), "largest kappa": max(rank)},
        (
            Plot(
                "T14: layer-wise steps on a three-layer tanh net, eta = 1/L, no damping",
                "step",
                "|e+| / |e|",
                (Curve("measured", steps, runs[0][0]), Curve("bound", steps, runs[0][1], "bound")),
            ),
        ),
    )


def _flat(runs: Sequence[tuple[list[float], list[float]]], side: int) -> list[float]:
    return [value for entry in runs for value in entry[side]]


def _control_t14(setting: Setting) -> Evidence:
    ratios, bounds = _linear_rates(setting, lambda layers, share: 1.0)
    return Evidence((worst("linear model, eta = 1: |e+|^2 / |e|^2 <= 1 - kappa / L and the like", ratios, bounds),))


THEOREMS: tuple[Theorem, ...] = (
    Theorem(
        "T14",
        "Layer-wise steps with a factor eta < 2/L converge linearly on a linear model; on a net up to how far its "
        "Jacobian moves",
        r"\|e^+\| \le \Big(\sqrt{1 - \eta(2 - \eta L)\kappa} + \eta C'\Big)\|e\|, \quad "
        r"H \preceq L\,\mathrm{blockdiag}(H)",
        "ours, docs/PAPERS.md section 3.5, for arXiv:2305.13664v3",
        _check_t14,
        _control_t14,
        "the step without the factor 1/L",
    ),
)
