"""T16: with one layer and a quadratic loss the layer-wise step is the exact line search along its direction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...curvature.quadratic_forms import ExactHessian
from ...framework.methods.method import Method
from ...framework.methods.momentum import EMA
from ...framework.optimizer.build import build
from ...preconditioners.structures.identity import Identity
from ...stepsize.layerwise import LayerwiseQuadratic, MomentumSlope, Separate
from ..theorem import Control, Curve, Evidence, Plot, Setting, Theorem, worst
from .instances import Draws, network

__all__ = ["THEOREMS"]

_PROBLEMS, _SAMPLES = 12, 16


class _SideBySide(nn.Module):
    """The sum of linear maps of the same input: quadratic in all weights, but with several layers."""

    def __init__(self, inputs: int, outputs: int, layers: int):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return torch.stack([part(x) for part in self.parts]).sum(0)


def _method(factor: float) -> Method:
    """The formula of PAPERS 3.2 along the negative gradient, with exact curvature and no damping."""
    rule = LayerwiseQuadratic(
        curvature=ExactHessian(), decay=0.0, coupling=Separate(), slope=MomentumSlope(), factor=factor
    )
    return Method(preconditioner=Identity(), momentum=EMA(0.0), step_size=rule, defaults={"lr": 1.0})


def _one_step(draws: Draws, layers: int, factor: float) -> tuple[Tensor, Tensor]:
    """Relative slope along the direction after one step of the optimizer, and the loss along it (11 points)."""
    inputs, outputs = int(draws.choice(5)) + 2, int(draws.choice(4)) + 1
    model = network(draws, _SideBySide(inputs, outputs, layers))
    x, target = draws.normal(_SAMPLES, inputs), draws.normal(_SAMPLES, outputs)
    optimizer = build(_method(factor), model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = 0.5 * (model(x) - target).square().sum() / _SAMPLES
        loss.backward()
        return loss

    start = [parameter.detach().clone() for parameter in model.parameters()]
    closure()
    before = [_slope(parameter) for parameter in model.parameters()]
    optimizer.step(closure)
    steps = [parameter.detach() - old for parameter, old in zip(model.parameters(), start, strict=True)]
    closure()
    after = torch.stack([(_slope(p) * step).sum() for p, step in zip(model.parameters(), steps, strict=True)]).sum()
    initial = torch.stack([(slope * step).sum() for slope, step in zip(before, steps, strict=True)]).sum()
    return after.abs() / initial.abs(), _along(model, start, steps, closure)


def _slope(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach().clone()


def _along(model: nn.Module, start: list[Tensor], steps: list[Tensor], closure: Callable[[], Tensor]) -> Tensor:
    """The loss at 0, 0.2, ... 2 times the step."""
    values = []
    for share in torch.linspace(0.0, 2.0, 11).tolist():
        with torch.no_grad():
            for parameter, old, step in zip(model.parameters(), start, steps, strict=True):
                parameter.copy_(old + share * step)
        values.append(closure().detach())
    return torch.stack(values)


def _check(setting: Setting, layers: int = 1, factor: float = 1.0) -> Evidence:
    """Random least-squares problems.

    Args:
        setting: seed and device.
        layers: linear maps side by side, each with its own exact step; more than one: a control.
        factor: multiplies the step; not 1: a control.
    """
    draws = Draws(setting, 160)
    slopes, losses = zip(*(_one_step(draws, layers, factor) for _ in range(_PROBLEMS)), strict=True)
    axis = torch.linspace(0.0, 2.0, 11).tolist()
    curves = tuple(
        Curve(f"problem {index + 1}", axis, (values / values[0]).tolist()) for index, values in enumerate(losses[:5])
    )
    plot = Plot("Loss along the direction", "share of the step taken", "loss / loss before", curves)
    claim = worst("|derivative at the step| / |derivative before|", torch.stack(slopes), 1e-10)
    return Evidence((claim,), plots=(plot,))


THEOREMS = (
    Theorem(
        "T16",
        "With one layer and a quadratic loss the layer-wise step minimises the loss along its direction.",
        r"\alpha_l = \frac{-g_l^T d_l}{d_l^T C_l d_l} \Rightarrow "
        r"\frac{d}{d\alpha} f(\theta + \alpha d)|_{\alpha_l} = 0",
        "arXiv:2305.13664 (the idea); docs/PAPERS.md 3.2 (ours)",
        _check,
        partial(_check, layers=2),
        "two layers move together, each by its own exact step",
        (Control("the step is 1.5 times as long", partial(_check, factor=1.5)),),
    ),
)
