"""The dense Hessian of one layer, from the gradient that :class:`GraphKeepingBackward` kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layers.layer import Layer
from .products import GraphKeepingBackward

__all__ = ["hessian_block"]

CHUNK = 64
"""Rows of the block that are differentiated at a time: bounds the memory of the batched backward."""


def hessian_block(products: GraphKeepingBackward, layer: Layer, scale: float | Tensor = 1.0) -> Tensor:
    """``scale`` times the Hessian of the loss over one layer's parameters, (P, P), symmetric.

    Args:
        products: after the closure has run inside it, and before it is released.
        layer: one of its layers.
        scale: e.g. 1 / N for the mean of a loss that was summed.
    """
    own = list(layer.parameters.values())
    kept = {id(parameter): slope for parameter, slope in zip(products.parameters, products.gradients, strict=True)}
    slopes = [kept[id(parameter)] if id(parameter) in kept else torch.zeros_like(parameter) for parameter in own]
    rows = [_rows(slope, own) for slope in slopes]
    block = torch.cat(rows)
    return (0.5 * scale) * (block + block.T)


def _rows(slope: Tensor, own: Sequence[Tensor]) -> Tensor:
    """Derivatives of every entry of one gradient with respect to all parameters of the layer, (size, P)."""
    size, width = slope.numel(), sum(parameter.numel() for parameter in own)
    if not slope.requires_grad:  # a gradient that does not depend on any parameter
        return slope.new_zeros(size, width)
    pieces = []
    for basis in torch.eye(size, dtype=slope.dtype, device=slope.device).split(CHUNK):
        found = _derivatives(slope, own, basis.reshape(-1, *slope.shape))
        pairs = zip(found, own, strict=True)
        columns = [slope.new_zeros(len(basis), p.numel()) if value is None else value.flatten(1) for value, p in pairs]
        pieces.append(torch.cat(columns, 1))
    return torch.cat(pieces)


def _derivatives(slope: Tensor, own: Sequence[Tensor], vectors: Tensor) -> list[Tensor | None]:
    """Vector-Jacobian products of one gradient, one row per vector; ``None`` where it does not depend."""
    moving = [parameter for parameter in own if parameter.requires_grad]
    found: Sequence[Tensor | None]
    with torch.enable_grad():
        try:
            found = torch.autograd.grad(
                slope, moving, vectors, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
        except RuntimeError:  # an operation of the model has no batching rule: one row at a time
            rows = [torch.autograd.grad(slope, moving, v, retain_graph=True, allow_unused=True) for v in vectors]
            found = [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
    by_parameter = {id(parameter): value for parameter, value in zip(moving, found, strict=True)}
    return [by_parameter.get(id(parameter)) for parameter in own]
