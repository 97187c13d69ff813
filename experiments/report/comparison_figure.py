"""The comparison figure: training loss against epochs and against seconds."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..runs.comparison import Comparison, Curve
from .figures import MARKERS, Styles, new_figure, plain_axes, scale_losses

__all__ = ["comparison_figure"]


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw the curves: left against epochs, right against training seconds; the key lists the best first.

    Args:
        comparison: with at least one curve.

    Returns:
        A figure that no window shows.
    """
    figure, grid = new_figure(11, 4.4, columns=2, sharey=True)
    styles = Styles([curve.method for curve in comparison.curves])
    handles: dict[str, Line2D] = {}
    for axes, clock, label in zip(grid, ("epoch", "seconds"), ("epochs", "training time (s)"), strict=True):
        for curve, marker in zip(comparison.curves, MARKERS * len(comparison.curves), strict=False):
            finite = [point for point in curve.points if point["train_loss"] is not None]
            (handles[curve.method],) = axes.plot(
                [point[clock] for point in finite],
                [point["train_loss"] for point in finite],
                marker=marker,
                markersize=4.5,
                markevery=max(1, len(finite) // 8),
                markeredgecolor="white",
                markeredgewidth=0.5,
                **styles.line(curve.method),
            )
        axes.set(xlabel=label)
        plain_axes(axes)
        axes.set_xlim(left=0)
    grid[0].set(ylabel="training loss")
    losses = [[point["train_loss"] for point in curve.points] for curve in comparison.curves]
    known = [value for values in losses for value in values if value is not None]
    scale_losses(grid[0], np.array(known), [values[0] or 0.0 for values in losses if values])
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


def _label(curve: Curve) -> str:
    return f"{curve.method}  broke down" if curve.failure else f"{curve.method}  {curve.final_loss:.4g}"


def _title(comparison: Comparison) -> str:
    config = comparison.curves[0].config
    seconds, epochs = comparison.budget.seconds, comparison.budget.epochs
    bounds = [f"{seconds:g} s"] if seconds is not None else []
    bounds += [f"{epochs} epochs"] if epochs is not None else []
    where = comparison.environment.get("device_name")
    return f"{comparison.problem}, batch {config['batch_size']}, at most {' or '.join(bounds)} each, {where}"
