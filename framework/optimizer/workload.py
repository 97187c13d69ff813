"""How much every layer costs its owner, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

from ...curvature.layers.layer import Layer
from ...preconditioners.damping.split import SideDamping
from ...preconditioners.operations import Request, flops
from ...preconditioners.protocol import Preconditioner
from ...preconditioners.structures.by_layer import ByLayer
from ..methods.method import Method
from ..processes.ownership import Work, owners_of
from .blocks import Block, make_blocks

__all__ = ["owners_of_layers", "work_of", "work_of_layers"]


def work_of(block: Block) -> Work:
    """Of one block, whose state may be without values (on the meta device).

    Matrices count by their operation (:func:`.operations.flops`); the rest as the structure says (``work``), by default
    two products of its momentum with dense matrices if it computes any, else one operation per parameter.
    """
    requests: Sequence[Request] = block.part.matrices(block.state, SideDamping(1.0, 1.0, 1.0))
    inverses = sum(map(flops, requests), 0.0)
    stored = sum(value.numel() for value in block.storage)
    numbers = stored + sum(value.numel() for value in block.state.tensors())
    if block.structure.work is not None:
        directions = block.structure.work(block.seen)
    elif requests and block.part.joint:
        rows, columns = block.seen.matrix_shape
        directions = 2.0 * rows * columns * (rows + columns)
    else:
        directions = float(stored)
    return Work(inverses, directions, numbers)


def work_of_layers(blocks: Sequence[Block]) -> dict[str, Work]:
    """By layer, all its blocks together."""
    found: dict[str, Work] = {}
    for block in blocks:
        own, before = work_of(block), found.get(block.layer.name, Work(0.0, 0.0, 0))
        found[block.layer.name] = Work(
            before.inverses + own.inverses, before.directions + own.directions, before.numbers + own.numbers
        )
    return found


def owners_of_layers(
    layers: Sequence[Layer], structures: Preconditioner | ByLayer, method: Method, count: int
) -> dict[str, int]:
    """The owner of every layer, from states without values.

    Args:
        layers: to be owned.
        structures: of the method, for this model.
        method: the composition.
        count: number of processes.
    """
    blocks = make_blocks(
        layers,
        structures,
        method.fallback,
        strict=False,
        estimator=method.curvature,
        owner=lambda layer: (None, False),
    )
    return owners_of(work_of_layers(blocks), count)
