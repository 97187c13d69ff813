"""Blocks: the parameters of one layer that one structure serves, with their momentum and state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...curvature.layers.layer import Layer
from ...curvature.records.statistics import Tensors
from ...declarations import StructureDeclarations, declared
from ...errors import ArgumentError, CompatibilityError
from ...preconditioners.protocol import Preconditioner
from ...preconditioners.state import State
from ...preconditioners.structures.by_layer import ByLayer, select
from ...preconditioners.structures.kronecker import Kronecker
from ..methods.momentum import Momentum
from .report import LayerRow

__all__ = ["Block", "full_precision", "make_blocks", "present_gradients"]


@dataclass
class Block:
    """One structure on (part of) one layer.

    The momentum lives in the structure's own layout, ``storage``: one matrix ``[W | b]`` or one tensor per parameter.
    ``views`` shows the same memory in the shapes of the parameters, so nothing is packed or unpacked in a step.
    ``born`` is the step before which the block was added: its schedule counts from there.
    ``vector`` is what is preconditioned: the storage itself, unless the momentum blends in the gradient.
    """

    key: str
    layer: Layer
    names: tuple[str, ...]
    part: Preconditioner
    fallback: bool
    state: State
    storage: Tensors
    updates: int = 0
    positions: int = 1
    born: int = 0
    parameters: Tensors = field(init=False)
    views: Tensors = field(init=False)
    vector: Tensors = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = tuple(self.layer.parameters[name] for name in self.names)
        self.views = self.parameter_views(self.storage)
        self.vector = self.storage

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: a pickle would not keep their shared memory."""
        return {name: value for name, value in self.__dict__.items() if name not in ("parameters", "views", "vector")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: views of its own storage."""
        self.__dict__.update(state)
        self.__post_init__()

    def parameter_views(self, storage: Tensors) -> Tensors:
        """Storage in the shapes of the parameters, without a copy."""
        if not self.part.joint:
            return storage
        (matrix,) = storage
        return self.layer.parameter_views(matrix)

    def statistics_due(self, step: int, warm: bool) -> bool:
        """Whether step ``step`` updates the statistics; a block that was added later starts cold."""
        return self.part.schedule.statistics_due(step - self.born, warm and not self.born)

    def inverses_due(self, step: int) -> bool:
        """Whether step ``step`` recomputes the inverses."""
        return self.part.schedule.inverses_due(step - self.born)

    def gradients(self) -> Tensors | None:
        """Gradients of the parameters, half precision as float32; ``None`` if one is missing (it sits out)."""
        found = present_gradients(self.parameters)
        return None if found is None else tuple(full_precision(gradient) for gradient in found)

    def accumulate(self, momentum: Momentum, gradients: Tensors, decays: Sequence[float]) -> None:
        """One recurrence of the momentum on g + decay * theta; ``gradients`` stay as they are.

        Args:
            momentum: the recurrence.
            gradients: one per parameter.
            decays: coupled weight decay of each parameter.
        """
        keep, add = momentum.coefficients()
        self._combine(self.views, keep, add, gradients, decays)
        on_momentum, on_gradient = momentum.blend()
        self.vector = self.storage
        if (on_momentum, on_gradient) != (1.0, 0.0):
            self.vector = tuple(value.clone() for value in self.storage)
            self._combine(self.parameter_views(self.vector), on_momentum, on_gradient, gradients, decays)
        self.updates += 1

    def _combine(self, views: Tensors, keep: float, add: float, gradients: Tensors, decays: Sequence[float]) -> None:
        """View <- keep * view + add * (g + decay * theta)."""
        for view, gradient, parameter, decay in zip(views, gradients, self.parameters, decays, strict=True):
            view.mul_(keep).add_(gradient, alpha=add)
            if decay:
                view.add_(parameter, alpha=add * decay)

    def direction(self, momentum: Momentum) -> Tensors:
        """Preconditioned momentum in the shapes of the parameters. May share memory with the momentum."""
        factor = momentum.correction(self.updates)
        if not declared(self.part, StructureDeclarations).linear:
            return self.parameter_views(self._preconditioned(tuple(factor * value for value in self.vector)))
        result = self._preconditioned(self.vector)
        if factor != 1.0:
            result = tuple(factor * value for value in result)
        return self.parameter_views(result)

    def _preconditioned(self, momentum: Tensors) -> Tensors:
        """What the structure makes of it: tensors of the same shapes and dtypes, or an error that names it."""
        result: Any = self.part.precondition(self.state, momentum)
        if isinstance(result, tuple | list) and len(result) == len(momentum):
            pairs = zip(result, momentum, strict=True)
            if all(isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype for a, b in pairs):
                return tuple(result)
        raise ArgumentError(
            f"{type(self.part).__name__}.precondition must return one tensor per tensor of the momentum, of the same "
            f"shape and dtype: {_layout(momentum)}; for {self.key!r} it returned {_layout(result)}; no parameter was "
            "changed. osculate.contracts.certify(part) tells more"
        )

    def row(self) -> LayerRow:
        """This block in the table of all parameters."""
        if self.part.joint:
            shape: tuple[int, ...] = self.layer.matrix_shape
        else:
            shape = (sum(parameter.numel() for parameter in self.parameters),)
        size = self.state.bytes() + sum(value.numel() * value.element_size() for value in self.storage)
        layer = self.layer
        return LayerRow(layer.name, layer.kind, self.names, shape, describe(self.part), self.fallback, size, layer.note)

    def to_dict(self) -> dict[str, Any]:
        """State, momentum and counters."""
        return {
            "state": self.state.to_dict(),
            "momentum": list(self.storage),
            "updates": self.updates,
            "positions": self.positions,
            "born": self.born,
        }

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy saved values into place."""
        self.state.load_dict(values["state"])
        for own, saved in zip(self.storage, values["momentum"], strict=True):
            own.copy_(saved)
        self.updates, self.positions = int(values["updates"]), int(values["positions"])
        self.born = int(values["born"])


def _layout(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_layout, value))})"
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def full_precision(value: Tensor) -> Tensor:
    """Half precision as float32, in which states and momentum of half-precision parameters are kept."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def present_gradients(parameters: Sequence[Tensor]) -> Tensors | None:
    """Gradients of parameters that take part in a step together.

    Returns:
        One gradient per parameter; zeros for one that is frozen while others are not. ``None`` if all are frozen, or if
        the backward pass did not reach one that is trainable.
    """
    found = [parameter.grad if parameter.requires_grad else None for parameter in parameters]
    if all(gradient is not None for gradient in found):
        return tuple(gradient for gradient in found if gradient is not None)
    missing = [p for p, gradient in zip(parameters, found, strict=True) if gradient is None and p.requires_grad]
    if missing or all(gradient is None for gradient in found):
        return None
    return tuple(
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    )


def describe(part: Preconditioner) -> str:
    """Short name of a structure."""
    if isinstance(part, Kronecker):
        return f"Kronecker({type(part.inputs).__name__}, {type(part.outputs).__name__})"
    partition = declared(part, StructureDeclarations).partition
    return f"{type(part).__name__}({type(partition).__name__})" if partition is not None else type(part).__name__


def make_blocks(
    layers: Sequence[Layer], preconditioner: Preconditioner | ByLayer, fallback: Preconditioner, *, strict: bool
) -> list[Block]:
    """Blocks of all layers; what the preconditioner leaves over goes to the fallback.

    Raises:
        CompatibilityError: if ``strict`` and something is left over; the message lists it.
    """
    blocks: list[Block] = []
    left: list[str] = []
    for layer in layers:
        chosen = select(preconditioner, layer)
        taken = {name for _, names in chosen for name in names}
        rest = tuple(name for name in layer.parameters if name not in taken)
        for index, (part, names) in enumerate(chosen):
            key = layer.name if index == 0 else f"{layer.name}:{'+'.join(names)}"
            blocks.append(_block(key, layer, names, part, False))
        if rest:
            note = f" ({layer.note})" if layer.note else ""
            left.append(f"{layer.name} ({type(layer.module).__name__}): {', '.join(rest)}{note}")
            key = layer.name if not chosen else f"{layer.name}:{'+'.join(rest)}"
            blocks.append(_block(key, layer, rest, fallback, True))
    if strict and left:
        raise CompatibilityError(
            f"strict=True, but these parameters would get the fallback {describe(fallback)}: {'; '.join(left)}; give "
            "them a part with ByLayer, freeze them, or build with strict=False"
        )
    return blocks


def _block(key: str, layer: Layer, names: tuple[str, ...], part: Preconditioner, fallback: bool) -> Block:
    parameters = tuple(full_precision(layer.parameters[name].detach()) for name in names)
    storage: Tensors
    if part.joint:
        storage = (torch.zeros(layer.matrix_shape, dtype=parameters[0].dtype, device=parameters[0].device),)
    else:
        storage = tuple(torch.zeros_like(parameter) for parameter in parameters)
    return Block(key, layer, names, part, fallback, part.init(layer, parameters), storage)
