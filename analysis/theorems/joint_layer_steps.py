"""T18: joint layer steps, run by the library's own rule (PAPERS 7.2)."""

from __future__ import annotations

from functools import partial

import torch

from ...stepsize.protocol import StepSize
from ...stepsize.signs import Clipped, Safeguarded, Unrestricted
from ..theorem import Control, Curve, Evidence, Inequality, Plot, Setting, Theorem, worst
from .layer_problems import (
    STEPS,
    VANISHED,
    error_ratios,
    exact_joint_rule,
    exact_layerwise_rule,
    random_problems,
    run_rule,
)

__all__ = ["THEOREMS"]


def _joint_rates(setting: Setting, rule: StepSize) -> tuple[list[float], list[float]]:
    ratios, bounds = [], []
    for problem in random_problems(setting, 0.0, 1):
        found = error_ratios(run_rule(problem.model, rule, 1.0, STEPS))
        ratios += found
        bounds += [1.0 - problem.kappa / problem.layers] * len(found)
    return ratios, bounds


def _excess(setting: Setting) -> float:
    """|e+|^2 of one unrestricted joint step above its minimum over the layers' directions, relative to |e_0|^2."""
    gaps = []
    for problem in random_problems(setting, 0.0, 1):
        model = problem.model
        start = -model.targets
        gradients = torch.einsum("nls,n->ls", model.features, start)
        basis = torch.linalg.qr(torch.einsum("nls,ls->nl", model.features, gradients)).Q
        library = run_rule(model, exact_joint_rule(Unrestricted()), 1.0, 1)[1]
        minimum = start.square().sum() - (basis.T @ start).square().sum()
        gaps.append(abs(float((library.square().sum() - minimum) / start.square().sum())))
    return max(gaps)


def _check_t18(setting: Setting) -> Evidence:
    entries = []
    for sign in (Unrestricted(), Safeguarded()):
        ratios, bounds = _joint_rates(setting, exact_joint_rule(sign))
        name = type(sign).__name__
        entries.append(worst(f"{name}: |e+|^2 / |e|^2 <= 1", ratios, 1.0))
        entries.append(worst(f"{name}: |e+|^2 / |e|^2 <= 1 - kappa / L", ratios, bounds))
    kappa = [problem.kappa for problem in random_problems(setting, 0.0, 1)]
    entries.append(Inequality("joint step against the least-squares minimum, in |e+|^2", _excess(setting), 1e-8))
    return Evidence(
        tuple(entries),
        (worst("kappa > 0", kappa, 1e-12, ">=", 0.0),),
        {"smallest kappa": min(kappa), "problems": float(len(kappa))},
        (_joint_plot(setting),),
    )


def _joint_plot(setting: Setting) -> Plot:
    """Error over steps of the problem on which clipping does worst."""
    rules: dict[str, StepSize] = {
        "joint, unrestricted": exact_joint_rule(Unrestricted()),
        "joint, safeguarded": exact_joint_rule(Safeguarded()),
        "joint, clipped": exact_joint_rule(Clipped()),
        "per layer, eta = 1": exact_layerwise_rule(0.0),
    }
    problems = random_problems(setting, 0.0, 1)
    hardest = max(
        problems, key=lambda problem: max(error_ratios(run_rule(problem.model, rules["joint, clipped"], 1.0, 1)))
    )
    curves = []
    for name, rule in rules.items():
        errors = torch.stack(run_rule(hardest.model, rule, 1.0, STEPS)).square().sum(1)
        kept = errors.clamp(min=float(errors[0]) * VANISHED).tolist()
        style = "measured" if name.endswith(("restricted", "guarded")) else "control"
        curves.append(Curve(name, list(range(len(kept))), kept, style))  # type: ignore[arg-type]
    bound = [
        float(hardest.model.targets.square().sum()) * (1.0 - hardest.kappa / hardest.layers) ** k
        for k in range(STEPS + 1)
    ]
    curves.append(Curve("(1 - kappa / L)^k |e_0|^2", list(range(STEPS + 1)), bound, "bound"))
    return Plot("T18: joint layer steps on a linear model", "step", "|e|^2", tuple(curves), y_log=True)


def _control(setting: Setting, rule: StepSize, name: str) -> Evidence:
    return Evidence((worst(f"{name}: |e+|^2 / |e|^2 <= 1", _joint_rates(setting, rule)[0], 1.0),))


THEOREMS: tuple[Theorem, ...] = (
    Theorem(
        "T18",
        "Joint layer steps never increase the error of a linear model and are at least as good as layer-wise ones with "
        "the best factor",
        r"\|e^+\|^2 = \min_\alpha \|e - \textstyle\sum_l \alpha_l J_l d_l\|^2 \le (1 - \kappa/L)\|e\|^2",
        "ours, docs/PAPERS.md section 7.2",
        _check_t18,
        partial(_control, rule=exact_layerwise_rule(0.0), name="per-layer steps, eta = 1"),
        "each layer by itself with eta = 1",
        (
            Control(
                "joint steps, negative ones clipped at zero (the default)",
                partial(_control, rule=exact_joint_rule(Clipped()), name="joint steps clipped at zero"),
            ),
        ),
    ),
)
