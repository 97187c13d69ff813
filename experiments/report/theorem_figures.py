"""Figures of theorems, and equations as pictures: everything that a report without a network needs drawn."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import mathtext, rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ...analysis.theorem import Curve, Plot
from .figures import COLOURS, grid_figure, plain_axes, scale_to_zero, text_points
from .style import in_style

__all__ = ["equation_pieces", "equation_svg", "plots_figure"]

_COLOURS = (
    *(colour for colour in COLOURS if colour != "#000000"),  # black comes late: lone bounds are black
    *("#000000", "#999999", "#882255", "#44AA99", "#332288", "#999933", "#661100"),
)
_DASHES = {"measured": "-", "bound": "--", "control": ":"}
Floats = NDArray[np.float64]
_LEGEND_LIMIT = 14
_INSIDE = 4
"""Entries of a legend that stand in the panel."""
_ROUNDING = 1e-5
"""Curves that differ by less, relative to the largest value, are drawn as one line: rounding is nothing to look at."""

_SYNONYMS = (
    (r"\\le(?![a-zA-Z])", r"\\leq"),
    (r"\\ge(?![a-zA-Z])", r"\\geq"),
    (r"\\iff(?![a-zA-Z])", r"\\Leftrightarrow"),
    (r"\\(textstyle|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
)
"""Patterns of LaTeX that mathtext lacks, and what it has instead."""


@in_style
def plots_figure(plots: Sequence[Plot]) -> Figure:
    """All plots of one theorem, two in a row.

    Args:
        plots: at least one.
    """
    figure, panels = grid_figure(len(plots))
    below, room = 0.0, 72 * figure.get_figwidth() / min(2, len(plots)) - 55
    size = min(_fitting(_one_line(plot.title), room) for plot in plots)
    for axes, plot in zip(panels, plots, strict=False):
        axes.set_xscale("log" if plot.x_log else "linear")
        axes.set_yscale("log" if plot.y_log else "linear")
        axes.set_xlabel(plot.x_label)
        if plot.x_label == "step" and not plot.x_log:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(plot.y_label, fontsize=_fitting(plot.y_label, 72 * 1.75))
        axes.set_title(_one_line(plot.title), fontsize=size)
        if plot.grid is None:
            below = max(below, _draw_curves(axes, plot))
        else:
            _draw_map(figure, axes, plot, np.array(plot.grid, dtype=float))
    figure.set_figheight(figure.get_figheight() + below * -(-len(plots) // min(2, len(plots))))
    return figure


def _one_line(text: str) -> str:
    return "; ".join(text.splitlines())


def _fitting(text: str, room: float) -> float:
    """Size of letters with which a line is no longer than this, in points."""
    size = FontProperties(size=rcParams["axes.labelsize"]).get_size_in_points()
    return max(4.5, min(size, size * room / max(1.0, text_points(text, size))))


def _draw_curves(axes: Axes, plot: Plot) -> float:
    """Draw the lines of a plot, and return by how much its legend makes the panel higher, in inches."""
    colours: dict[str, str] = {}
    for curve in plot.curves:
        if curve.style == "bound" and len(plot.curves) < 3:
            colours[_family(curve)] = "black"
        else:
            colours.setdefault(_family(curve), _COLOURS[len(colours) % len(_COLOURS)])
    shown: list[float] = []
    for curve in plot.curves:
        x, y = _drawable(plot, curve)
        shown += list(y[np.isfinite(y)])
        marker = "o" if len(x) == 1 else None
        style = _DASHES[curve.style]
        axes.plot(x, y, style, color=colours[_family(curve)], label=curve.label, marker=marker)
    if shown and (largest := max(map(abs, shown))) > 0.0 and max(shown) - min(shown) < _ROUNDING * largest:
        axes.set_yscale("linear")
        axes.set_ylim(min(shown) - 0.01 * largest, max(shown) + 0.01 * largest)
    elif plot.y_log and 0.0 in shown:
        positive = [value for value in shown if value > 0.0]
        if positive:
            scale_to_zero(axes, min(positive), max(positive))
        else:
            axes.set_yscale("linear")
    plain_axes(axes)
    return _explain(axes, plot) if 1 < len(plot.curves) <= _LEGEND_LIMIT else 0.0


def _explain(axes: Axes, plot: Plot) -> float:
    """A legend: in the panel where it is small, else below it."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    room = 72 * figure.get_figwidth() / (1 if len(figure.axes) == 1 else 2) - 20
    widest = max(text_points(curve.label, 6) for curve in plot.curves) + 24
    if len(plot.curves) <= _INSIDE and widest <= 0.5 * room:
        axes.legend(fontsize=6, handlelength=2.2)
        return 0.0
    columns = max(1, min(len(plot.curves), int(room // widest)))
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.24),
        ncols=columns,
        fontsize=6,
        handlelength=2.2,
        columnspacing=1.0,
        borderaxespad=0.0,
    )
    return 8.2 / 72 * -(-len(plot.curves) // columns)


def _family(curve: Curve) -> str:
    """Curves of one colour: what was measured, and its bound or model."""
    return curve.label.removesuffix(", bound").removesuffix(", model")


def _drawable(plot: Plot, curve: Curve) -> tuple[Floats, Floats]:
    """Points that the axes can show; a gap where they cannot."""
    x, y = np.array(curve.x, dtype=float), np.array(curve.y, dtype=float)
    kept = np.isfinite(x) & ((x > 0) | (not plot.x_log))
    return x[kept], np.where(np.isfinite(y) & ((y >= 0) | (not plot.y_log)), y, np.nan)[kept]


def _draw_map(figure: Figure, axes: Axes, plot: Plot, cells: Floats) -> None:
    finite = cells[np.isfinite(cells)]
    wide = len(finite) > 0 and finite.min() > 0 and finite.max() > 100 * finite.min()
    norm = LogNorm(finite.min(), finite.max()) if wide else None
    shown = np.where(np.isfinite(cells), cells, np.nan)
    mesh = axes.pcolormesh(
        plot.grid_x, plot.grid_y, shown, shading="nearest", cmap="viridis", norm=norm, rasterized=True
    )
    solids = figure.colorbar(mesh, ax=axes).solids
    assert solids is not None
    solids.set_rasterized(True)


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
        with rc_context({"savefig.transparent": True}):
            mathtext.math_to_image(f"${equation}$", buffer, prop=FontProperties(size=13), format="svg")
    except ValueError:
        return None
    return buffer.getvalue().decode()
