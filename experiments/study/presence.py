"""Who is alive: every worker holds a folder as long as it lives, and leaves a sign of life with what it is doing.

The hold ends with the process, however that ends, so that a study continued a second after ``kill -9`` knows at once
which runs nobody works on any more. Where the folder cannot be seen (another machine has its own) or cannot be held
(some network drives), a worker counts as gone when its last sign of life is ``STALE_SECONDS`` old; the clocks of the
machines must agree to about a minute.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from ..runs.targets import hold

__all__ = ["BEAT_SECONDS", "STALE_SECONDS", "clear", "is_alive"]

BEAT_SECONDS = 20.0
"""Seconds between two signs of life."""
STALE_SECONDS = 240.0
"""Age of the last sign of life at which a worker that cannot be examined counts as gone."""


def is_alive(folder: Path, name: str, beat: float | None) -> bool:
    """Whether a worker still works.

    Args:
        folder: of the workers' folders.
        name: of the worker.
        beat: when its last sign of life came, in seconds of ``time.time``; ``None``: never.
    """
    recent = beat is not None and time.time() - beat < STALE_SECONDS
    try:
        holder = os.open(folder / name, os.O_RDONLY)
    except OSError:
        return recent
    try:
        held = hold(holder)
    finally:
        os.close(holder)
    return recent if held is None else not held


def clear(folder: Path) -> None:
    """Remove the folders of workers that are gone."""
    for place in (*folder.glob("*"), folder):
        if place == folder or not is_alive(folder, place.name, None):
            with suppress(OSError):
                place.rmdir()
