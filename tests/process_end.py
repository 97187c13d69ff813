"""How a process of :mod:`process_runs` ends: what it has found is kept, and nothing else counts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed

__all__ = ["end"]


def end(found: Any, out: str, together: bool = True) -> None:
    """Save, and leave without a word; from then on the exit status says nothing.

    On a loaded machine a thread of gloo may abort a process whose neighbour has left, also while it waits for that.

    Args:
        found: to be saved.
        out: the file, which is whole once it is there.
        together: whether the others are waited for, which may still speak to this process.
    """
    torch.save(found, f"{out}.part")
    Path(f"{out}.part").replace(out)
    if together:
        with suppress(RuntimeError):
            distributed.barrier()
    os._exit(0)
