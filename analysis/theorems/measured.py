"""What the curvature backend measures on a small network, and the same by the slowest possible formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...curvature.backends.capture import Capture
from ...curvature.layers.discovery import discover_layers
from ...curvature.layers.layer import Layer
from ...curvature.likelihoods import Likelihood
from ...curvature.records.needs import Record
from ...curvature.records.statistics import LayerStatistics

__all__ = ["Loss", "flat_parameters", "hessian", "of_parameters", "sample_gradients", "statistics"]

Loss = Callable[[Tensor], Tensor]
"""From the model's output to the mean loss."""


def statistics(
    model: nn.Module, inputs: Tensor, loss: Loss, record: Record, likelihood: Likelihood | None = None
) -> tuple[list[Layer], dict[str, LayerStatistics]]:
    """One forward and one backward of the mean loss under the hooks; gradients of the parameters are attached.

    Args:
        model: in float64.
        inputs: one mini-batch.
        loss: of the output, a mean over samples.
        record: what to keep of every layer.
        likelihood: whose labels, if the record asks for sampled ones.
    """
    layers = discover_layers(model)
    capture = Capture(model, layers, likelihood, "mean", 0)
    capture.arm({layer.name: record for layer in layers})
    model.zero_grad()
    try:
        loss(model(inputs)).backward()
        found = capture.collect()
    finally:
        capture.close()
    return layers, found


def flat_parameters(model: nn.Module) -> Tensor:
    """All parameters as one vector, detached."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def of_parameters(model: nn.Module, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """``function(model(inputs))`` as a function of the flat parameters, for ``torch.func``."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]

    def value(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        own = {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        output: Tensor = torch.func.functional_call(model, own, (inputs,))
        return function(output)

    return value


def hessian(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Second derivatives, reverse mode twice: forward mode goes through a deprecated part of torch."""
    result: Callable[[Tensor], Tensor] = torch.func.jacrev(torch.func.jacrev(function))
    return result


def sample_gradients(
    model: nn.Module, parameters: Sequence[Tensor], inputs: Tensor, loss: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """(N, P) gradients of each sample's own loss, one autograd call per sample.

    Args:
        model: the network.
        parameters: with respect to which, P numbers together.
        inputs: (N, ...).
        loss: from the output (1, ...) of one sample and its index to its loss.
    """
    rows = []
    for index in range(len(inputs)):
        found = torch.autograd.grad(loss(model(inputs[index : index + 1]), index), list(parameters))
        rows.append(torch.cat([value.flatten() for value in found]))
    return torch.stack(rows)
