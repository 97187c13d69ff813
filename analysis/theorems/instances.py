"""Random instances of what theorems speak about, many at a time, and the parts of the library applied to all of them.

The parts are written for one layer. ``torch.vmap`` runs the same code on thousands of instances at once: nothing is
written a second time for the sake of the checks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.layers.discovery import discover_layers
from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.averages import ZeroStartAverage
from ...preconditioners.factors.bfgs import BFGS, AveragedPair, BFGSState
from ...preconditioners.factors.lbfgs import LBFGS, LBFGSState
from ..theorem import Curve, Plot, Setting

__all__ = [
    "NEWEST",
    "Draws",
    "distribution",
    "each",
    "eigenvalues",
    "limited_memory",
    "network",
    "observed_pair",
    "updated_inverse",
]

NEWEST = ZeroStartAverage(0.0)
"""Average that keeps the newest pair only, so that a factor sees exactly the pair it is given."""

_LAYER = discover_layers(nn.Linear(1, 1, bias=False))[0]
"""Any layer: factors look at the statistics, not at the module."""


class Draws:
    """Random numbers of one stream of a setting, in float64, on its device; equal on all devices.

    Args:
        setting: seed and device.
        stream: a number of its own for every use, >= 0.
    """

    def __init__(self, setting: Setting, stream: int):
        self.generator, self.device = setting.generator(stream), setting.device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers in [low, high)."""
        unit = torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device)
        return low + (high - low) * unit

    def decades(self, low: float, high: float, *shape: int) -> Tensor:
        """10 to the power of uniform numbers in [low, high)."""
        return 10.0 ** self.uniform(low, high, *shape)

    def choice(self, count: int, *shape: int) -> Tensor:
        """Uniform integers 0 ... count - 1."""
        return torch.randint(0, count, shape, generator=self.generator).to(self.device)

    def rotations(self, count: int, size: int) -> Tensor:
        """(count, size, size) orthogonal matrices."""
        basis: Tensor = torch.linalg.qr(self.normal(count, size, size))[0]
        return basis

    def positive_definite(self, count: int, size: int, decades: float, scale: float = 1.0) -> Tensor:
        """(count, size, size) with log-uniform eigenvalues: condition up to 10^decades, size within 10^(+-scale)."""
        spread = self.uniform(0.0, decades, count, 1)
        exponents = self.uniform(-scale, scale, count, 1) - spread * self.uniform(0.0, 1.0, count, size)
        basis = self.rotations(count, size)
        matrix = (basis * (10.0**exponents).unsqueeze(1)) @ basis.mT
        return 0.5 * (matrix + matrix.mT)


def each(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """``function`` on every slice of the first axis, as one computation."""
    with warnings.catch_warnings():
        # In-place products have no batching rule: vmap loops over them, which is right, if not fast.
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        return torch.vmap(function)(*tensors)


def eigenvalues(matrices: Tensor) -> Tensor:
    """(..., d) eigenvalues of symmetric matrices, ascending; infinite for a matrix with an entry beyond 1e100."""
    finite = (matrices.abs().amax((-2, -1)) < 1e100)[..., None, None]  # false for a NaN
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    usable = torch.where(finite, matrices, identity)
    found = torch.linalg.eigvalsh(0.5 * (usable + usable.mT))
    return torch.where(finite[..., 0], found, torch.full_like(found, math.inf))


def observed_pair(
    step: Tensor, change: Tensor, reference: Tensor | None = None
) -> tuple[LayerStatistics, LayerStatistics]:
    """Statistics before and after a step of which a factor reads exactly the pair (s, y).

    Args:
        step: (d,) s.
        change: (d,) y.
        reference: (d,) mean gradient before the step, which sets the scale of skip rules; default 0.
    """
    zero = torch.zeros_like(step)
    gradient = zero if reference is None else reference
    before = LayerStatistics(_LAYER, 1, 1, mean_preactivation=zero, mean_gradient=gradient)
    return before, LayerStatistics(_LAYER, 1, 1, mean_preactivation=step, mean_gradient=gradient + change)


def updated_inverse(factor: BFGS, inverse: Tensor, step: Tensor, change: Tensor, damping: float) -> Tensor:
    """H after the factor has observed one pair; all arguments with instances in front."""

    def update(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
        zero = torch.zeros_like(step)
        state = BFGSState(inverse.clone(), AveragedPair(zero, zero.clone(), 0.0))
        factor.observe_step(state, *observed_pair(step, change), "outputs", damping)
        return state.inverse

    result: Tensor = each(update, inverse, step, change)
    return result


def limited_memory(
    factor: LBFGS, steps: Tensor, changes: Tensor, damping: float, reference: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """H, stored steps and stored changes after the factor has observed a sequence of pairs.

    Args:
        factor: with ``average=NEWEST``.
        steps: (instances, pairs, d) s.
        changes: (instances, pairs, d) y.
        damping: mu2.
        reference: (d,) mean gradient of every step; default 0.

    Returns:
        (instances, d, d), (instances, p, d), (instances, p, d); unused slots are zero.
    """

    def run(steps: Tensor, changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = _batched(factor.init(steps.shape[-1], steps), steps)
        for step, change in zip(steps, changes, strict=True):
            factor.observe_step(state, *observed_pair(step, change, reference), "outputs", damping)
        return factor.to_dense(state, damping), state.steps, state.changes

    result: tuple[Tensor, Tensor, Tensor] = each(run, steps, changes)
    return result


def _batched(state: LBFGSState, like: Tensor) -> LBFGSState:
    """A fresh state whose tensors belong to the instances of a running ``vmap``, so that they can be written."""
    zero = 0.0 * like.sum()
    pair = AveragedPair(state.pair.step + zero, state.pair.change + zero, state.pair.weight)
    return LBFGSState(
        state.steps + zero, state.changes + zero, state.cross + zero, state.gram + zero, state.solver + zero, pair
    )


def network(draws: Draws, *layers: nn.Module) -> nn.Sequential:
    """A float64 network on the device of the draws, its parameters normal with variance 1 / fan-in."""
    model = nn.Sequential(*layers).double().to(draws.device)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1.0
            parameter.copy_(draws.normal(*parameter.shape) / math.sqrt(fan))
    return model


def distribution(title: str, label: str, ratios: dict[str, Tensor]) -> Plot:
    """Sorted values of several ratios against the share of instances below them; the claim is that all are >= 1.

    They are shown from a thousandth to a million.
    """
    curves = [Curve(name, *_quantiles(values.clamp(1e-3, 1e6))) for name, values in ratios.items()]
    limit = Curve("bound", [0.0, 1.0], [1.0, 1.0], "bound")
    return Plot(title, "share of instances", label, (*curves, limit), y_log=True)


def _quantiles(values: Tensor) -> tuple[Sequence[float], Sequence[float]]:
    ordered = values.detach().flatten().cpu().sort().values
    index = torch.linspace(0, len(ordered) - 1, min(200, len(ordered))).long()
    return (index / max(1, len(ordered) - 1)).tolist(), ordered[index].tolist()
