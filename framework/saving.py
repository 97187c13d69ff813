"""Saved states: what does not fit is found and named before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ArgumentError

__all__ = ["require_same_layout"]

_WAY_OUT = "load into an optimizer built for the same model and method"


def require_same_layout(own: Any, saved: Any, where: str = "") -> None:
    """Check that two nested states have the same keys, lengths and shapes.

    Args:
        own: state of the optimizer that loads.
        saved: what is to be loaded; not modified.
        where: path to the two, for the message.

    Raises:
        ArgumentError: naming the first place where they differ.
    """
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        missing, unknown = [sorted(map(str, set(a) - set(b))) for a, b in ((own, saved), (saved, own))]
        if missing or unknown:
            raise ArgumentError(f"saved state{where} does not match: missing {missing}, unknown {unknown}; {_WAY_OUT}")
        for key in own:
            require_same_layout(own[key], saved[key], f"{where} of {key!r}" if not where else f"{where}, {key}")
    elif isinstance(own, list | tuple) and isinstance(saved, list | tuple) and len(own) == len(saved):
        for index, pair in enumerate(zip(own, saved, strict=True)):
            require_same_layout(*pair, f"{where}[{index}]")
    elif _shape(own) != _shape(saved):
        raise ArgumentError(f"saved state{where} has {_shape(saved)}, this model needs {_shape(own)}; {_WAY_OUT}")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{len(value)} entries"
    return "a number" if isinstance(value, int | float) else type(value).__name__
