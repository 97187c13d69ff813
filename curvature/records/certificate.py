"""Whether what was recorded of a layer explains the gradient that autograd put into its parameters.

A record says that the layer is a map h(theta) applied to the recorded inputs, and that g came back at h. If that is all
there is to the layer, then along every direction D of its parameters

    sum over calls of <g, h'(a) D>  =  <theta.grad, D>.

One random direction per mini-batch finds every way in which a record can be incomplete: a weight that is used elsewhere
too, a forward of its own, a gradient that was dropped, a loss that contains derivatives of the network. It costs the
layer's own forward product once more, and is asked at some steps only. Ours; the identity is the chain rule.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..layers.layer import Layer
from ..layers.sharding import held_gradient, holders, is_sharded, piece_of
from .calls import Call

__all__ = ["Certificate"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the difference, in units of |g| |h'(a) D|, which rounding does not reach; half precision: 3e-2."""


class Certificate:
    """One layer's question at one mini-batch.

    Args:
        layer: with an adapter.
        generator: of the direction, on the parameters' device.
        exchanged: whether ``.grad`` holds what other processes added too, once a backward is over: then what this
            backward brings is taken before it is added.
        processes: how many share the mini-batch.
    """

    def __init__(self, layer: Layer, generator: torch.Generator, exchanged: bool = False, processes: int = 1):
        self.layer, self._generator, self._exchanged, self._processes = layer, generator, exchanged, processes
        self._sharded = any(map(is_sharded, layer.parameters.values()))
        self.names = [name for name, parameter in layer.parameters.items() if parameter.requires_grad]
        self.directions: dict[str, Tensor] = {}
        self._actual: dict[str, Tensor] = {}
        self._coming: dict[str, Tensor] = {}  # sums, this backward's part included, if it fills .grad

    def _meshes(self, parameter: Any) -> float:
        """How many copies of the parameter's mesh there are among the processes."""
        return max(1, self._processes) / float(parameter.device_mesh.size())

    def attach(self) -> list[Any]:
        """Look at every gradient the moment it is complete: a user may clip it later. Returns handles."""
        own = weakref.ref(self)  # a parameter outlives its optimizer
        handles: list[Any] = []
        for name in self.names:
            parameter = self.layer.parameters[name]
            if self._exchanged:
                handles.append(parameter.register_hook(partial(_announce, own, name)))
            handles.append(parameter.register_post_accumulate_grad_hook(partial(_take, own, name)))
        return handles

    def forget(self) -> None:
        """The gradients were thrown away."""
        self.directions, self._actual, self._coming = {}, {}, {}

    def announce(self, name: str, gradient: Tensor) -> None:
        """Take in what a backward is about to add to the gradient of one parameter, in this process alone."""
        direction = self.directions.get(name)
        if direction is None:
            return
        found, before = torch.sum(gradient.detach().to(direction.dtype) * direction), self.layer.parameters[name].grad
        if before is not None and name in self._actual:  # else whatever earlier backwards had added is gone
            kept = torch.sum(before.detach().to(direction.dtype) * direction) != 0  # zeros: it was thrown away
            found = found + torch.where(kept, self._actual[name], torch.zeros_like(found))
        self._coming[name] = found

    def take(self, name: str, parameter: Tensor) -> None:
        """Take in the gradient of one parameter."""
        direction = self.directions.get(name)
        if self._exchanged:
            if name in self._coming:
                self._actual[name] = self._coming.pop(name)
        elif parameter.grad is not None and direction is not None and self._sharded:
            found = held_gradient(parameter).to(direction.dtype) * direction[piece_of(parameter)]
            self._actual[name] = found.sum() / (holders(parameter) * self._meshes(parameter))
        elif parameter.grad is not None and direction is not None:
            self._actual[name] = torch.sum(parameter.grad.detach().to(direction.dtype) * direction)

    @torch.no_grad()
    def add(self, call: Call, gradient: Tensor) -> None:
        """Take in the gradient at the output of one call."""
        adapter = call.adapter or self.layer.adapter
        if call.input is None or adapter is None or not self.names:
            return
        if call.mark is None:
            call.mark = torch.sum(call.input)
        if not self.directions:  # drawn when a backward has come: evaluations leave nothing behind
            for name in self.names:
                self.directions[name] = _direction(self.layer, name, self.layer.parameters[name], self._generator)
        value = gradient.detach() if call.arrange is None else call.arrange(gradient.detach())
        half = value.dtype in (torch.float16, torch.bfloat16)
        seen = call.input.float() if call.input.dtype in (torch.float16, torch.bfloat16) else call.input
        directions = self.directions
        if seen.is_floating_point():
            directions = {name: entry.to(seen.dtype) for name, entry in directions.items()}
        try:
            moved = adapter.directional(self.layer.module, seen, directions.get("weight"), directions.get("bias"))
        except RuntimeError:  # a parameter with another shape than its module: the step says so
            moved = value.new_zeros(0)
        value = value.to(moved.dtype)
        if moved.numel() != value.numel():
            call.explained = (value.new_full((), torch.inf), value.new_zeros(()))
            return
        value = value.reshape(moved.shape)
        tolerance = 3e-2 if half else _TOLERANCE.get(moved.dtype, 1e-4)
        norm = partial(torch.linalg.vector_norm, dtype=torch.float64)  # squares of tiny gradients vanish in single
        size = norm(value) * norm(moved)
        explained, allowed = call.explained or (0.0, 0.0)
        call.explained = explained + torch.sum(moved * value), allowed + tolerance * size

    def doubt(self, calls: list[Call]) -> Tensor | None:
        """How far the calls are from explaining the gradient, 0-dimensional; above 1: they do not.

        ``None`` if there is nothing to compare. Of a sharded layer, whose gradient nobody has seen whole, (3,): what
        this process's calls explain, what rounding may make of it, and what its piece of the gradient adds.
        """
        parameters = self.layer.parameters
        moving = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if moving != set(self.names) or moving != set(self._actual):
            return None  # something was frozen, or came back, since the question was put
        if any(call.explained is None for call in calls):
            return None
        explained = sum(call.explained[0] for call in calls if call.explained is not None)
        allowed = sum(call.explained[1] for call in calls if call.explained is not None)
        actual = sum(self._actual.values())
        if self._sharded:
            numbers = torch.stack([torch.as_tensor(value).double() for value in (explained, allowed, actual)])
            return torch.where(self._unchanged(calls), numbers, torch.inf)
        found: Tensor = torch.as_tensor(explained - actual).abs() / (allowed + torch.finfo(torch.float64).tiny)
        return torch.where(self._unchanged(calls), found, torch.inf).double()

    @staticmethod
    def _unchanged(calls: list[Call]) -> Tensor:
        """Whether inputs are what they were: by .data, or from outside of torch, no version would tell."""
        same = [
            torch.sum(call.input) == call.mark for call in calls if call.mark is not None and call.input is not None
        ]
        return torch.stack(same).all() if same else torch.tensor(True)


def _take(certificate: weakref.ref[Certificate], name: str, parameter: Tensor) -> None:
    found = certificate()
    if found is not None:
        found.take(name, parameter)


def _announce(certificate: weakref.ref[Certificate], name: str, gradient: Tensor) -> None:
    found = certificate()
    if found is not None:
        found.announce(name, gradient)


def _direction(layer: Layer, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random: of a weight that is a matrix the product of two vectors, which is cheap to draw."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=parameter.device, dtype=dtype)

    if name == "weight" and layer.is_matrix and layer.adapter is not None:
        rows, columns = layer.weight_shape
        return layer.adapter.matrix_as_weight(layer.module, drawn(rows, 1) @ drawn(1, columns))
    return drawn(*parameter.shape)
