"""The comparison figure: training loss against epochs and against seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..runs.comparison import Comparison, Curve

__all__ = ["COLOURS", "DASHES", "comparison_figure", "logarithmic_axis", "save_figure"]

# Okabe and Ito's colour-blind-safe palette, its yellow (too light for lines) replaced by brown.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C510A")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LOG_FROM_RATIO = 4.0


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw the curves: left against epochs, right against training seconds; the key lists the best first.

    Args:
        comparison: with at least one curve.

    Returns:
        A figure that no window shows.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    by_epochs, by_seconds = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Line2D] = {}
    for index, curve in enumerate(comparison.curves):
        for axes, name in ((by_epochs, "epoch"), (by_seconds, "seconds")):
            handles[curve.method] = _draw(axes, curve, name, index)
    by_epochs.set(xlabel="epochs", ylabel="training loss")
    by_seconds.set(xlabel="training time (s)")
    _scale(by_epochs, comparison.curves)
    for axes in (by_epochs, by_seconds):
        axes.grid(visible=True, which="both", color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    ranked = comparison.ranked()
    figure.legend(
        [handles[curve.method] for curve in ranked],
        [_label(curve) for curve in ranked],
        loc="outside right center",
        title="final training loss",
        frameon=False,
        handlelength=3.2,
    )
    figure.suptitle(_title(comparison), fontsize=11)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.pdf`` and return both paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")]  # a name may hold dots
    figure.savefig(paths[0], dpi=160)
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def _draw(axes: Axes, curve: Curve, name: str, index: int) -> Line2D:
    finite = [point for point in curve.points if point["train_loss"] is not None]
    (line,) = axes.plot(
        [point[name] for point in finite],
        [point["train_loss"] for point in finite],
        color=COLOURS[index % len(COLOURS)],
        linewidth=1.7,
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=4.5,
        markevery=max(1, len(finite) // 8),
        markeredgecolor="white",
        markeredgewidth=0.5,
    )
    dashes = DASHES[index % len(DASHES)]
    if dashes:
        line.set_dashes(dashes)
    return line


def _scale(axes: Axes, curves: Sequence[Curve]) -> None:
    values = [point["train_loss"] for curve in curves for point in curve.points if point["train_loss"] is not None]
    if not values:
        return
    ceiling = 1.5 * max((curve.points[0]["train_loss"] or 0.0 for curve in curves if curve.points), default=0.0)
    capped = max(values) > ceiling > 0  # a method that diverges must not flatten the others
    if capped:
        values = [value for value in values if value <= ceiling]
    logarithmic = min(values) > 0 and max(values) >= _LOG_FROM_RATIO * min(values)
    if logarithmic:
        logarithmic_axis(axes, values)
    if capped:
        margin = 0.05 * (max(values) - min(values))
        axes.set_ylim(min(values) / 1.1 if logarithmic else min(values) - margin, ceiling)


def logarithmic_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic, with plain numbers where the values lie within few decades.

    Args:
        axes: to change.
        values: what is drawn, > 0.
    """
    axes.set_yscale("log")
    decades = math.log10(max(values) / min(values))
    between = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=between))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(curve: Curve) -> str:
    return f"{curve.method}  broke down" if curve.failure else f"{curve.method}  {curve.final_loss:.4g}"


def _title(comparison: Comparison) -> str:
    config = comparison.curves[0].config
    seconds, epochs = comparison.budget.seconds, comparison.budget.epochs
    bounds = [f"{seconds:g} s"] if seconds is not None else []
    bounds += [f"{epochs} epochs"] if epochs is not None else []
    where = comparison.environment.get("device_name")
    return f"{comparison.problem}, batch {config['batch_size']}, at most {' or '.join(bounds)} each, {where}"
