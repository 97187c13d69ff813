"""Looking back at a step with many blocks at once: equal factors of Kronecker structures share their operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ..curvature.declarations import FactorDeclarations
from ..curvature.records.statistics import LayerStatistics
from .damping.split import SideDamping
from .factors.factor import Side
from .protocol import Events, count_events
from .structures.kronecker import Kronecker

__all__ = ["observe_steps"]


@dataclass
class _Group:
    """Sides of several blocks that one call of a factor serves."""

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
    groups: dict[tuple[Any, ...], list[_Group]] = {}
    for part, state, before, after, damping in zip(parts, states, befores, afters, dampings, strict=True):
        if not isinstance(part, Kronecker) or type(part).observe_step is not Kronecker.observe_step:
            count_events(events, part.observe_step(state, before, after, damping))
            continue
        inner, outer = part.factors
        sides: tuple[tuple[Side, Any, FactorDeclarations, Any, float], ...] = (
            ("outputs", part.outputs, outer, state.outputs, damping.outputs),
            ("inputs", part.inputs, inner, state.inputs, damping.inputs),
        )
        for side, factor, full, own, value in sides:
            if "observe_many" not in full.together or full.kind is None:
                count_events(events, factor.observe_step(own, before, after, side, value))
                continue
            key = (type(factor), side, value, *full.kind(own, before))
            alike = groups.setdefault(key, [])
            # Compared, not looked up: a factor may have no hash.
            group = next((known for known in alike if known.factor == factor), None)
            if group is None:
                group = _Group(factor, side, value)
                alike.append(group)
            group.states.append(own)
            group.befores.append(before)
            group.afters.append(after)
    for group in chain.from_iterable(groups.values()):
        count_events(
            events, group.factor.observe_many(group.states, group.befores, group.afters, group.side, group.damping)
        )
    return events
