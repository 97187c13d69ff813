"""Hessian-vector products of the mini-batch loss inside torch's closure convention.

A user's closure calls ``loss.backward()``, which frees the graph. Inside :class:`GraphKeepingBackward` that call fills
``.grad`` as usual but keeps a differentiable gradient, from which products with the Hessian follow by a second
differentiation. ``backward(create_graph=True)`` is avoided: it ties parameters and graph into a cycle that leaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .backends.passes import standing_for_backward
from .layers.layer import Layer
from .records.statistics import Tensors

__all__ = ["GraphKeepingBackward", "hessian_block"]

CHUNK = 64
"""Rows of the block that are differentiated at a time: bounds the memory of the batched backward."""


class GraphKeepingBackward(TorchFunctionMode):
    """Context in which ``loss.backward()`` keeps the graph of the gradient.

    What runs inside has second derivatives: attention is computed by its definition, as the fused kernels have only
    first ones, and models with recurrent layers run without cuDNN, for the same reason.

    Args:
        layers: layers whose parameters are differentiated; a parameter that is frozen during the backward counts as
            constant.
    """

    def __init__(self, layers: Sequence[Layer]):
        super().__init__()
        self.layers = list(layers)
        self.parameters = [p for layer in layers for p in layer.parameters.values() if p.requires_grad]
        self.gradients: list[Tensor] = []
        self._kernels = ExitStack()

    def __enter__(self) -> GraphKeepingBackward:
        """From here on the forward pass keeps to kernels that can be differentiated twice."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._kernels.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(layer.module, nn.RNNBase) for layer in self.layers):
            cudnn = torch.backends.cudnn
            kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
            self._kernels.enter_context(cudnn.flags(enabled=False, **kept))
        return self

    def __exit__(self, *error: Any) -> None:
        """Give the kernels free again."""
        self._kernels.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Everything but ``Tensor.backward`` and ``torch.autograd.backward`` passes through."""
        if func is torch.Tensor.backward:
            self._backward(*_arguments(*args, **(kwargs or {})))
            return None
        if func is torch.autograd.backward:
            self._backward(*_arguments_of_several(*args, **(kwargs or {})))
            return None
        return func(*args, **(kwargs or {}))

    def _backward(self, tensors: Sequence[Tensor], vectors: Sequence[Tensor | None], inputs: Any) -> None:
        """Fill ``.grad`` as autograd would, and add the differentiable gradients to the kept ones."""
        filled: Sequence[Tensor] = self.parameters
        if inputs is not None:
            filled = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        with standing_for_backward(filled):
            gradients = torch.autograd.grad(
                tensors, self.parameters, vectors, create_graph=True, allow_unused=True, materialize_grads=True
            )
        if inputs is not None:
            chosen = {id(value) for value in filled}
            pairs = zip(self.parameters, gradients, strict=True)
            gradients = tuple(value if id(p) in chosen else torch.zeros_like(p) for p, value in pairs)
        if self.gradients:
            self.gradients = [old + new for old, new in zip(self.gradients, gradients, strict=True)]
        else:
            self.gradients = list(gradients)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            value = gradient.detach().clone()
            parameter.grad = value if parameter.grad is None else parameter.grad + value

    def product(self, directions: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """H d per layer, for one direction per layer; callable any number of times until :meth:`release`."""
        moving = {id(parameter) for parameter in self.parameters}
        vector = [
            value
            for layer in self.layers
            for parameter, value in zip(layer.parameters.values(), directions[layer.name], strict=True)
            if id(parameter) in moving
        ]
        pairs = [(slope, along) for slope, along in zip(self.gradients, vector, strict=True) if slope.requires_grad]
        total = tuple(torch.zeros_like(parameter) for parameter in self.parameters)
        if pairs:  # a gradient that does not depend on any parameter contributes nothing
            slopes, alongs = zip(*pairs, strict=True)
            with torch.enable_grad():
                total = torch.autograd.grad(slopes, self.parameters, alongs, retain_graph=True, materialize_grads=True)
        columns = {id(parameter): value for parameter, value in zip(self.parameters, total, strict=True)}
        return {
            layer.name: tuple(
                columns[id(p)] if id(p) in columns else torch.zeros_like(p) for p in layer.parameters.values()
            )
            for layer in self.layers
        }

    def release(self) -> None:
        """Free the graph."""
        self.gradients = []


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
        columns = [
            slope.new_zeros(len(basis), p.numel()) if value is None else value.reshape(len(basis), -1)
            for value, p in pairs
        ]
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


_Backward = tuple[Sequence[Tensor], Sequence[Tensor | None], Any]


def _arguments(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain: Any = None,
    create: Any = False,
    inputs: Any = None,
    **_: Any,
) -> _Backward:
    """Of ``Tensor.backward``: tensors, vectors, inputs."""
    return [tensor], [gradient], inputs


def _arguments_of_several(
    tensors: Any,
    grad_tensors: Any = None,
    retain: Any = None,
    create: Any = False,
    old: Any = None,
    inputs: Any = None,
    **_: Any,
) -> _Backward:
    """Of ``torch.autograd.backward``: tensors, vectors, inputs."""
    several = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    vectors = [grad_tensors] if isinstance(grad_tensors, Tensor) or grad_tensors is None else list(grad_tensors)
    return several, vectors if len(vectors) == len(several) else [None] * len(several), inputs
