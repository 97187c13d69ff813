"""Figures of a convergence map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ...analysis.function_space.convergence_map import Cell
from .figures import COLOURS, save_figure

__all__ = ["damping_eta_figure", "damping_width_figure", "rates_figure", "save_map_figures"]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_RATIOS = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=2.0)


def save_map_figures(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write damping-eta, damping-width and rates, each as PNG and PDF."""
    figures = {
        "damping-eta": damping_eta_figure(cells),
        "damping-width": damping_width_figure(cells),
        "rates": rates_figure(cells),
    }
    return [path for name, figure in figures.items() for path in save_figure(figure, folder / name)]


def damping_eta_figure(cells: Sequence[Cell]) -> Figure:
    """Worst measured ratio over (damping, eta), a panel per structure and width; certified cells bear a dot.

    Args:
        cells: at least one; a missing cell stays white, one whose error ran away is dark red.
    """
    names = list(dict.fromkeys(cell.key.blocks for cell in cells))
    widths = sorted({cell.key.width for cell in cells})
    figure = _figure(3.4 * len(widths) + 1.2, 2.5 * len(names) + 0.8)
    panels = figure.subplots(len(names), len(widths), squeeze=False, sharex=True, sharey=True)
    image: AxesImage | None = None
    for row, name in enumerate(names):
        for column, width in enumerate(widths):
            own = [cell for cell in cells if (cell.key.blocks, cell.key.width) == (name, width)]
            axes = panels[row][column]
            axes.set_title(f"{name}, width {width}", fontsize=9)
            if own:
                image = _draw_ratios(axes, own)
            if row == len(names) - 1:
                axes.set_xlabel("damping")
            if column == 0:
                axes.set_ylabel("eta")
    if image is not None:
        figure.colorbar(image, ax=panels, label="worst |e+|² / |e|²  (red: the error grew)", extend="max", shrink=0.6)
    figure.suptitle("dot: every step certified;  cross: rate 1 - eta missed", fontsize=10)
    return figure


def _draw_ratios(axes: Axes, cells: Sequence[Cell]) -> AxesImage:
    dampings = sorted({cell.key.damping for cell in cells})
    etas = sorted({cell.key.eta for cell in cells})
    grid = [[math.nan] * len(dampings) for _ in etas]
    for cell in cells:
        x, y = dampings.index(cell.key.damping), etas.index(cell.key.eta)
        grid[y][x] = min(cell.worst_ratio, 2.0) if math.isfinite(cell.worst_ratio) else 2.0
        if cell.certified:
            axes.plot(x, y, "o", color="black", markersize=3.5)
        elif not cell.kept:
            axes.plot(x, y, "x", color="0.25", markersize=3.5)
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="RdBu_r", norm=_RATIOS, interpolation="nearest")
    _ticks(axes, dampings, etas)
    return image


def damping_width_figure(cells: Sequence[Cell]) -> Figure:
    """Largest certified eta over (damping, width), a panel per structure; the number stands in the cell."""
    names = list(dict.fromkeys(cell.key.blocks for cell in cells))
    widths = sorted({cell.key.width for cell in cells})
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(4.0 * columns, rows * (0.45 * len(widths) + 1.7))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        own = [cell for cell in cells if cell.key.blocks == name]
        dampings = sorted({cell.key.damping for cell in own})
        grid = [[math.nan] * len(dampings) for _ in widths]
        for cell in own:
            x, y = dampings.index(cell.key.damping), widths.index(cell.key.width)
            if cell.certified and not grid[y][x] >= cell.key.eta:
                grid[y][x] = cell.key.eta
        axes.imshow(grid, origin="lower", aspect="auto", cmap="Greens", norm=LogNorm(1e-3, 3.0))
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if math.isfinite(value):
                    axes.text(x, y, f"{value:g}", ha="center", va="center", fontsize=7)
        _ticks(axes, dampings, [float(width) for width in widths])
        axes.set(xlabel="damping", ylabel="width")
        axes.set_title(name, fontsize=10)
    figure.suptitle("largest step size eta with certified rate 1 - eta; empty: none", fontsize=10)
    return figure


def rates_figure(cells: Sequence[Cell]) -> Figure:
    """Smallest contraction 1 - |e+|^2 / |e|^2 against the certified eta; all certified cells lie above the line."""
    figure = _figure(6.4, 4.8)
    axes = figure.subplots()
    names = list(dict.fromkeys(cell.key.blocks for cell in cells))
    for index, name in enumerate(names):
        own = [cell for cell in cells if cell.certified and cell.key.blocks == name]
        shifts = [1.0 + 0.06 * (index - (len(names) - 1) / 2)] * len(own)  # so that structures do not hide each other
        axes.plot(
            [cell.key.eta * shift for cell, shift in zip(own, shifts, strict=True)],
            [1.0 - cell.worst_ratio for cell in own],
            _MARKERS[index % 7],
            color=COLOURS[index % 7],
            markersize=4.5,
            alpha=0.8,
            label=f"{name} ({len(own)})",
        )
    etas = sorted({cell.key.eta for cell in cells})
    axes.plot(etas, etas, color="0.4", linewidth=1.0, linestyle="--", label="certified")
    axes.set(
        xlabel="certified contraction eta", ylabel="smallest measured 1 - |e+|² / |e|²", xscale="log", yscale="log"
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ticks(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    axes.set_xticks(range(len(x)), [f"{value:.0e}".replace("e-0", "e-") for value in x], rotation=90, fontsize=7)
    axes.set_yticks(range(len(y)), [f"{value:g}" for value in y], fontsize=7)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
