"""How much of a model a method serves itself, said once when the optimizer is built."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ...curvature.layers.adapters import own_forward
from ...curvature.layers.layer import Layer
from ...errors import FallbackWarning
from ...preconditioners.protocol import Preconditioner
from ...preconditioners.structures.by_layer import ByLayer, by_default
from .blocks import Block, declined, describe

__all__ = ["SHARE", "warn_of_fallback"]

SHARE = 0.2
"""Largest share of a model's parameters that gets the fallback without a word."""

_NAMED = 4


def warn_of_fallback(blocks: Sequence[Block], preconditioner: Preconditioner | ByLayer) -> None:
    """One :class:`FallbackWarning` if the fallback, or what ``ByLayer`` takes otherwise, serves much of a model.

    Vectors (biases, scales) that a table serves by its ``otherwise`` do not count: that is what it is there for. A
    layer whose forward is not that of the class it comes from is named whatever its size.

    Args:
        blocks: all blocks.
        preconditioner: the method's structure, or its table of structures.
    """
    total = sum(parameter.numel() for block in blocks for parameter in block.parameters)
    entries: list[tuple[int, bool, str]] = []
    parts: list[str] = []
    for block in blocks:
        size = _left_over(block, preconditioner)
        if size:
            odd = block.layer.adapter is None and bool(own_forward(block.layer.module))
            entries.append(
                (size, odd, f"{block.layer.name} ({_type(block)}, {size}): {_reason(block, preconditioner)}")
            )
            parts.append(describe(block.part))
    share = sum(size for size, _, _ in entries) / total
    named = entries if share > SHARE else [entry for entry in entries if entry[1]]
    if not named:
        return
    listed = [text for _, _, text in sorted(named, key=lambda entry: -entry[0])]
    more = f"; and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    warnings.warn(
        f"osculate serves {100 * share:.3g} % of the parameters by {' and '.join(dict.fromkeys(parts))} instead of the "
        f"method's structure: {'; '.join(listed[:_NAMED])}{more}. optimizer.layer_table() lists every parameter; "
        "strict=True refuses this; ByLayer names another structure, and osculate.register_adapter says how a module is "
        "read",
        FallbackWarning,
        stacklevel=4,
    )


def _left_over(block: Block, preconditioner: Preconditioner | ByLayer) -> int:
    """How many numbers of a block nobody has named a structure for."""
    if block.fallback:
        return sum(parameter.numel() for parameter in block.parameters)
    unnamed = by_default(preconditioner, block.layer) if block.alone is None else set()
    found = zip(block.names, block.parameters, strict=True)
    return sum(parameter.numel() for name, parameter in found if name in unnamed and parameter.ndim > 1)


def _type(block: Block) -> str:
    return type(block.layer.module).__name__


def _reason(block: Block, preconditioner: Preconditioner | ByLayer) -> str:
    """Why the method's structure has not taken a block."""
    layer: Layer = block.layer
    if layer.note:
        return layer.note
    if layer.adapter is None:
        return "no adapter reads it as a matrix"
    if not layer.is_matrix:
        return "it is not read as a matrix" if "weight" in layer.parameters else "its weight is not trained"
    if "weight" not in block.names:
        return "a bias beside a structure for the weight"
    default = f"no structure of the method takes {layer.kind} of shape {layer.matrix_shape}"
    return declined(preconditioner, layer) or default
