"""The word about large layers that a limit of size has sent to the fallback."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ...errors import FallbackWarning
from .blocks import Block, describe

__all__ = ["warn_of_declined"]

_LARGE = 4096
"""A limit below this order is its user's choice, and needs no word."""


def warn_of_declined(blocks: Sequence[Block]) -> bool:
    """One warning that names all large layers which a limit keeps out, and what their state would take.

    Returns:
        Whether there was anything to say.
    """
    found = [
        f"{block.key} ({block.note})"
        for block in blocks
        if block.note and block.fallback and block.layer.is_matrix and max(block.layer.matrix_shape) > _LARGE
        if block.note != block.layer.note
    ]
    if found:
        part = next(block.part for block in blocks if block.fallback)
        warnings.warn(
            f"the fallback {describe(part)} serves large layers: {'; '.join(found)}. A structure takes them with a "
            "higher limit: osculate.Method, or dataclasses.replace(method, preconditioner=...(limit=...))",
            FallbackWarning,
            stacklevel=4,
        )
    return bool(found)
