"""Every theorem holds, every control fails, and a broken ingredient is noticed."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from osculate.analysis.function_space.function_space import FunctionSpace
from osculate.analysis.function_space.function_structures import PerOutputBlocks, Solved
from osculate.analysis.theorem import Setting, Theorem, verify
from osculate.analysis.theorems import joint_layer_steps, layer_steps, linear_limit, mini_block_convergence, trails
from osculate.analysis.theorems import natural_gradient_limit as whole
from osculate.analysis.theorems.layer_problems import exact_layerwise_rule, random_problems, run_rule
from torch import Tensor

MODULES = (linear_limit, mini_block_convergence, whole, layer_steps, joint_layer_steps, trails)
THEOREMS = [theorem for module in MODULES for theorem in module.THEOREMS]


@pytest.mark.parametrize("theorem", THEOREMS, ids=lambda theorem: theorem.name)
def test_the_theorem_holds_and_its_control_fails(theorem: Theorem) -> None:
    verdict = verify(theorem, Setting(seed=1))
    failing = [entry for entry in (*verdict.evidence.inequalities, *verdict.evidence.assumptions) if not entry.holds]
    assert verdict.ok, failing
    assert verdict.evidence.plots
    if theorem.name != "T12":
        assert verdict.evidence.assumptions
    for control in verdict.controls:
        assert not any(entry.holds for entry in control.inequalities)


def test_names_are_those_of_the_papers() -> None:
    assert [theorem.name for theorem in THEOREMS] == ["T10", "T11", "T12", "T13", "T14", "T18", "T19"]


@dataclass(frozen=True)
class Scaled:
    """Per-output blocks that report ``factor`` times their K."""

    factor: float

    def solve(self, space: FunctionSpace, theta: Tensor, residual: Tensor, damping: float) -> Solved:
        solved = PerOutputBlocks().solve(space, theta, residual, damping)
        return replace(solved, kernel=self.factor * solved.kernel)


@pytest.mark.parametrize("module, name", [(linear_limit, "T10"), (mini_block_convergence, "T12")])
@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_a_wrong_k_violates(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, factor: float) -> None:
    theorem = next(entry for entry in module.THEOREMS if entry.name == name)
    monkeypatch.setattr(module, "_BLOCKS", Scaled(factor))
    assert theorem.check(Setting(seed=1)).status == "violated"


def test_a_library_that_damps_differently_violates(monkeypatch: pytest.MonkeyPatch) -> None:
    original = linear_limit.library_residuals

    def other(model: Any, structure: str, damping: float, eta: float, steps: int) -> list[Tensor]:
        return original(model, structure, damping * (1 + 1e-6), eta, steps)

    monkeypatch.setattr(linear_limit, "library_residuals", other)
    monkeypatch.setattr(linear_limit, "_T10_MODELS", 1)
    evidence = linear_limit.THEOREMS[0].check(Setting())
    assert [entry.name for entry in evidence.inequalities if not entry.holds] == [
        "library's MBF against the function-space run"
    ]


def test_widths_of_the_setting_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_block_convergence, "_T11_GRID", (1e-3, 1.0, 4))
    evidence = mini_block_convergence.THEOREMS[0].check(Setting(widths=(64, 100)))
    assert {"lambda_low (64)", "lambda_up (100)"} <= set(evidence.constants)
    assert len(evidence.plots) == 4


def test_layer_problems_follow_the_formula() -> None:
    for problem in random_problems(Setting(), 0.2)[:4]:
        library = run_rule(problem.model, exact_layerwise_rule(0.2), 0.3, 3)
        for left, right in zip(library, problem.reference(0.3, 3), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_layer_jacobians_are_those_of_autograd() -> None:
    net, points, _ = layer_steps.deep_net(Setting())
    found = layer_steps.layer_jacobians(net, dict(net.named_parameters()), points)
    assert [block.shape[1] for block in found] == [4 * 16 + 16, 16 * 16 + 16, 17]
    net(points[2:3]).sum().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])
    torch.testing.assert_close(torch.cat(found, 1)[2], expected)


def test_expected_shares_are_those_of_a_long_run() -> None:
    curvature, rate, momentum, new = 0.5, 0.6, 0.3, 0.2
    fresh, old, _ = trails.expected_shares(curvature, rate, momentum, new)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64).tolist()
    theta = velocity = average = 0.0
    sums = [0.0, 0.0, 0.0]
    for value in noise:
        gradient = curvature * theta + value
        velocity = momentum * velocity + (1.0 - momentum) * gradient
        theta -= rate * velocity
        average += new * (theta - average)
        way = theta - average
        for index, term in enumerate((curvature * theta * way, gradient * way, curvature * way * way)):
            sums[index] += term
    assert sums[0] / sums[2] == pytest.approx(fresh, rel=0.02)
    assert sums[1] / sums[2] == pytest.approx(old, rel=0.02)


def test_a_rule_that_forgets_otherwise_violates_t19(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(trails.TrailScaled):
        def keeps(self, step: int) -> float:
            return super().keeps(step) ** (1 + step % 2)

    (theorem,) = trails.THEOREMS
    assert theorem.check(Setting()).status == "held"
    weights = trails.trail(Setting(), trails.TrailScaled(), trails._slope, 0.5, 0.0)
    measured, stated, *_ = trails._shares(weights, trails._slope, Other(), trails._quadratic)
    assert max(abs(one - two) for one, two in zip(measured, stated, strict=True)) > 1e-2
