"""Ctrl-C ends a run after the step it is in, so that nothing is lost and the run can continue bit for bit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["InterruptFlag", "interruptible"]


class InterruptFlag:
    """Whether Ctrl-C was pressed; ask by calling it."""

    def __init__(self) -> None:
        self._raised = False

    def __call__(self) -> bool:
        """Whether the flag is up."""
        return self._raised

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise the flag at the first signal; interrupt at once at the second."""
        if self._raised:
            raise KeyboardInterrupt
        self._raised = True


@contextmanager
def interruptible() -> Iterator[InterruptFlag]:
    """Within this context the first Ctrl-C only raises the flag.

    Outside the main thread, where Python delivers no signals, the flag stays down.
    """
    flag = InterruptFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.signal(signal.SIGINT, flag.handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
