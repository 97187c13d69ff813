"""Exact products with the Hessian and the Gauss-Newton matrix, and their dense layer blocks, by ``torch.func``.

Pure functions of a model, its arguments and a loss: nothing is hooked, no ``.grad`` is written. They are the slow truth
that estimators and structures are compared with, and serve every module that ``torch.func`` can differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from osculate.curvature.layers.layer import Layer
from osculate.curvature.likelihoods import Likelihood
from osculate.curvature.records.statistics import Tensors
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

__all__ = ["ggn_block", "ggn_product", "hessian_dense_block", "hessian_product"]

Named = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]


def hessian_product(
    model: nn.Module, layers: Sequence[Layer], args: tuple[Any, ...], loss: Loss, directions: Mapping[str, Tensors]
) -> dict[str, Tensors]:
    """H d over the parameters of ``layers``, all others held fixed.

    Args:
        model: called as ``model(*args)``, in the mode it is in.
        layers: layers of the model.
        args: its arguments.
        loss: from the model's output to the 0-dimensional loss of the mini-batch.
        directions: per layer one tensor per parameter.
    """
    point, tangent = _point(model, layers), _tangent(model, layers, directions)
    slope = grad(lambda values: loss(functional_call(model, values, args)))
    (product,) = vjp(slope, point)[1](tangent)  # the Hessian is symmetric
    return _per_layer(model, layers, product)


def ggn_product(
    model: nn.Module,
    layers: Sequence[Layer],
    args: tuple[Any, ...],
    likelihood: Likelihood,
    directions: Mapping[str, Tensors],
) -> dict[str, Tensors]:
    """G d with G the mean over samples of J' R R' J, R the likelihood's roots; arguments as :func:`hessian_product`."""
    point, tangent = _point(model, layers), _tangent(model, layers, directions)
    output, pull = vjp(lambda values: functional_call(model, values, args), point)[:2]
    (moved,) = vjp(lambda vector: pull(vector)[0], torch.zeros_like(output))[1](tangent)  # transposed twice: J d
    roots = likelihood.curvature_root(output).flatten(2)
    inner = torch.einsum("vni,ni->vn", roots, moved.flatten(1))
    vector = torch.einsum("vn,vni->ni", inner, roots).reshape(output.shape) / output.shape[0]
    (product,) = pull(vector)
    return _per_layer(model, layers, product)


def hessian_dense_block(model: nn.Module, layer: Layer, args: tuple[Any, ...], loss: Loss) -> Tensor:
    """The Hessian of the loss over one layer's parameters, (P, P), laid out as ``LayerStatistics.matrix``."""
    return _dense(layer, lambda direction: hessian_product(model, [layer], args, loss, {layer.name: direction}))


def ggn_block(model: nn.Module, layer: Layer, args: tuple[Any, ...], likelihood: Likelihood) -> Tensor:
    """The Gauss-Newton matrix over one layer's parameters, (P, P), mean over samples.

    From V N first derivatives, one per root and sample: it also serves modules that have no second one (fused
    attention).
    """
    output, pull = vjp(lambda values: functional_call(model, values, args), _point(model, [layer]))[:2]
    roots, samples = likelihood.curvature_root(output), output.shape[0]
    alone = torch.eye(samples, dtype=output.dtype, device=output.device)
    alone = alone.reshape(samples, samples, *[1] * (output.ndim - 1))
    cotangents = (roots.unsqueeze(1) * alone).flatten(0, 1)
    (found,) = vmap(pull, chunk_size=64)(cotangents)
    rows = torch.cat([found[name].flatten(1) for name in _names(model, [layer])[layer.name]], 1).detach()
    block: Tensor = rows.T @ rows / samples
    return block


def _dense(layer: Layer, product: Callable[[Tensors], Mapping[str, Tensors]]) -> Tensor:
    """The matrix of a linear map of the layer's parameters, column by column in chunks."""
    parameters = list(layer.parameters.values())
    sizes = [parameter.numel() for parameter in parameters]

    def column(vector: Tensor) -> Tensor:
        pieces = zip(vector.split(sizes), parameters, strict=True)
        result = product(tuple(piece.reshape(parameter.shape) for piece, parameter in pieces))
        return torch.cat([value.flatten() for value in result[layer.name]])

    like = parameters[0]
    basis = torch.eye(sum(sizes), dtype=like.dtype, device=like.device)
    block: Tensor = vmap(column, chunk_size=64)(basis)
    return 0.5 * (block + block.T)


def _names(model: nn.Module, layers: Sequence[Layer]) -> dict[str, list[str]]:
    full = {id(value): name for name, value in model.named_parameters()}
    return {layer.name: [full[id(value)] for value in layer.parameters.values()] for layer in layers}


def _point(model: nn.Module, layers: Sequence[Layer]) -> Named:
    names = {name for values in _names(model, layers).values() for name in values}
    return {name: value.detach() for name, value in model.named_parameters() if name in names}


def _tangent(model: nn.Module, layers: Sequence[Layer], directions: Mapping[str, Tensors]) -> Named:
    names = _names(model, layers)
    return {
        name: value for layer in layers for name, value in zip(names[layer.name], directions[layer.name], strict=True)
    }


def _per_layer(model: nn.Module, layers: Sequence[Layer], product: Named) -> dict[str, Tensors]:
    names = _names(model, layers)
    return {layer.name: tuple(product[name].detach() for name in names[layer.name]) for layer in layers}
