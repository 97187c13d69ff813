"""Who is alive: every worker holds a file as long as it lives, and leaves a sign of life with what it is doing.

The hold ends with the process, however that ends, so that a study continued a second after ``kill -9`` knows at once
which runs nobody works on any more. Where the file cannot be seen (another machine with a folder of its own) or cannot
be held (some network drives), a worker counts as gone when its last sign of life is ``STALE_SECONDS`` old; the clocks
of the machines must agree to about a minute.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ..runs.targets import writing

__all__ = ["BEAT_SECONDS", "STALE_SECONDS", "Presence", "clear", "is_alive"]

BEAT_SECONDS = 20.0
"""Seconds between two signs of life."""
STALE_SECONDS = 240.0
"""Age of the last sign of life at which a worker that cannot be examined counts as gone."""


class Presence:
    """One worker's file, held within this context.

    Args:
        folder: of the workers' files; made if it is not there.
        name: of the worker.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name = name or uuid.uuid4().hex[:12]
        self._file = folder / self.name
        self._holder: int | None = None

    def __enter__(self) -> Self:
        with writing(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._holder = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        _hold(self._holder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._file.unlink()
        if self._holder is not None:
            os.close(self._holder)


def is_alive(folder: Path, name: str, beat: float | None) -> bool:
    """Whether a worker still works.

    Args:
        folder: of the workers' files.
        name: of the worker.
        beat: when its last sign of life came, in seconds of ``time.time``; ``None``: never.
    """
    recent = beat is not None and time.time() - beat < STALE_SECONDS
    try:
        holder = os.open(folder / name, os.O_RDWR)
    except OSError:
        return recent
    try:
        held = _hold(holder)
    finally:
        os.close(holder)
    return recent if held is None else not held


def clear(folder: Path) -> None:
    """Remove the files of workers that are gone."""
    for file in folder.glob("*") if folder.is_dir() else ():
        if not is_alive(folder, file.name, None):
            with suppress(OSError):
                file.unlink()
    with suppress(OSError):
        folder.rmdir()


def _hold(holder: int) -> bool | None:
    """Hold an open file; whether that succeeded, ``None`` where the system has no such holds."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
