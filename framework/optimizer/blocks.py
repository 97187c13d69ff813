"""Blocks: the parameters of one layer that one structure serves, with their momentum and state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...curvature.declarations import StructureDeclarations, declared
from ...curvature.estimators import Estimator
from ...curvature.layers.adapters import TensorAdapter
from ...curvature.layers.layer import Layer
from ...curvature.layers.sharding import local, whole
from ...curvature.records.needs import LOOKING_BACK, Needs
from ...curvature.records.statistics import Tensors
from ...errors import ArgumentError, CompatibilityError
from ...preconditioners.damping.split import SideDamping
from ...preconditioners.protocol import Preconditioner
from ...preconditioners.state import State
from ...preconditioners.structures.by_layer import ByLayer, by_default, leaves, select, serving_order
from ...preconditioners.structures.kronecker import Kronecker
from .report import LayerRow

__all__ = [
    "Block",
    "declined",
    "full_precision",
    "make_blocks",
    "present_gradients",
    "zeros_of",
]


class Asked(NamedTuple):
    """What a part asks of a record, read once: flags are slow to take apart at every step."""

    anything: bool
    inputs: bool
    roots: bool
    vectors: bool
    matrix: bool
    pairs: bool
    looks_back: bool

    @classmethod
    def of(cls, needs: Needs) -> Asked:
        """Of the part's ``needs``."""
        return cls(
            bool(needs),
            Needs.INPUTS in needs,
            Needs.ROOTS in needs,
            Needs.VECTORS in needs,
            Needs.MATRIX in needs,
            Needs.PAIRS in needs,
            bool(needs & LOOKING_BACK),
        )


@dataclass
class Block:
    """One structure on (part of) one layer.

    The momentum lives in the structure's own layout, ``storage``: one matrix ``[W | b]`` or one tensor per parameter.
    ``views`` shows the same memory in the shapes of the parameters, so nothing is packed or unpacked in a step.
    ``needs`` and ``asked`` say what its part asks for, ``whole`` whether it has all parameters of its layer.
    ``damped`` keeps the damping of its sides with the numbers that it follows from.
    ``note`` says why a limit of size has sent the block to the fallback, if one has.
    ``born`` is the step before which the block was added: its schedule counts from there.
    ``vector`` is what is preconditioned: the storage itself, unless the momentum blends in the gradient.
    ``structure`` is the part with all that a structure may declare: itself, or a third party's taken in.
    ``owner`` is the process that has its state, where many divide the work; elsewhere it is without values.
    ``alone`` is a parameter read as a matrix for itself, where its layer cannot be read and its part needs nothing but
    the gradient; the part sees it in the place of the layer, see ``seen``.
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
    note: str = ""
    alone: Layer | None = None
    owner: int | None = None
    seen: Layer = field(init=False)
    structure: StructureDeclarations = field(init=False)
    parameters: Tensors = field(init=False)
    views: Tensors = field(init=False)
    vector: Tensors = field(init=False)
    needs: Needs = field(init=False)
    asked: Asked = field(init=False)
    whole: bool = field(init=False)
    damped: tuple[tuple[float, int], SideDamping] | None = field(init=False)

    def __post_init__(self) -> None:
        self.structure = declared(self.part, StructureDeclarations)
        self.seen = self.alone or self.layer
        self.parameters = tuple(self.layer.parameters[name] for name in self.names)
        self.views = self.parameter_views(self.storage)
        self.vector = self.storage
        self.needs, self.asked = self.part.needs, Asked.of(self.part.needs)
        if self.structure.measures:
            self.asked = self.asked._replace(anything=True)
        self.damped = None
        self.whole = self.alone is not None or self.names == tuple(self.layer.parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: a pickle would not keep their shared memory."""
        derived = {entry.name for entry in fields(self) if not entry.init}
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: views of its own storage."""
        self.__dict__.update(state)
        self.__post_init__()

    def parameter_views(self, storage: Tensors) -> Tensors:
        """Storage in the shapes of the parameters, without a copy."""
        if not self.part.joint:
            return storage
        (matrix,) = storage
        return self.seen.parameter_views(matrix)

    def statistics_due(self, step: int, warm: bool) -> bool:
        """Whether step ``step`` updates the statistics; one that was added later, or is read alone, starts cold."""
        return self.part.schedule.statistics_due(step - self.born, warm and not self.born and self.alone is None)

    def inverses_due(self, step: int) -> bool:
        """Whether step ``step`` recomputes the inverses."""
        return self.part.schedule.inverses_due(step - self.born)

    def gradients(self) -> Tensors | None:
        """Gradients of the parameters, half precision as float32; ``None`` if none has one (it sits out)."""
        found = present_gradients(self.parameters)
        return None if found is None else tuple(map(full_precision, found))

    def checked(self, result: Any, momentum: Tensors) -> Tensors:
        """What the structure made of the momentum: tensors of the same shapes and dtypes, or an error that names it."""
        if isinstance(result, tuple | list) and len(result) == len(momentum):
            for made, given in zip(result, momentum, strict=True):
                if not isinstance(made, Tensor) or made.shape != given.shape or made.dtype != given.dtype:
                    break
            else:
                return tuple(result)
        raise ArgumentError(
            f"{type(self.part).__name__}.precondition must return one tensor per tensor of the momentum, of the same "
            f"shape and dtype: {_layout(momentum)}; for {self.key!r} it returned {_layout(result)}; no parameter was "
            "changed. osculate.contracts.certify(part) tells more"
        )

    def row(self) -> LayerRow:
        """This block in the table of all parameters."""
        if self.part.joint:
            shape: tuple[int, ...] = self.seen.matrix_shape
        else:
            shape = (sum(parameter.numel() for parameter in self.parameters),)
        size = self.state.bytes() + sum(value.numel() * value.element_size() for value in self.storage)
        layer = self.layer
        return LayerRow(
            layer.name,
            layer.kind,
            self.names,
            shape,
            describe(self.part),
            self.fallback,
            size,
            self.note or layer.note,
            self.owner,
        )

    def to_dict(self, state: bool = True) -> dict[str, Any]:
        """State (on request without that of the structure), momentum and counters."""
        return {
            **({"state": self.state.to_dict()} if state else {}),
            "momentum": list(self.storage),
            "updates": self.updates,
            "positions": self.positions,
            "born": self.born,
        }

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy saved values into place."""
        if "state" in values:
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


def zeros_of(parameter: Tensor) -> Tensor:
    """Zeros in the shape of the whole of a parameter, which may be sharded; half precision as float32."""
    return full_precision(local(parameter.detach())).new_zeros(parameter.shape)


def present_gradients(parameters: Sequence[Tensor]) -> Tensors | None:
    """Gradients of parameters that take part in a step together.

    Returns:
        One gradient per parameter; zeros for one that is frozen, or that the backward pass did not reach, while others
        have theirs (tokens of a model that only pretraining uses). ``None`` if none has.
    """
    found: list[Tensor] = []
    reached = 0
    for parameter in parameters:
        if not parameter.requires_grad or parameter.grad is None:
            found.append(torch.zeros_like(parameter))
        else:
            reached += 1
            found.append(parameter.grad)
    return tuple(found) if reached else None


def describe(part: Preconditioner) -> str:
    """Short name of a structure."""
    if isinstance(part, Kronecker):
        return f"Kronecker({type(part.inputs).__name__}, {type(part.outputs).__name__})"
    partition = declared(part, StructureDeclarations).partition
    return f"{type(part).__name__}({type(partition).__name__})" if partition is not None else type(part).__name__


def make_blocks(
    layers: Sequence[Layer],
    preconditioner: Preconditioner | ByLayer,
    fallback: Preconditioner,
    *,
    strict: bool,
    estimator: Estimator | None = None,
    owner: Callable[[Layer], tuple[int | None, bool]] | None = None,
) -> list[Block]:
    """Blocks of all layers; what the preconditioner leaves over goes to the fallback.

    A matrix of numbers in a layer that cannot be read is served for itself by a structure that needs the gradient only.

    Args:
        layers: the layers.
        preconditioner: the structure, or a table of them.
        fallback: what serves the rest.
        strict: refuse what would get the fallback, and matrices that a table serves by its ``otherwise``.
        estimator: of the method, which says what a structure's needs take to be recorded.
        owner: of a layer the process that has its state, and whether that is this one; ``None``: this one, of all.

    Raises:
        CompatibilityError: if ``strict`` and something is left over; the message lists it.
    """
    blocks: list[Block] = []
    left: list[str] = []
    for layer in layers:
        holds = (None, True) if owner is None else owner(layer)
        pieces = list(_alone(layer, preconditioner, estimator))
        served = {name for _, names, _ in pieces for name in names}
        others = {name: parameter for name, parameter in layer.parameters.items() if name not in served}
        if others:
            remaining = replace(layer, parameters=others) if served else layer
            pieces += [(part, names, None) for part, names in select(preconditioner, remaining)]
        taken = {name for _, names, _ in pieces for name in names}
        rest = tuple(name for name in layer.parameters if name not in taken)
        for index, (part, names, alone) in enumerate(pieces):
            key = layer.name if index == 0 else f"{layer.name}:{'+'.join(names)}"
            blocks.append(_block(key, layer, names, part, False, alone, holds))
        if rest:
            reason = layer.note if pieces or layer.note else declined(preconditioner, layer)
            key = layer.name if not pieces else f"{layer.name}:{'+'.join(rest)}"
            blocks.append(_block(key, layer, rest, fallback, True, None, holds))
            blocks[-1].note = reason
        unnamed = by_default(preconditioner, layer) - served
        listed = (*rest, *(name for name in layer.parameters if name in unnamed and layer.parameters[name].ndim > 1))
        if listed:
            why = layer.note or (declined(preconditioner, layer) if rest and not pieces else "")
            note = f" ({why})" if why else ""
            left.append(f"{layer.name} ({type(layer.module).__name__}): {', '.join(listed)}{note}")
    if strict and left:
        by = f"the fallback {describe(fallback)}"
        if isinstance(preconditioner, ByLayer) and preconditioner.otherwise is not None:
            by += f" or what ByLayer takes otherwise, {describe(preconditioner.otherwise)}"
        raise CompatibilityError(
            f"strict=True, but these parameters would get {by}: {'; '.join(left)}; give "
            "them a part with ByLayer, freeze them, or build with strict=False"
        )
    return blocks


def declined(preconditioner: Preconditioner | ByLayer, layer: Layer) -> str:
    """Why a limit of size of some structure keeps a layer out; empty if none does."""
    for part in leaves(preconditioner):
        declines = declared(part, StructureDeclarations).declines
        reason = "" if declines is None else declines(layer)
        if reason:
            return f"{describe(part)}: {reason}"
    return ""


def _alone(
    layer: Layer, preconditioner: Preconditioner | ByLayer, estimator: Estimator | None
) -> Iterator[tuple[Preconditioner, tuple[str, ...], Layer | None]]:
    """Matrices of numbers in a layer that cannot be read, with the structure that serves each for itself."""
    if layer.adapter is not None or estimator is None:
        return
    for name, parameter in layer.parameters.items():
        kernel = isinstance(layer.module, nn.modules.conv._ConvNd) and not layer.module.transposed and name == "weight"
        if not kernel and (parameter.ndim != 2 or min(parameter.shape) < 2):
            continue
        adapter = TensorAdapter(tuple(parameter.shape))
        alone = replace(layer, parameters={"weight": parameter}, adapter=adapter, others=(), batch_axis=0)
        for part in serving_order(preconditioner, layer):
            if name in part.serves(layer):
                break
            by_gradient = not part.needs & LOOKING_BACK and not estimator.records(part.needs)
            if by_gradient and Needs.INPUTS not in part.needs and part.serves(alone) == ("weight",):
                yield part, (name,), alone
                break


def _block(
    key: str,
    layer: Layer,
    names: tuple[str, ...],
    part: Preconditioner,
    fallback: bool,
    alone: Layer | None,
    holds: tuple[int | None, bool],
) -> Block:
    parameters = tuple(full_precision(whole(layer.parameters[name].detach())) for name in names)
    owner, here = holds
    if not here:
        parameters = tuple(parameter.to("meta") for parameter in parameters)
    seen = alone or layer
    storage: Tensors
    if part.joint:
        storage = (torch.zeros(seen.matrix_shape, dtype=parameters[0].dtype, device=parameters[0].device),)
    else:
        storage = tuple(torch.zeros_like(parameter) for parameter in parameters)
    return Block(key, layer, names, part, fallback, part.init(seen, parameters), storage, alone=alone, owner=owner)
