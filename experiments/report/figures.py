"""How figures look and where they go: one colour and dash per arm everywhere, names at the ends of lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

__all__ = [
    "COLOURS",
    "INCHES_PER_LETTER",
    "MARKERS",
    "PLAIN",
    "Styles",
    "label_lines",
    "new_figure",
    "plain_axes",
    "save_figure",
    "scale_losses",
]

# Okabe and Ito's colour-blind-safe palette, its yellow (too light for lines) replaced by brown.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C510A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5))
_LOG_FROM_RATIO = 2.0
_GAP_POINTS = 11.0
_LEADER_POINTS = 18.0
INCHES_PER_LETTER = 0.075
"""Width of a letter of the labels, which have 8 points."""
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
"""Ticks of a logarithmic axis as plain numbers."""


@dataclass(frozen=True)
class Styles:
    """Colour and dash of every arm, by its place in the study, so that an arm looks the same in every figure.

    Args:
        arms: labels in order; more than there are colours repeat them with other dashes.
    """

    arms: Sequence[str]

    def colour(self, arm: str) -> str:
        """Of lines, bands and labels."""
        return COLOURS[self.arms.index(arm) % len(COLOURS)]

    def line(self, arm: str) -> dict[str, Any]:
        """Keywords of ``Axes.plot``."""
        place = self.arms.index(arm)
        dashes = _DASHES[(place // len(COLOURS) + place) % len(_DASHES)]
        return {"color": self.colour(arm), "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.7}


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure that no window shows, with its axes row by row.

    Args:
        width: of the whole, in inches.
        height: of the whole, in inches.
        columns: of axes.
        rows: of axes.
        sharex: whether all have one horizontal axis.
        sharey: whether all have one vertical axis.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.pdf`` and return both paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")]  # a name may hold dots
    figure.savefig(paths[0], dpi=160)
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def plain_axes(axes: Axes) -> None:
    """A light grid, no frame above and to the right."""
    axes.grid(visible=True, which="major", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def scale_losses(axes: Axes, values: NDArray[np.float64], starts: Sequence[float]) -> None:
    """Logarithmic where losses spread over a factor of two; what diverges leaves at the top and flattens nothing.

    Args:
        axes: to change; a logarithmic one gets plain numbers where the values lie within few decades.
        values: what is drawn, finite.
        starts: where the lines begin; the view ends at 1.5 times the largest of them.
    """
    ceiling = 1.5 * max(starts, default=0.0)
    shown = values[values <= ceiling] if ceiling > 0 else values
    if not len(shown):
        return
    low, high = float(shown.min()), float(shown.max())
    logarithmic = low > 0 and high >= _LOG_FROM_RATIO * low
    if logarithmic:
        axes.set_yscale("log")
        decades = math.log10(high / low)
        between = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=between))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(shown) < len(values):
        axes.set_ylim(low / 1.1 if logarithmic else low - 0.05 * (high - low), ceiling)


def label_lines(
    axes: Axes, ends: Sequence[tuple[str, float, float, Any]], line: Callable[[str], Mapping[str, Any]] | None = None
) -> None:
    """Write the names of lines in one column right of the axes, in the order of their ends, none over another.

    A thin line leads from each end to its name. The figure grows to make room, also in height where the names need it.

    Args:
        axes: the last in its row, with its final limits.
        ends: name, x and y of the end, colour; ends that are not finite are left out.
        line: keywords of ``Axes.plot`` by name, whose dashes the thin line takes; ``None``: solid.
    """
    shown = [end for end in ends if math.isfinite(end[1]) and math.isfinite(end[2])]
    if not shown:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        width = figure.get_figwidth()
        room = INCHES_PER_LETTER * max(len(end[0]) for end in shown) + _LEADER_POINTS / 72
        figure.set_figwidth(width + room)
        engine.set(rect=(0, 0, width / (width + room), 1))
    column = _GAP_POINTS * (len(shown) - 1)
    figure.draw_without_rendering()  # the axes take their place
    lacking = column - axes.get_window_extent().height * (72 / figure.dpi)
    if lacking > 0:
        figure.set_figheight(figure.get_figheight() + lacking / 72)
        figure.draw_without_rendering()
    points = axes.transData.transform([end[1:3] for end in shown]) * (72 / figure.dpi)
    box = axes.get_window_extent()
    right, low, high = (value * (72 / figure.dpi) for value in (box.x1, box.y0, box.y1))
    order, steps = np.argsort(points[:, 1], kind="stable"), _GAP_POINTS * np.arange(len(shown))
    # Moved as little as it takes to be a line apart and beside the axes: names that collide share their middle.
    placed = np.clip(isotonic_regression(points[order, 1] - steps).x, low, max(low, high - column)) + steps
    for index, height in zip(order, placed, strict=True):
        name, x, y, colour = shown[index]
        dashes = "-" if line is None else line(name)["linestyle"]
        leader = {"arrowstyle": "-", "color": colour, "linestyle": dashes, "linewidth": 0.8, "alpha": 0.6}
        label = axes.annotate(
            name,
            (x, y),
            xytext=(right + _LEADER_POINTS - points[index, 0], height - points[index, 1]),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops=leader | {"shrinkA": 1.0, "shrinkB": 0.0, "relpos": (0.0, 0.5)},
        )
        label.set_in_layout(False)  # the room is there already
