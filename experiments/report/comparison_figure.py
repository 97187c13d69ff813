"""The comparison figure: training loss against epochs and against seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, SymmetricalLogLocator
from numpy.typing import NDArray

from ..runs.comparison import Comparison, Curve
from .figures import MARKERS, PLAIN, Styles, grid_figure, note, plain_axes, scale_losses, title
from .style import in_style

__all__ = ["comparison_figure"]

_MANY_EPOCHS = 5


@in_style
def comparison_figure(comparison: Comparison) -> Figure:
    """Draw the curves: left against epochs, right against training seconds; the key lists the best first.

    Args:
        comparison: with at least one curve.

    Returns:
        A figure that no window shows.
    """
    figure, grid = grid_figure(2, height=2.4, sharey=True)
    styles = Styles([curve.method for curve in comparison.curves])
    handles: dict[str, Line2D] = {}
    for axes, clock, label in zip(grid, ("epoch", "seconds"), ("epochs", "training time (s)"), strict=True):
        for place, curve in enumerate(comparison.curves):
            finite = [point for point in curve.points if point["train_loss"] is not None]
            (handles[curve.method],) = axes.plot(
                [point[clock] for point in finite],
                [point["train_loss"] for point in finite],
                **styles.line(curve.method)
                | {
                    "marker": MARKERS[(place + 5 * (place // len(MARKERS))) % len(MARKERS)],
                    "markevery": max(1, len(finite) // 8),
                    "markeredgecolor": "white",
                    "markeredgewidth": 0.4,
                },
            )
        axes.set(xlabel=label)
        plain_axes(axes)
        axes.set_xlim(left=0)
        for name, loss in comparison.landmarks.items():
            axes.axhline(loss, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
            across = axes.get_yaxis_transform()  # x as a share of the width, y a loss
            look: dict[str, Any] = {"ha": "right", "va": "bottom", "color": "0.35", "fontsize": "x-small"}
            words = axes.text(0.99, loss, name, transform=across, clip_on=True, **look)
            words.set_in_layout(False)  # it may lie far outside of the view
    _widen_first_epochs(grid[0], [curve.points[-1]["epoch"] for curve in comparison.curves if curve.points])
    grid[0].set(ylabel="training loss")
    told_of_axis = ""
    losses = [[point["train_loss"] for point in curve.points] for curve in comparison.curves]
    known = [value for values in losses for value in values if value is not None]
    if comparison.floor is None or min(known, default=0.0) <= comparison.floor:
        told_of_axis = scale_losses(grid[0], np.array(known), [values[0] or 0.0 for values in losses if values])
    else:
        _scale_distances(grid[0], np.array(known), comparison.floor, [values[0] or 0.0 for values in losses if values])
    ranked = comparison.ranked()
    figure.legend(
        [handles[curve.method] for curve in ranked],
        [_label(curve) for curve in ranked],
        loc="outside right center",
        title="final training loss",
    )
    where = comparison.environment.get("device_name")
    told = _title(comparison)
    title(figure, f"{told}, {where}", told, comparison.problem)
    note(figure, told_of_axis)
    return figure


def _widen_first_epochs(axes: Axes, last: Sequence[float]) -> None:
    """Logarithmic beyond the first epoch where cheap methods see far more epochs than dear ones in the same time."""
    if last and max(last) > _MANY_EPOCHS * max(min(last), 1.0):
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1.0, subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.set_xlim(0, max(last))


def _scale_distances(axes: Axes, losses: NDArray[np.float64], floor: float, starts: Sequence[float]) -> None:
    """Logarithmic in the distance from the floor, the ticks still losses: what is left to gain is what can be seen."""
    nearest = 0.9 * (float(losses.min()) - floor)
    ceiling = floor + 1.1 * (max(starts, default=float(losses.max())) - floor)
    axes.set_yscale(
        "function",
        functions=(lambda loss: np.log(np.maximum(loss - floor, nearest / 2)), lambda height: floor + np.exp(height)),
    )
    axes.set_ylim(floor + nearest, ceiling)
    steps = [step * 10.0**power for power in range(-3, 6) for step in (1, 2, 3, 5)]
    ticks = {round(step * math.ceil((floor + step) / step), 6) for step in steps}
    seen = sorted(tick for tick in ticks if floor + nearest < tick < ceiling)
    if len(seen) < 2:
        seen = [float(tick) for tick in MaxNLocator(4).tick_values(floor + nearest, ceiling)]
    axes.yaxis.set_major_locator(FixedLocator(seen))
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_locator(NullLocator())


def _label(curve: Curve) -> str:
    return f"{curve.method}  broke down" if curve.failure else f"{curve.method}  {curve.final_loss:.4g}"


def _title(comparison: Comparison) -> str:
    config = comparison.curves[0].config
    seconds, epochs = comparison.budget.seconds, comparison.budget.epochs
    bounds = [f"{seconds:g} s"] if seconds is not None else []
    bounds += [f"{epochs} epochs"] if epochs is not None else []
    batch = f"batch {config['batch_size']}"
    return f"{comparison.problem}: training loss, {batch}, at most {' or '.join(bounds)} each"
