"""Linear models whose blocks are layers, and the library's step-size rules on them, made exact (PAPERS 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...curvature.quadratic_forms import SampledScores
from ...framework.methods.method import Method
from ...framework.methods.momentum import NoMomentum
from ...framework.optimizer.build import build
from ...framework.optimizer.second_order import SecondOrder
from ...preconditioners.structures.identity import Identity
from ...stepsize.joint import JointLayerwise
from ...stepsize.layerwise import LayerwiseQuadratic, MomentumSlope, Separate
from ...stepsize.protocol import StepSize
from ...stepsize.signs import SignRule
from ..function_space.function_models import LinearModel
from ..function_space.library_runs import AsModule, UnitResiduals, train
from ..theorem import Setting

__all__ = [
    "STEPS",
    "VANISHED",
    "LinearProblem",
    "error_ratios",
    "exact_joint_rule",
    "exact_layerwise_rule",
    "random_problems",
    "rule_optimizer",
    "run_rule",
]

_PROBLEMS = 24
STEPS = 5
"""Steps of every run."""
VANISHED = 1e-18
"""Relative |e|^2 below which steps are rounding noise."""


@dataclass(frozen=True)
class LinearProblem:
    """A linear model whose blocks are layers, with what the bounds need.

    Attributes:
        model: features (n, L, size).
        damping: lambda >= 0 of the layer steps.
    """

    model: LinearModel
    damping: float

    @property
    def layers(self) -> int:
        """L."""
        return self.model.features.shape[1]

    @property
    def kappa(self) -> float:
        """lambda_min(J J') / (max_l |J_l|^2 + n lambda)."""
        features = self.model.features
        rows = features.flatten(1)
        largest = torch.linalg.matrix_norm(features.transpose(0, 1), 2).square().max()
        smallest = torch.linalg.eigvalsh(rows @ rows.T)[0]
        return float(smallest / (largest + features.shape[0] * self.damping))

    def reference(self, eta: float, steps: int) -> list[Tensor]:
        """e_0, ..., e_steps of e+ = e - eta sum_l alpha_l J_l J_l' e / n, straight from the formulas."""
        features, samples = self.model.features, self.model.features.shape[0]
        residuals = [-self.model.targets]
        for _ in range(steps):
            gradients = torch.einsum("nls,n->ls", features, residuals[-1]) / samples
            moved = torch.einsum("nls,ls->nl", features, gradients)
            squares = gradients.square().sum(1)
            alpha = squares / (moved.square().sum(0) / samples + self.damping * squares)
            residuals.append(residuals[-1] - eta * moved @ alpha)
        return residuals


def random_problems(setting: Setting, damping: float, stream: int = 0) -> list[LinearProblem]:
    """Linear problems with 2 to 5 layers and 4 to 8 points; in every other one the layers share most of their features.

    Args:
        setting: seed and device.
        damping: lambda >= 0.
        stream: of the random numbers.
    """
    problems = []
    for index in range(_PROBLEMS):
        generator = setting.generator(2000 + 100 * stream + index)
        layers, samples = 2 + index % 4, 4 + index % 5
        features = torch.randn(samples, layers, 6, generator=generator, dtype=torch.float64)
        shared = torch.randn(samples, 1, 6, generator=generator, dtype=torch.float64)
        scales = torch.logspace(-0.5, 0.5, layers, dtype=torch.float64).unsqueeze(1)
        features = scales * (features + 2.0 * (index % 2) * shared)
        targets = torch.randn(samples, generator=generator, dtype=torch.float64)
        model = LinearModel(features.to(setting.device), targets.to(setting.device))
        problems.append(LinearProblem(model, damping))
    return problems


def exact_layerwise_rule(damping: float) -> LayerwiseQuadratic:
    """alpha_l = |g_l|^2 / (g_l' (C_l + lambda I) g_l), without averages; exact together with ``UnitResiduals``."""
    return LayerwiseQuadratic(SampledScores(), 1, 0.0, damping, Separate(), MomentumSlope(), 1.0)


def exact_joint_rule(sign: SignRule) -> JointLayerwise:
    """Joint steps without averages and ridges."""
    return JointLayerwise(SampledScores(), 1, 0.0, 0.0, 0.0, sign)


def rule_optimizer(module: nn.Module, rule: StepSize, eta: float) -> SecondOrder:
    """Gradient directions of the whole batch with a step-size rule; sampled forms are exact."""
    method = Method(Identity(), momentum=NoMomentum(), step_size=rule, defaults={"lr": 1.0})
    return build(method, module, lr=eta, likelihood=UnitResiduals())


def run_rule(model: LinearModel, rule: StepSize, eta: float, steps: int) -> list[Tensor]:
    """e_0, ..., e_steps of gradient directions with a step-size rule of the library."""
    module = AsModule(model)
    return train(module, module.inputs, model.targets, rule_optimizer(module, rule, eta), steps)


def error_ratios(residuals: Sequence[Tensor]) -> list[float]:
    """|e_{k+1}|^2 / |e_k|^2 until the error has vanished."""
    errors = torch.stack(list(residuals)).square().sum(1).tolist()
    return [after / before for before, after in pairwise(errors) if before > VANISHED * errors[0]]
