"""Figures of courses: medians over seeds with bands between the quartiles, and step sizes layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from numpy.typing import NDArray

from .figures import Styles, decades_between, grid_figure, name_lines, note, one_panel, plain_axes, scale_losses, title
from .scoring import higher_is_better, quantile
from .study_records import StudyRecord
from .style import in_style

__all__ = ["course_band", "course_figure", "generalisation_figure", "layer_step_figures"]

_CLOCKS = {"epoch": "epochs", "seconds": "training time (s)", "gradient_evaluations": "gradient evaluations"}
_HELD_OUT = ("valid_loss", "valid_accuracy", "test_loss", "test_accuracy", "relative_l2", "suboptimality")
_POINTS = 200
_NAMED_LAYERS = 12
"""Deeper networks have the first and the last layer named."""

Floats = NDArray[np.float64]


def course_band(record: StudyRecord, problem: str, arm: str, clock: str, metric: str) -> tuple[Floats, Floats] | None:
    """Quartiles of a metric over the seeds of an arm, on one clock.

    Runs are interpolated linearly between evaluations, up to where the first run that finished ends. A run that broke
    down is the worst possible from its last evaluation on, so a median of an arm that breaks down ends there; so is one
    whose first values are not finite, before the first that is.

    Returns:
        The clock, (T,), and quartiles, (3, T) with infinities; ``None`` without a run that has the metric.
    """
    finals = record.finals(problem, arm)
    runs = [(record.course(run), state) for run, state in zip(finals.run, finals.state, strict=True)]
    runs = [(course, state) for course, state in runs if len(course) and clock in course and metric in course]
    if not runs:
        return None
    ends = [float(course[clock].iloc[-1]) for course, state in runs if state == "finished"]
    end = min(ends, default=max(float(course[clock].iloc[-1]) for course, _ in runs))
    marks = np.unique(np.concatenate([course[clock].to_numpy(dtype=float) for course, _ in runs]))
    grid = marks[marks <= end] if len(marks) <= _POINTS else np.linspace(marks[0], end, _POINTS)
    sign = -1.0 if higher_is_better(metric) else 1.0
    lines = []
    for course, _ in runs:
        times, values = course[clock].to_numpy(dtype=float), sign * course[metric].to_numpy(dtype=float)
        known = np.isfinite(values)
        if known.any():
            lines.append(np.interp(grid, times[known], values[known], left=math.inf, right=math.inf))
    if not lines:
        return None
    stacked = np.stack(lines)
    return grid, sign * np.stack([quantile(stacked, share, axis=0) for share in (0.25, 0.5, 0.75)])


@in_style
def course_figure(record: StudyRecord, problem: str, styles: Styles) -> Figure | None:
    """Training loss against epochs, seconds and gradient evaluations; ``None`` without a run."""
    target = record.target(problem)
    line = target[1] if target and target[0] == "train_loss" else None
    panels = [(clock, "train_loss", label, "training loss") for clock, label in _CLOCKS.items()]
    return _figure(record, problem, styles, "training loss", panels, line)


@in_style
def generalisation_figure(record: StudyRecord, problem: str, styles: Styles) -> Figure | None:
    """Losses and accuracies on held-out data, and the distance to a known optimum; ``None`` where there are none."""
    panels = [("epoch", metric, "epochs", metric.replace("_", " ")) for metric in _HELD_OUT]
    return _figure(record, problem, styles, "held-out data", panels, None)


def _figure(
    record: StudyRecord,
    problem: str,
    styles: Styles,
    what: str,
    panels: Sequence[tuple[str, str, str, str]],
    target: float | None,
) -> Figure | None:
    drawn = []
    for panel in panels:
        bands = {arm: course_band(record, problem, arm, panel[0], panel[1]) for arm in record.arms}
        found = {arm: band for arm, band in bands.items() if band is not None}
        if found:
            drawn.append((panel, found))
    if not drawn:
        return None
    figure, grid = grid_figure(len(drawn))
    remarks: list[str] = []
    for axes, ((_, metric, x_label, y_label), found) in zip(grid, drawn, strict=False):
        _draw_bands(axes, found, styles, target)
        if not higher_is_better(metric):
            medians = [median[np.isfinite(median)] for _, (_, median, _) in found.values()]
            drawn_values = np.concatenate([*medians, [] if target is None else [target]])
            remarks.append(scale_losses(axes, drawn_values, [float(median[0]) for median in medians if len(median)]))
        axes.set(xlabel=x_label, ylabel=y_label)
    title(figure, f"{problem}: {what}, median over seeds and quartiles", f"{problem}: {what}", problem)
    shown = [arm for arm in record.arms if any(arm in found for _, found in drawn)]
    handles = [styles.handle(arm) for arm in shown]
    last, beside = grid[len(drawn) - 1], grid[-1] if len(grid) > len(drawn) else None
    ends, gone = _line_ends(last, drawn[-1][1], styles)
    remarks += [f"no line within the view: {', '.join(gone)}"] if gone else []
    if any(_stops(band) for _, found in drawn for band in found.values()):
        remarks.append("a cross: half of the runs broke down")
    late = [arm for arm in shown if any(arm in found and _begins_late(found[arm]) for _, found in drawn)]
    remarks += [f"first values not finite: {', '.join(late)}"] if late else []
    name_lines(last, ends, handles, beside, "; ".join(dict.fromkeys(filter(None, remarks))))
    return figure


def _stops(band: tuple[Floats, Floats]) -> bool:
    """Whether half of the runs have broken down before the end."""
    known = np.isfinite(band[1][1])
    return bool(known.any() and not known[-1])


def _begins_late(band: tuple[Floats, Floats]) -> bool:
    """Whether the first values of half of the runs are not finite."""
    known = np.isfinite(band[1][1])
    return bool(known.any() and not known[0])


def _draw_bands(axes: Axes, bands: dict[str, tuple[Floats, Floats]], styles: Styles, target: float | None) -> None:
    for arm, (clock, (low, median, high)) in bands.items():
        seen = np.where(np.isfinite(median), median, math.nan)
        axes.plot(clock, seen, **styles.line(arm))
        known = np.flatnonzero(np.isfinite(median))
        if len(known) == 1:
            axes.plot(clock[known], median[known], "o", color=styles.colour(arm), markersize=3)
        if len(known) and known[-1] + 1 < len(median):  # half of the runs have broken down
            axes.plot(clock[known[-1]], median[known[-1]], "x", color=styles.colour(arm), markersize=5)
        axes.fill_between(
            clock, low, np.where(np.isfinite(high), high, seen), color=styles.colour(arm), alpha=0.15, lw=0
        )
    if target is not None:
        axes.axhline(target, color="0.4", linewidth=0.8, linestyle=":")
        axes.annotate(
            "target", (0.01, target), xycoords=("axes fraction", "data"), fontsize="x-small", color="0.4", va="bottom"
        )
    plain_axes(axes)


def _line_ends(
    axes: Axes, last: dict[str, tuple[Floats, Floats]], styles: Styles
) -> tuple[list[tuple[str, float, float, str]], list[str]]:
    """Ends of the lines of the last panel, and the arms that have none: off its scale, or broken down at once."""
    ends = []
    for arm, (clock, (_, median, _)) in last.items():
        seen = np.flatnonzero(np.isfinite(median) & (median <= axes.get_ylim()[1]))
        if len(seen) > 1:
            ends.append((arm, float(clock[seen[-1]]), float(median[seen[-1]]), styles.colour(arm)))
    named = {end[0] for end in ends}
    return ends, [arm for arm in styles.arms if arm in last and arm not in named]


@in_style
def layer_step_figures(record: StudyRecord) -> dict[str, Figure]:
    """Step size of every layer over the epochs, one figure per problem and arm that recorded any.

    Lines are medians over the seeds, the first layer dark, the last one light.
    """
    steps = record.layer_steps.merge(record.runs[record.runs.phase == "final"][["run", "problem", "arm"]], on="run")
    figures = {}
    for (problem, arm), group in steps.groupby(["problem", "arm"], sort=False):
        figures[f"{problem}-{arm}"] = _layer_figure(str(problem), str(arm), group)
    return figures


def _layer_figure(problem: str, arm: str, group: pd.DataFrame) -> Figure:
    layers = list(dict.fromkeys(group.layer))
    medians = group.groupby(["layer", "epoch"]).step.median().unstack("layer")[layers]
    figure, axes = one_panel()
    colours = colormaps["viridis"](np.linspace(0.0, 0.85, len(layers)))
    ends, handles = [], []
    for layer, colour in zip(layers, colours, strict=True):
        line = medians[layer].dropna()
        look: dict[str, Any] = {"color": colour, "linewidth": 1.1, "marker": "o", "markersize": 1.8}
        (drawn,) = axes.plot(line.index, line, label=str(layer), **look)
        handles.append(drawn)
        ends.append((str(layer), float(line.index[-1]), float(line.iloc[-1]), to_hex(colour)))
    positive = medians.to_numpy()[medians.to_numpy() > 0]
    if len(positive) and positive.max() >= 10 * positive.min():
        axes.set_yscale("symlog", linthresh=float(positive.min()))
        axes.yaxis.set_major_locator(FixedLocator(decades_between(float(positive.min()), float(positive.max()))))
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    axes.set(xlabel="epochs", ylabel="step size")
    title(
        figure,
        f"{problem}, {arm}: step sizes by layer, median over seeds",
        f"{problem}, {arm}: step sizes by layer",
        f"{problem}, {arm}: step sizes",
    )
    plain_axes(axes)
    if len(layers) <= _NAMED_LAYERS:
        name_lines(axes, ends, handles)
    else:
        note(figure, f"violet to green: the {len(layers)} layers in order, from {layers[0]} to {layers[-1]}")
    return figure
