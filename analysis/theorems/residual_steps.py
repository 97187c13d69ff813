"""T20: Gauss-Newton steps on residuals that contain derivatives, by the library's own optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...curvature.estimators import ExactGGN
from ...curvature.residuals.jacobian import JacobianReader
from ...framework.methods.method import Method
from ...framework.methods.momentum import NoMomentum
from ...framework.optimizer.second_order import SecondOrder
from ...framework.whole_model.method import WholeMethod
from ...framework.whole_model.optimizer import WholeModel
from ...preconditioners import Identity
from ...preconditioners.whole.models import GaussNewton
from ...stepsize.joint import JointLayerwise
from ...stepsize.search.levenberg_marquardt import Geodesic, LevenbergMarquardtSearch, Straight
from ...stepsize.search.lines import FullStep
from ...stepsize.search.protocol import Search
from ...stepsize.signs import Unrestricted
from ..theorem import Control, Curve, Evidence, Inequality, Plot, Setting, Theorem, worst

__all__ = ["THEOREMS"]

_PROBLEMS, _STEPS, _DAMPING = 6, 8, 1e-3
Residuals = Callable[[], Mapping[str, Tensor]]


class _Expansion(nn.Module):
    """u(x) = sum over two layers of coefficients times fixed waves: linear in what is trained, not in x."""

    def __init__(self, generator: torch.Generator, device: str):
        super().__init__()
        shapes = ((2, 6), (6,), (2, 5), (5,))
        drawn = [2.0 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.waves = [value.to(device) for value in drawn]
        self.first, self.second = nn.Linear(6, 1, bias=False), nn.Linear(5, 1, bias=False)
        for layer in (self.first, self.second):
            weight = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight = nn.Parameter(weight.to(device))

    def forward(self, points: Tensor) -> Tensor:
        """(N, 1)."""
        one, two = (
            torch.tanh(points @ self.waves[0] + self.waves[1]),
            torch.tanh(points @ self.waves[2] + self.waves[3]),
        )
        found: Tensor = self.first(one) + self.second(two)
        return found


def _poisson(model: nn.Module, inside: Tensor, edge: Tensor) -> Residuals:
    """u_xx + u_yy + 1 inside and u on the edge, by autograd."""

    def residuals() -> dict[str, Tensor]:
        points = inside.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        bends = [torch.autograd.grad(slope[:, axis].sum(), points, create_graph=True)[0][:, axis] for axis in (0, 1)]
        return {"interior": bends[0] + bends[1] + 1.0, "boundary": model(edge)}

    return residuals


@dataclass(frozen=True)
class _Instance:
    model: nn.Module
    residuals: Residuals

    def parameters(self) -> Tensor:
        return torch.cat([value.detach().flatten() for value in self.model.parameters()])

    def rows(self) -> tuple[Tensor, Tensor]:
        """A (V, P) with A'A the Gauss-Newton matrix, and the residuals in the same units."""
        named = dict(self.model.named_parameters())
        found = JacobianReader(list(named.values()), list(named)).evaluate(self.residuals)
        roots = found.curvatures.sqrt()
        return roots[:, None] * found.matrix(), roots * found.values


def _instance(setting: Setting, stream: int, *, linear: bool) -> _Instance:
    generator = setting.generator(stream)
    inside = torch.rand(20, 2, generator=generator, dtype=torch.float64).to(setting.device)
    edge = torch.rand(8, 2, generator=generator, dtype=torch.float64).round(decimals=0).to(setting.device)
    if linear:
        model: nn.Module = _Expansion(generator, setting.device)
    else:
        model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double().to(setting.device)
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64).to(setting.device))
    return _Instance(model, _poisson(model, inside, edge))


def _run(instance: _Instance, search: Search, damping: float, steps: int) -> list[Tensor]:
    """Weighted residuals before every step and after the last."""
    optimizer = WholeModel(instance.model, WholeMethod(GaussNewton(), search, damping))
    errors = []
    for _ in range(steps):
        errors.append(instance.rows()[1])
        optimizer.step(instance.residuals)
    return [*errors, instance.rows()[1]]


def _linear_rates(setting: Setting, eta: float) -> tuple[list[float], list[float], list[Tensor]]:
    """|e+| / |e| of damped steps with a constant length, and max_i |1 - eta kappa_i / (kappa_i + lambda)|."""
    ratios: list[float] = []
    bounds: list[float] = []
    first: list[Tensor] = []
    for stream in range(_PROBLEMS):
        instance = _instance(setting, stream, linear=True)
        rows, start = instance.rows()
        values = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0.0)
        damping = _DAMPING * float(values.max())
        moving = torch.linalg.qr(rows).Q
        shrinks = (1.0 - eta * values / (values + damping)).abs()
        errors = [moving.T @ error for error in _run(instance, FullStep(eta), _DAMPING, _STEPS)]
        ratios += [float(b.norm() / a.norm()) for a, b in pairwise(errors)]
        bounds += [float(shrinks.max())] * _STEPS
        first = first or [start, *errors]
    return ratios, bounds, first


def _joint_excess(setting: Setting) -> float:
    """|e|^2 after one joint step above its minimum over the layers' gradient directions, relative to before."""
    gaps = []
    for stream in range(_PROBLEMS):
        instance = _instance(setting, stream, linear=True)
        rows, start = instance.rows()
        gradient = rows.T @ start
        sizes = [value.numel() for value in instance.model.parameters()]
        pieces = gradient.split(sizes)
        basis = torch.stack([part @ piece for part, piece in zip(rows.split(sizes, 1), pieces, strict=True)], 1)
        best = torch.linalg.lstsq(basis, start[:, None]).solution
        minimum = float((start[:, None] - basis @ best).square().sum())
        rule = JointLayerwise(decay=0.0, relative_ridge=0.0, sign=Unrestricted())
        method = Method(Identity(), ExactGGN(), momentum=NoMomentum(), step_size=rule, defaults={"lr": 1.0})
        SecondOrder(instance.model, method, backend="residuals").step(instance.residuals)
        after = float(instance.rows()[1].square().sum())
        gaps.append(abs(after - minimum) / float(start.square().sum()))
    return max(gaps)


def _descents(setting: Setting, search: Search, damping: float) -> list[float]:
    """|e+|^2 / |e|^2 on networks; steps without a change at the rounding of the loss count as 1."""
    ratios = []
    for stream in range(_PROBLEMS):
        errors = _run(_instance(setting, stream, linear=False), search, damping, _STEPS)
        sizes = [float(error.square().sum()) for error in errors]
        ratios += [after / before for before, after in pairwise(sizes)]
    return [ratio if math.isfinite(ratio) else math.inf for ratio in ratios]


def _check(setting: Setting) -> Evidence:
    entries = []
    for eta in (0.5, 1.0, 1.7):
        ratios, bounds, _ = _linear_rates(setting, eta)
        entries.append(worst(f"eta = {eta:g}: |e+| / |e| <= max |1 - eta kappa / (kappa + lambda)|", ratios, bounds))
    for bend in (Straight(), Geodesic()):
        found = _descents(setting, LevenbergMarquardtSearch(bend), 1e-3)
        entries.append(worst(f"{type(bend).__name__}: loss after / before <= 1, networks", found, 1.0))
    entries.append(
        Inequality("joint step against the minimum over the layers' directions", _joint_excess(setting), 1e-8)
    )
    smallest = []
    for stream in range(_PROBLEMS):
        rows, _ = _instance(setting, stream, linear=True).rows()
        smallest.append(float(torch.linalg.svdvals(rows).min() / torch.linalg.svdvals(rows).max()))
    return Evidence(
        tuple(entries),
        (worst("sigma_min / sigma_max > 0", smallest, 1e-14, ">=", 0.0),),
        {"lambda / kappa_max": _DAMPING, "problems": float(_PROBLEMS)},
        (_plot(setting),),
    )


def _plot(setting: Setting) -> Plot:
    curves = []
    for eta in (0.5, 1.0, 1.7):
        errors = _linear_rates(setting, eta)[2][1:]
        sizes = [max(float(error.norm()), 1e-300) for error in errors]
        curves.append(Curve(f"eta = {eta:g}", list(range(len(sizes))), sizes))
    return Plot("T20: damped Gauss-Newton steps on Poisson's equation", "step", "|e|", tuple(curves), y_log=True)


def _too_long(setting: Setting) -> Evidence:
    ratios, _, _ = _linear_rates(setting, 2.5)
    return Evidence((worst("eta = 2.5: |e+| / |e| <= 1", ratios[_STEPS - 1 :: _STEPS], 1.0),))


def _unguarded(setting: Setting) -> Evidence:
    found = _descents(setting, FullStep(1.0), 1e-12)
    return Evidence((worst("full undamped steps: loss after / before <= 1, networks", found, 1.0),))


THEOREMS: tuple[Theorem, ...] = (
    Theorem(
        "T20",
        "On residuals with derivatives, linear in the parameters, damped Gauss-Newton steps converge at the rate of "
        "their worst eigenvalue and joint layer steps reach the minimum over the layers' directions; on networks "
        "Levenberg-Marquardt steps, straight or bent, never raise the loss",
        r"\|e^+\| \le \max_i |1 - \eta \kappa_i/(\kappa_i + \lambda)| \, \|e\|",
        "ours; the rate is that of T10 with the residuals' own Jacobian",
        _check,
        _too_long,
        "steps of 2.5 times the damped Gauss-Newton step",
        (Control("full undamped steps on networks, nobody looks at the loss", _unguarded),),
    ),
)
