"""The exact curvature of one block of parameters on one mini-batch, as products, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from ...curvature.backends.outputs import select_output
from ...curvature.likelihoods import Likelihood, resolve_likelihood
from ...curvature.records.statistics import Tensors
from ...errors import ArgumentError
from ...framework.optimizer.blocks import Block
from ...framework.optimizer.second_order import SecondOrder
from ...preconditioners.state import State
from .spectra import SymmetricOperator

__all__ = ["Probe", "Target", "block_gradient", "exact_block", "flat_direction", "flat_map", "in_double"]

Target = Literal["ggn", "hessian"]


@dataclass(frozen=True)
class Probe:
    """A mini-batch with its loss, on which something is measured.

    Args:
        inputs: (N, ...), what the model is called with.
        targets: whatever the loss takes.
        loss: of output and targets, a mean over samples, 0-dimensional.
        likelihood: of which the loss is the negative logarithm; needed for the Gauss-Newton matrix. Of a model that
            returns several tensors it reads the obvious one, such as ``logits``.
    """

    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: str | Likelihood | None = None

    def double(self) -> Probe:
        """In float64, integers as they are."""
        values = [value.double() if value.is_floating_point() else value for value in (self.inputs, self.targets)]
        return Probe(values[0], values[1], self.loss, self.likelihood)


def in_double(optimizer: SecondOrder) -> SecondOrder:
    """A copy of an optimizer with its model, both in float64, the model in evaluation mode; nobody's hooks are on it.

    Dropout is off and batch normalisation uses its averages: exact curvature couples no samples and draws nothing.
    """
    twin = copy.deepcopy(optimizer)
    twin.close()
    twin.model.double().eval()
    for block in twin.blocks:
        block.state = _in_double(block.state)
        block.storage = tuple(value.double() for value in block.storage)
        block.__post_init__()
    return twin


def _in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, State):
        return replace(value, **{entry.name: _in_double(getattr(value, entry.name)) for entry in fields(value)})
    return tuple(_in_double(entry) for entry in value) if isinstance(value, tuple) else value


def exact_block(twin: SecondOrder, block: Block, probe: Probe, target: Target) -> SymmetricOperator:
    """Gauss-Newton matrix or Hessian of the probe's loss over one block's parameters, all others held fixed.

    The Gauss-Newton matrix is J' H J / N with the Hessian H of the negative log-likelihood at the outputs; for the
    likelihoods that ship it is the Fisher matrix with labels from the model, because H does not depend on the label.
    It needs no root of H, whose memory grows with the square of the outputs.

    Args:
        twin: from :func:`in_double`.
        block: one of its blocks.
        probe: in float64.
        target: ``"ggn"`` or ``"hessian"``.

    Raises:
        ArgumentError: if the Gauss-Newton matrix is wanted and the probe names no likelihood.
    """
    point = _point(twin.model, block)
    shapes = [value.shape for value in point.values()]
    product = _ggn(twin.model, point, probe) if target == "ggn" else _hessian(twin.model, point, probe)

    def flat(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        named = {name: piece.reshape(shape) for name, piece, shape in zip(point, pieces, shapes, strict=True)}
        return torch.cat([value.detach().flatten() for value in product(named).values()])

    size = sum(shape.numel() for shape in shapes)
    return SymmetricOperator(size, flat, probe.inputs.device, vmap(flat))


def block_gradient(twin: SecondOrder, block: Block, probe: Probe) -> Tensor:
    """Gradient of the probe's loss over one block's parameters, flat; arguments as :func:`exact_block`."""
    point = _point(twin.model, block)
    slope = _slope(twin.model, probe)(point)
    return torch.cat([value.detach().flatten() for value in slope.values()])


def flat_direction(block: Block, vector: Tensor) -> Tensor:
    """The block's structure applied to a flat vector over its parameters (weight row by row, then bias)."""
    return flat_map(block, partial(block.part.precondition, block.state), vector)


@torch.no_grad()
def flat_map(block: Block, product: Callable[[Tensors], Tensors], vector: Tensor) -> Tensor:
    """A product in the layout of the block's storage, applied to a flat vector over its parameters."""
    storage = tuple(torch.zeros_like(value) for value in block.storage)
    views = block.parameter_views(storage)
    for view, piece in zip(views, vector.split([view.numel() for view in views]), strict=True):
        view.copy_(piece.reshape(view.shape))
    result = block.parameter_views(product(storage))
    return torch.cat([value.reshape(-1) for value in result])


Named = dict[str, Tensor]


def _point(model: nn.Module, block: Block) -> Named:
    names = {id(value): name for name, value in model.named_parameters()}
    return {names[id(parameter)]: parameter.detach() for parameter in block.parameters}


def _slope(model: nn.Module, probe: Probe) -> Callable[[Named], Named]:
    """Gradient of the probe's loss as a function of some parameters."""
    return grad(lambda values: probe.loss(functional_call(model, values, (probe.inputs,)), probe.targets))


def _hessian(model: nn.Module, point: Named, probe: Probe) -> Callable[[Named], Named]:
    pull = vjp(_slope(model, probe), point)[1]  # the Hessian is symmetric: its transpose will do
    return lambda vector: dict(pull(vector)[0])


def _ggn(model: nn.Module, point: Named, probe: Probe) -> Callable[[Named], Named]:
    likelihood = resolve_likelihood(probe.likelihood)
    if likelihood is None:
        raise ArgumentError("the Gauss-Newton matrix needs a likelihood: Probe(..., likelihood='categorical')")
    output, pull = vjp(lambda values: select_output(functional_call(model, values, (probe.inputs,))), point)[:2]
    push = vjp(lambda vector: pull(vector)[0], torch.zeros_like(output))[1]  # transposed twice: J d
    labels = likelihood.sample(output.detach(), torch.Generator(device=output.device).manual_seed(0))
    slope = grad(lambda value: likelihood.negative_log_likelihood(value, labels) / len(output))
    bend = vjp(slope, output.detach())[1]
    return lambda vector: dict(pull(*bend(*push(vector)))[0])
