"""Figures of theorems, and equations as pictures: everything that a report without a network needs drawn."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

from matplotlib import mathtext
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from ...analysis.theorem import Curve, Plot
from .figures import COLOURS

__all__ = ["equation_pieces", "equation_svg", "plots_figure"]

_COLOURS = (
    *(colour for colour in COLOURS if colour != "#000000"),  # black comes late: lone bounds are black
    *("#000000", "#999999", "#882255", "#44AA99", "#332288", "#999933", "#661100"),
)
_DASHES = {"measured": "-", "bound": "--", "control": ":"}
_COLUMNS = 2
_LEGEND_LIMIT = 14
_ROUNDING = 1e-5
"""Curves that differ by less, relative to the largest value, are drawn as one line: rounding is nothing to look at."""

_SYNONYMS = (
    (r"\\le(?![a-zA-Z])", r"\\leq"),
    (r"\\ge(?![a-zA-Z])", r"\\geq"),
    (r"\\iff(?![a-zA-Z])", r"\\Leftrightarrow"),
    (r"\\(textstyle|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
)
"""Patterns of LaTeX that mathtext lacks, and what it has instead."""


def plots_figure(plots: Sequence[Plot]) -> Figure:
    """All plots of one theorem, two in a row.

    Args:
        plots: at least one.
    """
    columns = min(_COLUMNS, len(plots))
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(plots):
            axes.set_axis_off()
        elif plots[index].grid is None:
            _draw_curves(axes, plots[index])
        else:
            _draw_map(axes, plots[index])
    return figure


def _draw_curves(axes: Axes, plot: Plot) -> None:
    colours: dict[str, str] = {}
    for curve in plot.curves:
        if curve.style == "bound" and len(plot.curves) < 3:
            colours[_family(curve)] = "black"
        else:
            colours.setdefault(_family(curve), _COLOURS[len(colours) % len(_COLOURS)])
    shown: list[float] = []
    for curve in plot.curves:
        x, y = _drawable(plot, curve)
        shown += [value for value in y if math.isfinite(value)]
        marker = "o" if len(x) == 1 else None
        style = _DASHES[curve.style]
        axes.plot(x, y, style, color=colours[_family(curve)], label=curve.label, linewidth=1.5, marker=marker)
    if plot.x_log:
        axes.set_xscale("log")
    if plot.y_log:
        axes.set_yscale("log")
    if shown and (largest := max(map(abs, shown))) > 0.0 and max(shown) - min(shown) < _ROUNDING * largest:
        axes.set_yscale("linear")
        axes.set_ylim(min(shown) - 0.01 * largest, max(shown) + 0.01 * largest)
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axes.set_title(plot.title, fontsize=10)
    axes.grid(visible=True, which="major", color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(plot.curves) <= _LEGEND_LIMIT:
        axes.legend(frameon=False, fontsize=7)


def _family(curve: Curve) -> str:
    """Curves of one colour: what was measured, and its bound or model."""
    return curve.label.removesuffix(", bound").removesuffix(", model")


def _drawable(plot: Plot, curve: Curve) -> tuple[list[float], list[float]]:
    """Points that the axes can show; a gap where they cannot."""

    def shown(value: float, log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    pairs = [(float(x), float(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    kept = [(x, y if shown(y, plot.y_log) else math.nan) for x, y in pairs if shown(x, plot.x_log)]
    return [x for x, _ in kept], [y for _, y in kept]


def _draw_map(axes: Axes, plot: Plot) -> None:
    assert plot.grid is not None
    finite = [value for row in plot.grid for value in row if math.isfinite(value)]
    wide = bool(finite) and min(finite) > 0 and max(finite) > 100 * min(finite)
    norm = LogNorm(min(finite), max(finite)) if wide else None
    cells = [[value if math.isfinite(value) else math.nan for value in row] for row in plot.grid]
    mesh = axes.pcolormesh(list(plot.grid_x), list(plot.grid_y), cells, shading="nearest", cmap="viridis", norm=norm)
    if plot.x_log:
        axes.set_xscale("log")
    if plot.y_log:
        axes.set_yscale("log")
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axes.set_title(plot.title, fontsize=10)
    if axes.figure is not None:
        axes.figure.colorbar(mesh, ax=axes)


def equation_pieces(equation: str) -> list[str]:
    r"""An equation cut at ``\quad`` and ``\;``, so that a narrow page can break it."""
    pieces = [piece.strip().strip(",").strip() for piece in equation.replace(r"\;", r"\quad").split(r"\quad")]
    return [piece for piece in pieces if piece]


def equation_svg(equation: str) -> str | None:
    """One equation as a stand-alone SVG picture; ``None`` if mathtext cannot set it.

    Args:
        equation: LaTeX without dollars.
    """
    buffer = io.BytesIO()
    for pattern, replacement in _SYNONYMS:
        equation = re.sub(pattern, replacement, equation)
    try:
        mathtext.math_to_image(f"${equation}$", buffer, prop=FontProperties(size=13), format="svg")
    except ValueError:
        return None
    return buffer.getvalue().decode()
