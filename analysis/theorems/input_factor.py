"""T6: the Hessian-action update of K-BFGS's input side never moves H_a away from the inverse of a fixed A (PAPERS 1.4).

With A_LM = A + lambda I and E = A_LM^{1/2} H_a A_LM^{1/2}, an update replaces E by (I - u u') E (I - u u') + u u'.
Hence min(1, lambda_min E) <= lambda(E+) <= max(1, lambda_max E), and |E+ - I|_F^2 <= |E - I|_F^2 - |(E - I) u|^2.
Summed over updates, the errors |(E_k - I) u_k|^2 add up to at most |E_0 - I|_F^2: on the span of the mean inputs that
keep coming, H_a tends to the inverse, if slowly where E_0 is far away. E is computed up to an orthogonal change of
basis, as L' H_a L with A_LM = L L'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...curvature.layers.discovery import discover_layers
from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.factors.bfgs import HessianActionBFGS, HessianActionState
from ...preconditioners.pairs.skipping import CurvatureTest
from ..theorem import Control, Curve, Evidence, Plot, Setting, Theorem, worst
from .instances import Draws, each, eigenvalues

__all__ = ["THEOREMS"]

_COUNT, _ORDER, _UPDATES, _VISITED = 400, 5, 150, 2
_LAMBDA = 0.1
_LAYER = discover_layers(nn.Linear(1, 1, bias=False))[0]


def _updated(inverse: Tensor, moment: Tensor, mean: Tensor, damping: float) -> Tensor:
    """H_a after the factor has seen one mean input; instances in front."""
    factor = HessianActionBFGS(skip=CurvatureTest(0.0))

    def one(inverse: Tensor, moment: Tensor, mean: Tensor) -> Tensor:
        state = HessianActionState(moment, inverse.clone(), 1.0)
        before = LayerStatistics(_LAYER, 1, 1, inputs=mean.unsqueeze(0))
        factor.observe_step(state, before, None, "inputs", damping)
        return state.inverse

    result: Tensor = each(one, inverse, moment, mean)
    return result


def _root(moment: Tensor) -> Tensor:
    """(n, d, d) L with L L' = A + lambda I."""
    identity = torch.eye(_ORDER, dtype=moment.dtype, device=moment.device)
    root: Tensor = torch.linalg.cholesky(moment + _LAMBDA * identity)
    return root


def _relative(inverse: Tensor, moment: Tensor) -> Tensor:
    """E, up to an orthogonal change of basis."""
    root = _root(moment)
    return root.mT @ inverse @ root


def _unit(moment: Tensor, step: Tensor) -> Tensor:
    """(n, d) u = L' s / |L' s|."""
    moved: Tensor = (_root(moment).mT @ step.unsqueeze(2)).squeeze(2)
    length: Tensor = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return moved / length


def _distance(relative: Tensor) -> Tensor:
    """(n,) |E - I| in the Frobenius norm."""
    identity = torch.eye(_ORDER, dtype=relative.dtype, device=relative.device)
    distance: Tensor = torch.linalg.vector_norm((relative - identity).flatten(1), dim=1)
    return distance


@dataclass
class _Trace:
    """What is gathered over the updates, one tensor of instances per update."""

    low: list[Tensor]
    high: list[Tensor]
    shrunk: list[Tensor]
    secant: list[Tensor]
    distance: list[Tensor]
    spent: list[Tensor]


def _run(setting: Setting, drifting: bool, action: float) -> tuple[_Trace, Tensor, Tensor]:
    """150 updates with two mean inputs that keep coming; the relative error on their span at the end; |E_0 - I|_F^2."""
    draws = Draws(setting, 600)
    moment = draws.positive_definite(_COUNT, _ORDER, 1.5, 0.2)
    inverse = draws.positive_definite(_COUNT, _ORDER, 2.0, 0.5)
    visited = draws.normal(_VISITED, _COUNT, _ORDER)
    start = _distance(_relative(inverse, moment)).square()
    trace = _Trace([], [], [], [], [], [])
    identity = torch.eye(_ORDER, dtype=moment.dtype, device=moment.device)
    for index in range(_UPDATES):
        before = _relative(inverse, moment)
        mean = visited[index % _VISITED]
        step = (inverse @ mean.unsqueeze(2)).squeeze(2)
        inverse = _updated(inverse, moment, mean, action)
        change = ((moment + _LAMBDA * identity) @ step.unsqueeze(2)).squeeze(2)
        unit = _unit(moment, step)
        if drifting:
            moment = draws.positive_definite(_COUNT, _ORDER, 1.5, 0.2)
        trace.spent.append((before @ unit.unsqueeze(2)).squeeze(2).sub(unit).square().sum(1))
        after = _relative(inverse, moment)
        old, new = eigenvalues(before), eigenvalues(after)
        trace.low.append(new[:, 0] / old[:, 0].clamp(max=1.0))
        trace.high.append(new[:, -1] / old[:, -1].clamp(min=1.0))
        trace.distance.append(_distance(after))
        trace.shrunk.append(trace.distance[-1] / _distance(before))
        back = (inverse @ change.unsqueeze(2)).squeeze(2)
        trace.secant.append((back - step).norm(dim=1) / step.norm(dim=1))
    exact = torch.cholesky_inverse(_root(moment))
    errors = [
        ((inverse - exact) @ mean.unsqueeze(2)).flatten(1).norm(dim=1)
        / (exact @ mean.unsqueeze(2)).flatten(1).norm(dim=1)
        for mean in visited
    ]
    return trace, torch.stack(errors), start


def _check(setting: Setting, drifting: bool = False, action: float = _LAMBDA) -> Evidence:
    """Random A, H_a and mean inputs.

    Args:
        setting: seed and device.
        drifting: A is another matrix after every update: a control.
        action: the damping that the update is given; not lambda: a control.
    """
    trace, errors, start = _run(setting, drifting, action)
    inequalities = (
        worst("lambda_min(E+) / min(1, lambda_min(E))", torch.cat(trace.low), 1.0, ">=", 1e-8),
        worst("lambda_max(E+) / max(1, lambda_max(E))", torch.cat(trace.high), 1.0, "<=", 1e-8),
        worst("|E+ - I|_F / |E - I|_F", torch.cat(trace.shrunk), 1.0, "<=", 1e-8),
        worst("secant equation |H_a y - s| / |s|", torch.cat(trace.secant), 1e-9),
        worst("sum_k |(E_k - I) u_k|^2 / |E_0 - I|_F^2", torch.stack(trace.spent).sum(0) / start, 1.0, "<=", 1e-8),
    )
    constants = {
        "lambda": _LAMBDA,
        "updates": float(_UPDATES),
        "median relative error |H_a a - A_LM^{-1} a| on the span visited, at the end": float(errors.median()),
    }
    axis = [float(index + 1) for index in range(_UPDATES)]
    stacked = torch.stack(trace.distance)
    curves = tuple(
        Curve(name, axis, values.tolist(), "measured")
        for name, values in (
            ("largest", stacked.amax(1)),
            ("median", stacked.median(1).values),
            ("smallest", stacked.amin(1)),
        )
    )
    plot = Plot("Distance of the input factor from the exact inverse", "update", r"$\Vert E - I\Vert_F$", curves)
    return Evidence(inequalities, (), constants, (plot,))


THEOREMS = (
    Theorem(
        "T6",
        "With a fixed A the Hessian-action update interlaces: H_a never moves away from the inverse of A + lambda I, "
        "and its errors along the mean inputs that keep coming add up to a finite sum.",
        r"\min(1, \lambda_{min}(E)) \leq \lambda(E^+) \leq \max(1, \lambda_{max}(E)), \quad "
        r"E = A_{LM}^{1/2} H_a A_{LM}^{1/2}, \quad "
        r"\sum_k \Vert (E_k - I) u_k\Vert^2 \leq \Vert E_0 - I\Vert_F^2",
        "arXiv:2006.08877, section 3 (update); docs/PAPERS.md 1.4 (proof, ours)",
        _check,
        partial(_check, drifting=True),
        "A is another matrix after every update",
        (Control("the action leaves out the damping", partial(_check, action=0.0)),),
    ),
)
