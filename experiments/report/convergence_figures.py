"""Figures of a convergence map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter

from ...analysis.function_space.convergence_map import Cell
from .figures import (
    COLOURS,
    MARKERS,
    PLAIN,
    name_lines,
    new_figure,
    note,
    one_panel,
    plain_axes,
    save_figure,
    text_width,
    title,
)
from .style import in_style

__all__ = ["damping_eta_figure", "damping_width_figure", "rates_figure", "save_map_figures"]

_RATIOS = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=2.0)


@in_style
def save_map_figures(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write damping-eta, damping-width and rates, each as PNG and PDF."""
    table = pd.DataFrame([cell.to_dict() for cell in cells])
    figures = {
        "damping-eta": damping_eta_figure(table),
        "damping-width": damping_width_figure(table),
        "rates": rates_figure(table),
    }
    return [path for name, figure in figures.items() for path in save_figure(figure, folder / name)]


@in_style
def damping_eta_figure(cells: pd.DataFrame) -> Figure:
    """Worst measured ratio over (damping, eta), a panel per structure and width; certified cells bear a dot.

    Args:
        cells: at least one row of :meth:`Cell.to_dict`; a missing cell stays white, one whose error ran away is dark
            red.
    """
    names, widths = list(cells.blocks.unique()), sorted(cells.width.unique())
    size = (text_width(), 1.5 * len(names) + 0.8)
    figure, panels = new_figure(*size, len(widths), len(names), sharex=True, sharey=True)
    image: AxesImage | None = None
    for place, axes in enumerate(panels):
        name, width = names[place // len(widths)], widths[place % len(widths)]
        axes.set_title(f"{name}, width {width}")
        own = cells[(cells.blocks == name) & (cells.width == width)]
        if len(own):
            image = _draw_ratios(axes, own)
        axes.set(xlabel="damping", ylabel="eta")
        axes.label_outer()
    if image is not None:
        bar = figure.colorbar(image, ax=panels, label="worst |e+|² / |e|²", extend="max", shrink=0.6)
        assert bar.solids is not None
        bar.solids.set_rasterized(True)
    title(figure, "worst ratio of a step's errors, |e+|² / |e|², by damping and step size eta")
    note(figure, "red: the error grew; dot: every step certified; cross: rate 1 - eta missed")
    return figure


def _draw_ratios(axes: Axes, cells: pd.DataFrame) -> AxesImage:
    seen = cells.assign(ratio=cells.worst_ratio.where(np.isfinite(cells.worst_ratio), 2.0).clip(upper=2.0))
    grid = seen.pivot(index="eta", columns="damping", values="ratio")
    for marker, colour, marked in (("o", "black", seen.certified), ("x", "0.25", ~seen.certified & ~seen.kept)):
        x, y = grid.columns.searchsorted(seen.damping[marked]), grid.index.searchsorted(seen.eta[marked])
        axes.plot(x, y, marker, color=colour, markersize=2.5)
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="RdBu_r", norm=_RATIOS, interpolation="nearest")
    _ticks(axes, grid)
    return image


@in_style
def damping_width_figure(cells: pd.DataFrame) -> Figure:
    """Largest certified eta over (damping, width), a panel per structure; the number stands in the cell."""
    names, widths = list(cells.blocks.unique()), sorted(cells.width.unique())
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure, panels = new_figure(text_width(), rows * (0.28 * len(widths) + 1.2), columns, rows)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        own = cells[cells.blocks == name]
        largest = own.assign(eta=own.eta.where(own.certified))
        grid = largest.pivot_table(index="width", columns="damping", values="eta", aggfunc="max", dropna=False)
        grid = grid.reindex(index=widths)
        axes.imshow(grid, origin="lower", aspect="auto", cmap="Greens", norm=LogNorm(1e-3, 3.0))
        for (y, x), value in np.ndenumerate(grid.to_numpy()):
            if np.isfinite(value):
                axes.text(x, y, f"{value:g}", ha="center", va="center", fontsize=6)
        _ticks(axes, grid)
        axes.set(xlabel="damping", ylabel="width")
        axes.set_title(name)
    title(figure, "largest step size eta with certified rate 1 - eta; empty: none")
    return figure


@in_style
def rates_figure(cells: pd.DataFrame) -> Figure:
    """Smallest contraction 1 - |e+|^2 / |e|^2 against the certified eta; all certified cells lie above the line."""
    figure, axes = one_panel()
    names, handles = list(cells.blocks.unique()), []
    for index, name in enumerate(names):
        own = cells[cells.certified & (cells.blocks == name)]
        shift = 1.0 + 0.06 * (index - (len(names) - 1) / 2)  # so that structures do not hide each other
        (line,) = axes.plot(own.eta * shift, 1.0 - own.worst_ratio, MARKERS[index % 7], label=f"{name} ({len(own)})")
        handles.append(line)
        line.set(color=COLOURS[index % 7], markersize=3.5, alpha=0.8)
    etas = sorted(cells.eta.unique())
    handles += axes.plot(etas, etas, color="0.4", linewidth=1.0, linestyle="--", label="certified")
    axes.set(xlabel="certified contraction eta", ylabel="smallest measured 1 - |e+|² / |e|²")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_major_formatter(PLAIN)
        axis.set_minor_formatter(NullFormatter())
    plain_axes(axes)
    title(figure, "contraction of certified steps: measured and certified", "measured and certified contraction")
    name_lines(axes, (), handles)
    return figure


def _ticks(axes: Axes, grid: pd.DataFrame) -> None:
    dampings = [f"{value:.0e}".replace("e-0", "e-") for value in grid.columns]
    axes.set_xticks(range(grid.shape[1]), dampings, rotation=90, fontsize=6)
    axes.set_yticks(range(grid.shape[0]), [f"{value:g}" for value in grid.index], fontsize=6)
