"""How figures look and where they go: one colour and dash per arm everywhere, names at the ends of lines or in a key.

A figure of one panel is as wide as a paper's column, a figure of several as the text. Sizes of letters and lines come
from the style that is in force; see ``style.py``.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from .style import in_style

__all__ = [
    "COLOURS",
    "MARKERS",
    "PLAIN",
    "Styles",
    "column_width",
    "decades_between",
    "grid_figure",
    "label_lines",
    "lines_of",
    "literal",
    "name_lines",
    "new_figure",
    "note",
    "one_panel",
    "plain_axes",
    "save_figure",
    "scale_losses",
    "scale_to_zero",
    "text_points",
    "text_width",
    "title",
]

# Okabe and Ito's colour-blind-safe palette, its yellow (too light for lines) replaced by brown.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C510A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (5, 1.5),
    (1, 1.2),
    (6, 1.5, 1, 1.5),
    (2.5, 1),
    (9, 2),
    (4, 1.2, 1, 1.2, 1, 1.2),
    (7, 1.5, 2.5, 1.5),
)
_MARKED = 6
"""Markers along a line."""
_LOG_FROM_RATIO = 2.0
_ROUNDING = 1e-6
"""Share of the largest value by which rounding may make a loss negative."""
_GAP_POINTS = 1.3
"""Distance of two names, in units of the size of their letters."""
_LEADER_POINTS = 16.0
_NAMES = 8
"""More lines than these have a legend; names beside them would be a wall."""
_SHARE = 0.3
"""Of a column that names may take from a figure of one panel."""
_TWO_COLUMNS = 6.75 / 3.3
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
"""Ticks of a logarithmic axis as plain numbers."""


@dataclass(frozen=True)
class Styles:
    """Colour, dash and marker of every arm, by its place in the study, so that an arm looks the same in every figure.

    Dashes tell arms apart without colours, too; more arms than there are dashes repeat them with markers. A style file
    may bring colours (and dashes) of its own in ``axes.prop_cycle``.

    Args:
        arms: labels in order.
    """

    arms: Sequence[str]

    def colour(self, arm: str) -> str:
        """Of lines, bands and labels."""
        colours = _cycle().get("color") or COLOURS
        place = self.arms.index(arm)
        return to_hex(colours[(place + 3 * (place // len(colours))) % len(colours)])

    def line(self, arm: str) -> dict[str, Any]:
        """Keywords of ``Axes.plot``."""
        place, own = self.arms.index(arm), _cycle().get("linestyle")
        look: dict[str, Any] = {"color": self.colour(arm)}
        if own:
            look["linestyle"] = own[place % len(own)]
        else:
            dashes = _DASHES[place % len(_DASHES)]
            look["linestyle"] = (0, dashes) if dashes else "-"
        if (turn := place // len(_DASHES)) > 0:
            first = 0.5 * (place % len(_DASHES)) / len(_DASHES) / _MARKED  # so that markers of neighbours do not meet
            look |= {"marker": MARKERS[(turn - 1) % len(MARKERS)], "markevery": (first, 1 / _MARKED)}
            look |= {"markeredgecolor": "white", "markeredgewidth": 0.4}
        return look

    def handle(self, arm: str) -> Line2D:
        """A line for a legend."""
        look = {key: value for key, value in self.line(arm).items() if key != "markevery"}
        return Line2D([], [], label=literal(arm), **look)


def _cycle() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = mpl.rcParams["axes.prop_cycle"].by_key()
    return found


def column_width() -> float:
    """Of a figure of one panel, in inches; the style file's ``figure.figsize``."""
    return float(mpl.rcParams["figure.figsize"][0])


def text_width() -> float:
    """Of a figure of several panels, in inches."""
    return column_width() * _TWO_COLUMNS


def _panel_height() -> float:
    return float(mpl.rcParams["figure.figsize"][1])


def one_panel(height: float | None = None, wide: bool = False) -> tuple[Figure, Axes]:
    """A figure of one panel.

    Args:
        height: in inches. Default: the style's.
        wide: whether it is as wide as the text instead of a column.
    """
    figure, (axes,) = new_figure(text_width() if wide else column_width(), height or _panel_height())
    return figure, axes


def grid_figure(panels: int, height: float | None = None, **shared: bool) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the text, two panels in a row; one panel is as wide as a column.

    Args:
        panels: >= 1.
        height: of a row, in inches. Default: nearly the style's.
        **shared: ``sharex`` and ``sharey``.

    Returns:
        The figure and its axes, one more than asked for where the last row would have a gap: room for names.
    """
    if panels == 1:
        figure, axes = one_panel(height)
        return figure, [axes]
    rows = -(-panels // 2)
    figure, grid = new_figure(text_width(), rows * (height or 0.9 * _panel_height()) + 0.2, 2, rows, **shared)
    if panels % 2:
        grid[-1].set_axis_off()
    return figure, grid


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


@in_style
def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.pdf`` and return both paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")]  # a name may hold dots
    figure.savefig(paths[0])
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def plain_axes(axes: Axes) -> None:
    """A light grid, no frame above and to the right."""
    axes.grid(visible=True, which="major")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def literal(text: str) -> str:
    """The text with its dollar signs as they are; matplotlib reads what stands between two as mathematics."""
    return text.replace("$", r"\$")


def text_points(text: str, size: str | float) -> float:
    """Width of a line of text in points.

    Args:
        text: the line.
        size: of its letters, in points or by name, such as ``x-small``.
    """
    return _text_points(text, FontProperties(size=size).get_size_in_points(), tuple(mpl.rcParams["font.family"]))


@functools.lru_cache(maxsize=4096)
def _text_points(text: str, size: float, family: tuple[str, ...]) -> float:
    if not text.strip():
        return 0.0
    path = TextPath(
        (0, 0), text.replace(r"\$", "S").replace("$", "S"), size=size, prop=FontProperties(family=list(family))
    )
    return float(path.get_extents().width)


def title(figure: Figure, *texts: str) -> None:
    """One line above the figure that says what is shown.

    Args:
        figure: in its final width.
        *texts: from the longest to the shortest; the first that fits is taken, the last one in smaller letters where
            none does.
    """
    room = 72 * figure.get_figwidth() - 4
    size = FontProperties(size=mpl.rcParams["figure.titlesize"]).get_size_in_points()
    text = next((text for text in texts if text_points(text, size) <= room), texts[-1])
    figure.suptitle(literal(text), fontsize=min(size, max(4.0, size * room / max(1.0, text_points(text, size)))))


def note(figure: Figure, text: str) -> None:
    """What else is to be known, in small letters below the figure, in as many lines as it takes.

    Args:
        figure: in its final width.
        text: nothing is written where it is empty.
    """
    if text:
        lines = lines_of(text, "x-small", 72 * figure.get_figwidth() - 6)
        figure.supxlabel(literal("\n".join(lines)), fontsize="x-small", x=0.01, ha="left", color="0.35")
        figure.set_figheight(figure.get_figheight() + 0.1 * len(lines) + 0.05)


def lines_of(text: str, size: str | float, points: float) -> list[str]:
    """Lines of a text that are no wider; a word that is, is broken."""
    letters = max(4, int(len(text) * points / max(1.0, text_points(text, size))))
    return textwrap.wrap(text, letters) or [""]


def scale_losses(axes: Axes, values: NDArray[np.float64], starts: Sequence[float]) -> str:
    """Logarithmic where losses spread over a factor of two; what diverges leaves at the top and flattens nothing.

    A loss of exactly 0 (or below it by rounding) stays in sight; see :func:`scale_to_zero`. Losses that are truly
    negative have a linear scale.

    Args:
        axes: to change; a logarithmic one gets plain numbers where the values lie within few decades.
        values: what is drawn, finite.
        starts: where the lines begin; the view ends at 1.5 times the largest of them.

    Returns:
        What is to be said of the axis in a :func:`note`; mostly empty.
    """
    ceiling = 1.5 * max(starts, default=0.0)
    shown = values[values <= ceiling] if ceiling > 0 else values
    positive = shown[shown > 0]
    if not len(shown):
        return ""
    low, high = float(shown.min()), float(shown.max())
    left_out = len(shown) < len(values)
    smallest = float(positive.min()) if len(positive) else math.inf
    logarithmic = low >= -_ROUNDING * high and high >= _LOG_FROM_RATIO * smallest
    if logarithmic and low <= 0:
        return scale_to_zero(axes, smallest, ceiling if left_out else high)
    if logarithmic:
        axes.set_yscale("log")
        decades = math.log10(high / low)
        between = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=between))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
    if left_out:
        axes.set_ylim(low / 1.1 if logarithmic else low - 0.05 * (high - low), ceiling)
    return ""


def scale_to_zero(axes: Axes, smallest: float, largest: float) -> str:
    """A vertical axis that is logarithmic down to the smallest positive value, and linear in a grey strip down to 0.

    Args:
        axes: to change.
        smallest: of the positive values; what is below the largest by more than double precision counts as 0.
        largest: of the values.

    Returns:
        What is to be said of it in a :func:`note`.
    """
    threshold = 10.0 ** math.floor(math.log10(max(smallest, largest * np.finfo(float).eps)))
    decades = math.log10(largest / threshold)
    strip = max(0.3, 0.1 * decades)
    axes.set_yscale("symlog", linthresh=threshold, linscale=strip)
    apart = threshold * 10 ** (0.12 * decades)  # else its number would touch that of the threshold
    ticks = [tick for tick in decades_between(threshold, largest) if tick >= apart]
    axes.yaxis.set_major_locator(FixedLocator([0.0, threshold, *ticks]))
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.3 * threshold, largest * 10 ** (0.05 * decades))
    for panel in axes.get_shared_y_axes().get_siblings(axes):
        panel.axhspan(-0.3 * threshold, threshold, color="0.5", alpha=0.12, linewidth=0, zorder=0)
    return f"grey: linear from {threshold:g} to 0"


def decades_between(low: float, high: float) -> list[float]:
    """Zero, and powers of ten between two positive numbers: few enough to be read, none beside the zero."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    first += last - first > 6
    return [0.0, *(10.0**power for power in range(first, last + 1, 1 + (last - first) // 7))]


def name_lines(
    axes: Axes,
    ends: Sequence[tuple[str, float, float, Any]],
    handles: Sequence[Artist],
    beside: Axes | None = None,
    remark: str = "",
) -> None:
    """Names at the ends of the lines where they have room, else a legend of all lines.

    Args:
        axes: the last panel, with its final limits.
        ends: name, x and y of the end, colour, of the lines that end in it.
        handles: one per line of the figure, with its name as label; a legend has them all.
        beside: axes without a panel right of the last one, where names or legend go.
        remark: see :func:`note`.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    names = [str(handle.get_label()) for handle in handles]
    size = mpl.rcParams["legend.fontsize"]
    points = FontProperties(size=size).get_size_in_points()
    widest = max((text_points(name, size) for name in names), default=0.0)
    figure.draw_without_rendering()
    height = axes.get_window_extent().height * (72 / figure.dpi)
    room = 72 * (_SHARE * column_width() if beside is None else 0.85 * figure.get_figwidth() / 2)
    fits = len(names) <= _NAMES and widest + _LEADER_POINTS <= room
    fits = fits and _GAP_POINTS * points * (len(names) - 1) <= height
    if fits and len(ends):
        note(figure, remark)
        label_lines(axes, ends, room=beside is None)
    elif beside is not None:
        note(figure, remark)
        _legend_beside(beside, handles, points)
    else:
        _legend_below(figure, handles, points, remark)


def _legend_beside(axes: Axes, handles: Sequence[Artist], points: float) -> None:
    """In the axes that have no panel, in one column or two, in smaller letters where there are very many."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    width, height = (72 / figure.dpi) * box.width, (72 / figure.dpi) * box.height + 12
    handle = 4.5 * points
    names = [str(entry.get_label()) for entry in handles]
    widest = max(text_points(name, points) for name in names)
    columns = 1 if 1.45 * points * len(names) <= height or 2 * (widest + handle) > width else 2
    shown = ["\n".join(lines_of(name, points, width / columns - handle)) for name in names]
    rows = sum(text.count("\n") + 1 for text in shown) / columns
    size = max(4.0, min(points, height / (1.45 * rows)))
    legend = axes.legend(handles, shown, loc="upper left", ncols=columns, fontsize=size, borderaxespad=0.0)
    legend.set_in_layout(False)


def _legend_below(figure: Figure, handles: Sequence[Artist], points: float, remark: str) -> None:
    """Below the figure, in as many columns as fit; the figure grows by its rows."""
    width, handle = 72 * figure.get_figwidth(), 5.0 * points
    names = [str(entry.get_label()) for entry in handles]
    shown = ["\n".join(lines_of(name, points, width - handle - 6)) for name in names]
    widest = max(text_points(line, points) for text in shown for line in text.splitlines())
    columns = min(len(names), max(1, int((width - 4) // (widest + handle))))
    rows = max(sum(text.count("\n") + 1 for text in shown[start::columns]) for start in range(columns))
    figure.set_figheight(figure.get_figheight() + 1.4 * points * rows / 72 + 0.05)
    keywords: dict[str, Any] = {}
    if remark:
        lines = lines_of(remark, "x-small", width - 6)
        keywords = {"title": literal("\n".join(lines)), "title_fontsize": "x-small", "alignment": "left"}
        figure.set_figheight(figure.get_figheight() + 0.1 * len(lines) + 0.05)
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, columnspacing=1.2, **keywords)


def label_lines(
    axes: Axes,
    ends: Sequence[tuple[str, float, float, Any]],
    room: bool = True,
) -> None:
    """Write the names of lines in one column right of the axes, in the order of their ends, none over another.

    A thin line leads from each end to its name. The axes make room for them; the figure grows in height where the names
    need it.

    Args:
        axes: the last in its row, with its final limits.
        ends: name, x and y of the end, colour; ends that are not finite are left out.
        room: whether the axes must make room; there is some where nothing stands beside them.
    """
    shown = [end for end in ends if math.isfinite(end[1]) and math.isfinite(end[2])]
    if not shown:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    size = mpl.rcParams["legend.fontsize"]
    gap = _GAP_POINTS * FontProperties(size=size).get_size_in_points()
    engine = figure.get_layout_engine()
    if room and isinstance(engine, ConstrainedLayoutEngine):
        width = figure.get_figwidth()
        taken = (max(text_points(end[0], size) for end in shown) + _LEADER_POINTS + 3) / 72
        engine.set(rect=(0, 0, max(0.2, 1 - taken / width), 1))
    column = gap * (len(shown) - 1)
    figure.draw_without_rendering()  # the axes take their place
    lacking = column - axes.get_window_extent().height * (72 / figure.dpi)
    if lacking > 0:
        figure.set_figheight(figure.get_figheight() + lacking / 72)
        figure.draw_without_rendering()
    points = axes.transData.transform([end[1:3] for end in shown]) * (72 / figure.dpi)
    box = axes.get_window_extent()
    right, low, high = (value * (72 / figure.dpi) for value in (box.x1, box.y0, box.y1))
    order, steps = np.argsort(points[:, 1], kind="stable"), gap * np.arange(len(shown))
    # Moved as little as it takes to be a line apart and beside the axes: names that collide share their middle.
    placed = np.clip(isotonic_regression(points[order, 1] - steps).x, low, max(low, high - column)) + steps
    for index, height in zip(order, placed, strict=True):
        name, x, y, colour = shown[index]
        leader = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.5,
            "alpha": 0.5,
        }  # no line of the figure is like it
        label = axes.annotate(
            literal(name),
            (x, y),
            xytext=(right + _LEADER_POINTS - points[index, 0], height - points[index, 1]),
            textcoords="offset points",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops=leader | {"shrinkA": 1.0, "shrinkB": 0.0, "relpos": (0.0, 0.5)},
        )
        label.set_in_layout(False)  # the room is there already
