"""How much of the processor a process had while it computed: on a busy machine times on the wall mean little."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Effort"]

_LEAST_SECONDS = 2.0
"""Shorter runs say nothing about the machine."""

_BUSY = 0.5
"""Share of the wall's time below which the processor's makes a machine busy."""


@dataclass
class Effort:
    """Seconds on the wall, and of the processor by all threads of this process, inside the context.

    Args:
        wall: the clock on the wall.
        own: the processor's clock of this process.
    """

    wall: Callable[[], float] = time.perf_counter
    own: Callable[[], float] = time.process_time
    seconds: float = field(default=0.0, init=False)
    own_seconds: float = field(default=0.0, init=False)

    def __enter__(self) -> Effort:
        self.seconds -= self.wall()
        self.own_seconds -= self.own()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += self.wall()
        self.own_seconds += self.own()

    def remark(self) -> str:
        """What is to be said of the times that were measured inside; empty where they stand for the methods."""
        if self.seconds < _LEAST_SECONDS or self.own_seconds >= _BUSY * self.seconds:
            return ""
        return (
            f"the machine is busy (this process had the processor for {self.own_seconds:.1f} of {self.seconds:.1f} s): "
            "numbers in seconds, and what came of so many seconds, mean little; try --threads 1, or bound the "
            "methods by --epochs instead"
        )
