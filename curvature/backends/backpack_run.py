"""Backward passes with BackPACK on a structural copy of the model, for one recorded forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CompatibilityError
from ..layers.layer import Layer
from ..records.calls import Call
from ..records.needs import Record
from ..records.statistics import Tensors
from .backpack_tools import Seed, Watch, extension, tools
from .replay import Measured, Pass
from .structural_copy import structural_copy

__all__ = ["Run"]

_REFUSALS = (NotImplementedError, AssertionError, AttributeError, RuntimeError, ValueError)


class Run:
    """A copy of the model that BackPACK has extended, while the context lasts.

    Args:
        model: the model.
        layers: the layers that are measured.
        entry: the pass.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], entry: Pass):
        self.layers, self.entry = list(layers), entry
        self.result = {layer.name: Measured() for layer in layers}
        self._model, self._twins = structural_copy(model)
        self._handles = 0

    def __enter__(self) -> Run:
        """Extend the copy."""
        self._handles = len(tools().handles.hook_handles)
        tools().extend(self._model)
        return self

    def __exit__(self, *_: object) -> None:
        """Let BackPACK forget the copy: it keeps a handle of every module it ever extended."""
        del tools().handles.hook_handles[self._handles :]

    def twin(self, layer: Layer) -> nn.Module:
        """The layer's module in the copy."""
        return self._twins[id(layer.module)]

    def modules(self) -> list[nn.Module]:
        """The modules of all layers in the copy."""
        return [self.twin(layer) for layer in self.layers]

    def backward(self, vector: Tensor, extensions: Sequence[Any], watch: Watch) -> None:
        """One forward and backward pass with ``vector`` (N, ...) as the gradient at the output.

        Args:
            vector: of the output's shape.
            extensions: of BackPACK, or names of those of first order.
            watch: looks on.

        Raises:
            CompatibilityError: with BackPACK's reason, for a model that it cannot do.
        """
        active = [extension(entry, None) if isinstance(entry, str) else entry for entry in extensions]
        self._model.zero_grad(set_to_none=True)
        try:
            with warnings.catch_warnings(), tools().activate(watch.extension(), *active):
                warnings.simplefilter("ignore")  # BackPACK warns of layers without a rule; what is missing is refused
                output = self.entry.read(self._model(*self.entry.args, **self.entry.kwargs))
                tools().extend(Seed(vector))(output).backward()
        except _REFUSALS as error:
            raise CompatibilityError(
                f"backend='backpack' cannot measure this model: {error}; it needs a tree of the torch.nn modules that "
                "BackPACK knows, each called once; use backend='hooks' or backend='func'"
            ) from error
        twice = [layer.name for layer in self.layers if watch.counts.get(id(self.twin(layer)), 0) > 1]
        if twice:
            raise CompatibilityError(
                f"backend='backpack' cannot measure layer {twice[0]!r}, which is called more than once in a pass; use "
                "backend='hooks' or backend='func'"
            )

    def start(self, layer: Layer, watch: Watch, record: Record) -> None:
        """The one call of a layer, with its input.

        Raises:
            CompatibilityError: if its first axis does not count the samples.
        """
        key = id(self.twin(layer))
        if key not in watch.gradients:
            return
        if layer.adapter is None:
            self.result[layer.name].calls = [Call(layer.name, self.entry.index, self.entry.samples, 1)]
            return
        gradient = watch.gradients[key]
        if gradient.shape[0] != self.entry.samples:
            raise CompatibilityError(
                f"backend='backpack' cannot measure layer {layer.name!r}: it was called on {gradient.shape[0]} entries "
                f"of the first axis in a mini-batch of {self.entry.samples} samples; use backend='hooks' or "
                "backend='func'"
            )
        positions = layer.adapter.positions(layer.module, gradient)
        call = Call(layer.name, self.entry.index, gradient.shape[0], positions)
        if Record.INPUTS in record:
            call.input = layer.adapter.recorded_input(layer.module, watch.inputs[key])
        self.result[layer.name].calls = [call]

    def saved(self, layer: Layer, field: str) -> tuple[Any, ...]:
        """What an extension wrote to each parameter of a layer.

        Raises:
            CompatibilityError: if it wrote nothing, because it has no rule for the module.
        """
        found = [getattr(parameter, field, None) for parameter in self._parameters(layer)]
        if any(value is None for value in found):
            raise CompatibilityError(
                f"backend='backpack' cannot measure {field!r} of layer {layer.name!r}: BackPACK has no rule for "
                f"{type(layer.module).__name__}; use backend='hooks' or backend='func'"
            )
        return tuple(value.detach() if isinstance(value, Tensor) else value for value in found)

    def gradients(self, layer: Layer) -> Tensors:
        """The parameter gradients of the last backward pass."""
        found = [(parameter, parameter.grad) for parameter in self._parameters(layer)]
        return tuple(torch.zeros_like(parameter) if value is None else value for parameter, value in found)

    def checked(self, layer: Layer) -> Tensors:
        """Whole gradients per sample, whose sum must be the gradient that autograd gives. One synchronisation.

        Raises:
            CompatibilityError: if it is not: the module was used in a way that BackPACK does not see.
        """
        values: Tensors = self.saved(layer, "grad_batch")
        for value, gradient in zip(values, self.gradients(layer), strict=True):
            tolerance = 1e3 * torch.finfo(gradient.dtype).eps * float(value.abs().sum(0).max())
            if value.shape[0] != self.entry.samples or not torch.allclose(
                value.sum(0), gradient, rtol=0.0, atol=tolerance
            ):
                raise CompatibilityError(
                    f"backend='backpack': the gradients per sample of layer {layer.name!r} do not add up to its "
                    "gradient (it is used in a way BackPACK does not see); use backend='hooks' or backend='func'"
                )
        return values

    def _parameters(self, layer: Layer) -> list[nn.Parameter]:
        twin = self.twin(layer)
        return [twin.get_parameter(name) for name in layer.parameters]
