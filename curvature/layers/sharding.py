"""Parameters of which every process holds a piece: FSDP2 (``fully_shard``) and tensor parallelism, as DTensors.

What is recorded of a layer is whole in any case. Under FSDP2 a module sees its whole weights while it runs, as plain
tensors that stand in the pieces' place; under tensor parallelism its inputs and outputs are DTensors themselves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...errors import ArgumentError

__all__ = [
    "GraphLeaves",
    "held_gradient",
    "holders",
    "is_managed",
    "is_sharded",
    "laid_out",
    "local",
    "piece_of",
    "reopened",
    "require_readable",
    "require_whole_output",
    "whole",
    "wholes",
]


def is_sharded(value: Any) -> bool:
    """Whether a tensor is a DTensor, which lies on several processes."""
    known = sys.modules.get("torch.distributed.tensor")  # takes half a second to import; without it there are none
    return known is not None and isinstance(value, known.DTensor)


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP2 gathers and frees weights around the calls of a module."""
    known = sys.modules.get("torch.distributed.fsdp")
    return known is not None and isinstance(module, known.FSDPModule)


def whole(value: Tensor) -> Tensor:
    """All of a tensor, gathered from the processes that hold it; a collective for DTensors. Without its graph."""
    if not is_sharded(value):
        return value
    found: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
    return found


def wholes(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """:func:`whole` of those that are there."""
    if "torch.distributed.tensor" not in sys.modules:
        return list(values)
    return [None if value is None else whole(value) for value in values]


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor; the same memory. Without its graph."""
    if not is_sharded(value):
        return value
    found: Tensor = value.detach().to_local()  # type: ignore[attr-defined]
    return found


class GraphLeaves:
    """What stands for sharded parameters in a graph: under FSDP2 another tensor, while their module runs.

    Args:
        model: whose parameters are in pieces now.
    """

    def __init__(self, model: nn.Module):
        self._places = {
            id(own): (module, name)
            for module in model.modules()
            for name, own in module._parameters.items()
            if is_sharded(own)
        }

    def of(self, parameter: Tensor) -> Tensor:
        """The leaf; ask while the parameter's module runs. Any other parameter is its own."""
        place = self._places.get(id(parameter))
        found = None if place is None else place[0]._parameters[place[1]]
        return parameter if found is None else found


@contextmanager
def reopened(model: nn.Module) -> Iterator[None]:
    """Weights that FSDP2 has gathered before a backward pass inside this context are there after it as well.

    A backward inside another one frees the weights that the outer has still to use: those of the modules whose outputs
    it had reached.
    """
    shown: list[Any] = [module for module in model.modules() if is_managed(module) and _is_open(module)]
    try:
        yield
    finally:
        for module in shown:
            module.unshard()


def _is_open(module: nn.Module) -> bool:
    """Whether the weights that one FSDP module manages are gathered now."""
    inner = {id(own) for child in _managed_below(module) for own in child.parameters()}
    return any(not is_sharded(own) for own in module.parameters() if id(own) not in inner)


def _managed_below(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if child is not module and is_managed(child)]


def piece_of(parameter: Tensor) -> tuple[slice, ...]:
    """The part of a sharded parameter that this process holds, a range along each axis.

    Raises:
        ArgumentError: if it is no such part.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    given: Any = parameter
    shape, offset = compute_local_shape_and_global_offset(given.shape, given.device_mesh, given.placements)
    if tuple(shape) != tuple(given.to_local().shape):
        raise ArgumentError(
            f"a parameter of shape {tuple(given.shape)} is sharded as {given.placements}, in pieces that are no ranges "
            "along its axes; shard it along whole axes (Shard, Replicate)"
        )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def holders(parameter: Tensor) -> int:
    """How many processes of the parameter's own mesh hold the piece that this one holds."""
    given: Any = parameter
    sizes = given.device_mesh.shape
    return math.prod(size for size, place in zip(sizes, given.placements, strict=True) if place.is_replicate())


def require_readable(name: str, output: Tensor) -> None:
    """Check that a layer's output can be gathered before the layer's own style of parallelism does.

    Raises:
        ArgumentError: if only that knows how: of an embedding whose rows are cut.
    """
    given: Any = output
    if is_sharded(given) and any("Mask" in type(place).__name__ for place in given.placements):
        raise ArgumentError(
            f"layer {name!r} is an embedding whose rows lie on several processes, and its outputs cannot be averaged "
            "before they are put together; cut its columns (ColwiseParallel), or serve it by a part without secant "
            f"pairs, ByLayer({{{name!r}: Diagonal(), 'default': ...}})"
        )


def require_whole_output(output: Any) -> None:
    """Check that a model has returned whole tensors.

    Raises:
        ArgumentError: if one lies on several processes.
    """
    if any(map(is_sharded, tree_leaves(output))):
        raise ArgumentError(
            "the model has returned a DTensor, which lies on several processes, and what is recorded is whole; let the "
            "last layer give its whole output (RowwiseParallel() or ColwiseParallel(output_layouts=Replicate()), with "
            "use_local_output=True), and take no loss_parallel()"
        )


def laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor laid out over processes as a sharded parameter is.

    Tensor parallelism leaves some gradients laid out otherwise (sums that nobody has added up, copies of a piece); of
    these it is a collective.
    """
    given: Any = parameter
    found: Any = value
    if is_sharded(found) and found.placements != given.placements:
        found = found.detach().redistribute(placements=given.placements)
    result: Tensor = found
    return result


def held_gradient(parameter: Tensor) -> Tensor:
    """The piece of a parameter's gradient that belongs to this process's piece of it."""
    assert parameter.grad is not None
    return local(laid_out(parameter.grad, parameter))
