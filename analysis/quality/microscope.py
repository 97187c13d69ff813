"""The counterfactual step: what K methods would do from the same checkpoint with the same mini-batch.

Every method works on its own deep copy of the model. It first gathers statistics at the checkpoint itself: it takes
steps on other mini-batches, after each of which the parameters are put back. Then it takes one step on the mini-batch
in question, which is measured and not undone. It is taken in the mode the model is in; losses and curvature are those
of the evaluation mode, in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from ...errors import ArgumentError, NumericalError
from ...framework.optimizer.second_order import SecondOrder
from .exact_blocks import Probe
from .spectra import cosine

__all__ = ["MULTIPLES", "StepQuality", "compare_steps", "settle"]

MULTIPLES = tuple(index / 8.0 for index in range(17))
"""Of a step, at which the loss along it is measured."""


@dataclass(frozen=True)
class StepQuality:
    """One method's step p. A number that makes no sense is ``nan``.

    Attributes:
        method: its name.
        loss: of the mini-batch before the step.
        slope: g'p.
        curvature: p'Hp with the Hessian of the mini-batch loss.
        predicted: reduction of the loss in the quadratic model, -(g'p + p'Hp / 2).
        actual: its reduction in truth.
        ratio: actual / predicted; 1 where the model is exact.
        norm: |p| over all parameters.
        best_multiple: c > 0 that minimises the quadratic model along c p; ``nan`` where it has no minimum. Below 1 the
            step is too long, above 1 too short.
        along: loss of the mini-batch at ``MULTIPLES`` of the step; ``None`` if there was none.
        cosines: of the angles to the steps of all methods, by name.
        trouble: why the method took no step, else empty.
    """

    method: str
    loss: float
    slope: float = math.nan
    curvature: float = math.nan
    predicted: float = math.nan
    actual: float = math.nan
    ratio: float = math.nan
    norm: float = math.nan
    best_multiple: float = math.nan
    along: tuple[float, ...] | None = None
    cosines: Mapping[str, float] | None = None
    trouble: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, one column per angle; not the loss along the step."""
        own = asdict(self)
        cosines = own.pop("cosines") or {}
        own.pop("along")
        return own | {f"cosine {name}": value for name, value in cosines.items()}


def settle(optimizer: SecondOrder, probes: Sequence[Probe]) -> None:
    """Let a method gather statistics where its model stands: one step per mini-batch, parameters put back each time.

    Quasi-Newton methods see honest secant pairs this way, all of them from steps that start at the checkpoint.

    Args:
        optimizer: of the model; its state changes.
        probes: the mini-batches.
    """
    parameters = [parameter for block in optimizer.blocks for parameter in block.parameters]
    origin = [parameter.detach().clone() for parameter in parameters]
    for probe in probes:
        _step(optimizer, probe)
        with torch.no_grad():
            for parameter, value in zip(parameters, origin, strict=True):
                parameter.copy_(value)


def compare_steps(
    optimizers: Mapping[str, SecondOrder], probe: Probe, history: Sequence[Probe] = (), settled: Sequence[str] = ()
) -> list[StepQuality]:
    """Take the step of every method and measure it.

    Args:
        optimizers: by name, each of a model of its own with the same parameters; they and their models are changed.
        probe: the mini-batch of the step.
        history: mini-batches on which statistics are gathered first.
        settled: names of those that have their statistics already.

    Raises:
        ArgumentError: if two models differ.
    """
    _require_same(optimizers)
    moves: dict[str, Tensor] = {}
    found: dict[str, StepQuality] = {}
    for name, optimizer in optimizers.items():
        before = copy.deepcopy(optimizer.model).eval()
        loss = float(_loss(before, probe))
        try:
            settle(optimizer, () if name in settled else history)
            _step(optimizer, probe)
        except NumericalError as error:
            found[name] = StepQuality(name, loss, trouble=str(error))
            continue
        moves[name], found[name] = _measured(name, before, optimizer.model, probe, loss)
    return [_with_angles(quality, moves) for quality in found.values()]


def _step(optimizer: SecondOrder, probe: Probe) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = probe.loss(optimizer.model(probe.inputs), probe.targets)
        loss.backward()
        return loss

    optimizer.step(closure)


def _loss(model: nn.Module, probe: Probe) -> Tensor:
    with torch.no_grad():
        return probe.loss(model(probe.inputs), probe.targets).double()


def _measured(name: str, before: nn.Module, model: nn.Module, probe: Probe, loss: float) -> tuple[Tensor, StepQuality]:
    """The step in float64, and the quadratic model along it."""
    after = copy.deepcopy(model).double().eval()
    origin, exact = before.double(), probe.double()
    point = {key: value.detach() for key, value in origin.named_parameters()}
    step = {key: value.detach() - point[key] for key, value in after.named_parameters()}
    start = _loss(origin, exact)
    objective = _Objective(origin, exact)
    slope, curvature = objective.along(point, step)
    flat = torch.cat([value.flatten() for value in step.values()])
    predicted, actual = -(slope + 0.5 * curvature), float(start - _loss(after, exact))
    return flat, StepQuality(
        name,
        loss,
        slope,
        curvature,
        predicted,
        actual,
        actual / predicted if predicted else math.nan,
        float(torch.linalg.vector_norm(flat)),
        -slope / curvature if curvature > 0.0 > slope else math.nan,
        objective.at(point, step),
    )


@dataclass(frozen=True)
class _Objective:
    """The mini-batch loss as a function of named parameters."""

    model: nn.Module
    probe: Probe

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        output = functional_call(self.model, dict(values), (self.probe.inputs,))
        return self.probe.loss(output, self.probe.targets)

    @torch.no_grad()
    def at(self, point: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> tuple[float, ...]:
        """Losses at multiples of the step."""
        return tuple(float(self({key: point[key] + c * step[key] for key in point})) for c in MULTIPLES)

    def along(self, point: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> tuple[float, float]:
        """g'p and p'Hp."""
        slope = grad(self)
        gradient, product = slope(dict(point)), torch.func.vjp(slope, dict(point))[1](dict(step))[0]
        first = sum(float(torch.sum(gradient[key] * step[key])) for key in step)
        second = sum(float(torch.sum(product[key] * step[key])) for key in step)
        return first, second


def _with_angles(quality: StepQuality, moves: Mapping[str, Tensor]) -> StepQuality:
    if quality.method not in moves:
        return quality
    own = moves[quality.method]
    cosines = {name: cosine(own, other) for name, other in moves.items()}
    return replace(quality, cosines=cosines)


def _require_same(optimizers: Mapping[str, SecondOrder]) -> None:
    models = [optimizer.model for optimizer in optimizers.values()]
    if len({id(model) for model in models}) < len(models):
        raise ArgumentError("every method needs a model of its own: build each on copy.deepcopy(model)")
    for model in models[1:]:
        pairs = zip(models[0].parameters(), model.parameters(), strict=True)
        if not all(torch.equal(first, second) for first, second in pairs):
            raise ArgumentError("the models differ: every method must start at the same parameters")
