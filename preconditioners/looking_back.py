"""Looking back at a step with many blocks at once: equal factors of Kronecker structures share their operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..curvature.records.statistics import LayerStatistics
from .damping.split import SideDamping
from .factors.factor import Side
from .protocol import Events
from .structures.kronecker import Kronecker

__all__ = ["observe_steps"]


@dataclass
class _Group:
    """Sides of several blocks that one call of a factor serves."""

    key: tuple[Any, ...]
    factor: Any
    side: Side
    damping: float
    states: list[Any] = field(default_factory=list)
    befores: list[LayerStatistics] = field(default_factory=list)
    afters: list[LayerStatistics | None] = field(default_factory=list)


def observe_steps(
    parts: Sequence[Any],
    states: Sequence[Any],
    befores: Sequence[LayerStatistics],
    afters: Sequence[LayerStatistics | None],
    dampings: Sequence[SideDamping],
) -> Events:
    """Let every part look back at the step; counts of the same event are summed.

    Factors with ``observe_many`` see all blocks with an equal factor, side, damping and kind of state in one call; all
    other parts are asked one by one through ``observe_step``.
    """
    events: Events = {}
    groups: list[_Group] = []
    for part, state, before, after, damping in zip(parts, states, befores, afters, dampings, strict=True):
        if getattr(type(part), "observe_step", None) is not Kronecker.observe_step:
            _count(events, part.observe_step(state, before, after, damping))
            continue
        sides: tuple[Side, Side] = ("outputs", "inputs")
        for side in sides:
            factor, own, value = getattr(part, side), getattr(state, side), getattr(damping, side)
            kind: Any = type(factor)
            if not _sees_many(kind):
                _count(events, factor.observe_step(own, before, after, side, value))
                continue
            key = (kind, side, value, *factor.kind(own, before))
            group = next((known for known in groups if known.key == key and known.factor == factor), None)
            if group is None:
                group = _Group(key, factor, side, value)
                groups.append(group)
            group.states.append(own)
            group.befores.append(before)
            group.afters.append(after)
    for group in groups:
        _count(events, group.factor.observe_many(group.states, group.befores, group.afters, group.side, group.damping))
    return events


@lru_cache(maxsize=256)
def _sees_many(factor: type) -> bool:
    """Whether the class has the verb; a subclass that only replaces ``observe_step`` means that one to be called."""
    owner = next((kind for kind in factor.__mro__ if "observe_step" in vars(kind)), None)
    return owner is not None and "observe_many" in vars(owner)


def _count(events: Events, found: Events) -> None:
    for name, count in found.items():
        value = count.long()
        events[name] = events[name] + value if name in events else value
