"""How the figures of a report look: one colour and dash per arm everywhere, names at the ends of lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .figures import COLOURS, DASHES

__all__ = ["INCHES_PER_LETTER", "Styles", "label_lines", "new_figure", "plain_axes"]

_GAP_POINTS = 11.0
INCHES_PER_LETTER = 0.075
"""Width of a letter of the labels, which have 8 points."""


@dataclass(frozen=True)
class Styles:
    """Colour and dash of every arm, by its place in the study, so that an arm looks the same in every figure.

    Args:
        arms: labels in order; more than there are colours repeat them with other dashes.
    """

    arms: Sequence[str]
    _places: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._places.update({arm: place for place, arm in enumerate(self.arms)})

    def colour(self, arm: str) -> str:
        """Of lines, bands and labels."""
        return COLOURS[self._places[arm] % len(COLOURS)]

    def line(self, arm: str) -> dict[str, Any]:
        """Keywords of ``Axes.plot``."""
        place = self._places[arm]
        dashes = DASHES[(place // len(COLOURS) + place) % len(DASHES)]
        return {"color": COLOURS[place % len(COLOURS)], "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.7}


def new_figure(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.7) -> tuple[Figure, list[Axes]]:
    """A figure that no window shows, with its axes row by row.

    Args:
        columns: of axes.
        rows: of axes.
        width: of one, in inches.
        height: of one, in inches.
    """
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def plain_axes(axes: Axes) -> None:
    """A light grid, no frame above and to the right."""
    axes.grid(visible=True, which="major", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_lines(axes: Axes, ends: Sequence[tuple[str, float, float, Any]]) -> None:
    """Write each line's name right of its end, moved apart where they would overlap; the figure grows to make room.

    Args:
        axes: the last in its row, with its final limits.
        ends: name, x and y of the end, colour; ends that are not finite are left out.
    """
    shown = [end for end in ends if math.isfinite(end[1]) and math.isfinite(end[2])]
    figure = axes.get_figure(root=True)
    assert figure is not None
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        width, room = figure.get_figwidth(), INCHES_PER_LETTER * max((len(end[0]) for end in shown), default=0)
        figure.set_figwidth(width + room)
        engine.set(rect=(0, 0, width / (width + room), 1))
    figure.draw_without_rendering()  # the axes take their place
    to_points = 72 / figure.dpi
    heights = [float(axes.transData.transform((x, y))[1]) * to_points for _, x, y, _ in shown]
    order = sorted(range(len(shown)), key=heights.__getitem__)
    placed = _apart([heights[index] for index in order])
    for index, height in zip(order, placed, strict=True):
        name, x, y, colour = shown[index]
        label = axes.annotate(
            name,
            (x, y),
            xytext=(7, height - heights[index]),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
        label.set_in_layout(False)  # the room is there already


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights in order, moved as little as it takes to be a line apart: groups that collide share their middle."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2]) + _GAP_POINTS > _bottom(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group) + _GAP_POINTS * place for group in groups for place in range(len(group))]


def _bottom(group: Sequence[float]) -> float:
    return sum(group) / len(group) - _GAP_POINTS * (len(group) - 1) / 2


def _top(group: Sequence[float]) -> float:
    return _bottom(group) + _GAP_POINTS * (len(group) - 1)
