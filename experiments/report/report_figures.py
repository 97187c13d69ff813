"""Figures of scores: budget curves, performance profiles, effects of replaced parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Formatter, FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from .figures import (
    COLOURS,
    PLAIN,
    Styles,
    column_width,
    grid_figure,
    lines_of,
    literal,
    name_lines,
    note,
    one_panel,
    plain_axes,
    scale_losses,
    title,
)
from .report_curves import course_figure, generalisation_figure, layer_step_figures
from .report_tables import ALL_PROBLEMS, CLOCKS, profile_times
from .scoring import quantile
from .scoring_profiles import LARGEST_RATIO, profile, ratios_to_best
from .study_records import StudyRecord
from .style import in_style

__all__ = ["ablation_figures", "budget_figure", "profile_figure", "report_figures"]

_EDGE = 16.0

_DECADES_WITH_MINOR_LABELS = 1.2
"""On a longer axis the numbers between powers of ten would be written over one another."""

_DECADES_WITH_ALL_LABELS = 0.7


@in_style
def report_figures(record: StudyRecord, values: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """All figures that the study has the runs for, by name.

    Args:
        record: the study.
        values: see ``report_tables.final_values``.
        tables: with ``budget`` and ``ablation``.
    """
    styles = Styles(record.arms)
    found: dict[str, Figure | None] = {}
    for problem in record.problems:
        found[f"loss-{problem}"] = course_figure(record, problem, styles)
        found[f"held-out-{problem}"] = generalisation_figure(record, problem, styles)
        found[f"budget-{problem}"] = budget_figure(tables["budget"], problem, styles)
    found["profiles"] = profile_figure(record, values, styles)
    found |= ablation_figures(tables["ablation"])
    found |= {f"layer-steps-{name}": figure for name, figure in layer_step_figures(record).items()}
    return {name: figure for name, figure in found.items() if figure is not None}


@in_style
def budget_figure(table: pd.DataFrame, problem: str, styles: Styles) -> Figure | None:
    """Best tuning value after k trials: median of all choices of k trials, band between the quartiles."""
    mine = table[table.problem == problem]
    mine = mine[mine.groupby("arm").trials.transform("max") > 1]
    if not len(mine):
        return None
    figure, axes = one_panel()
    ends, without, arms = [], [], []
    for name, curve in mine.groupby("arm", sort=False):
        arm = str(name)
        seen = curve["median"].where(np.isfinite(curve["median"]))
        look: dict[str, Any] = {"marker": "o", "markersize": 2.2}
        axes.plot(curve.trials, seen, **look | styles.line(arm))
        high = curve.q75.where(np.isfinite(curve.q75), seen)
        axes.fill_between(curve.trials, curve.q25, high, color=styles.colour(arm), alpha=0.13, lw=0)
        known = seen.dropna()
        if len(known):
            arms.append(arm)
            ends.append((arm, float(curve.trials.iloc[-1]), float(known.iloc[-1]), styles.colour(arm)))
        else:
            without.append(arm)
    drawn = np.array([end[2] for end in ends])
    remarks = [f"only misses: {', '.join(without)}"] if without else []
    if len(drawn) and drawn.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(PLAIN)
        bottom, top = axes.get_ylim()
        axes.yaxis.set_minor_formatter(_minor_labels(math.log10(top / bottom)))
        axes.tick_params(axis="y", which="minor", labelsize="x-small")
    elif len(drawn) and drawn.min() == 0:
        values = mine[["median", "q75"]].to_numpy(dtype=float)
        remarks.append(scale_losses(axes, values[np.isfinite(values)], []))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trials (median and quartiles)", ylabel=f"best {mine.metric.iloc[0].replace('_', ' ')} so far")
    title(figure, f"{problem}: what tuning buys", problem)
    plain_axes(axes)
    name_lines(axes, ends, [styles.handle(arm) for arm in arms], remark="; ".join(filter(None, remarks)))
    return figure


def _minor_labels(decades: float) -> Formatter:
    """Numbers between powers of ten, as many as have room on an axis of so many decades."""
    if decades >= _DECADES_WITH_MINOR_LABELS:
        return NullFormatter()
    crowded = "689" if decades > _DECADES_WITH_ALL_LABELS else ""
    return FuncFormatter(lambda value, _: "" if f"{value:e}"[0] in crowded else f"{value:.3g}")


@in_style
def profile_figure(record: StudyRecord, values: pd.DataFrame, styles: Styles) -> Figure | None:
    """Share of problems solved within a factor of the best arm, per clock; ``None`` without a target."""
    clocks = {clock: times for clock in CLOCKS if (times := profile_times(record, values, clock))}
    if not clocks:
        return None
    figure, grid = grid_figure(len(clocks))
    factors = np.geomspace(1.0, LARGEST_RATIO, 400)
    ends: list[tuple[str, float, float, str]] = []
    shown: dict[str, None] = {}
    for axes, (clock, times) in zip(grid, clocks.items(), strict=False):
        problems = list(dict.fromkeys(problem for problem, _ in times))
        arms = list(dict.fromkeys(arm for _, arm in times))
        shown |= dict.fromkeys(arms)
        medians = [[float(quantile(times[problem, arm], 0.5)) for arm in arms] for problem in problems]
        ratios, ends = ratios_to_best(np.array(medians)), []
        for place, arm in enumerate(arms):
            # A little apart, so that arms with the same profile are all seen.
            share = profile(ratios[:, place], factors) + 0.006 * (place - (len(arms) - 1) / 2)
            axes.step(factors, share, where="post", **styles.line(arm))
            ends.append((arm, LARGEST_RATIO, float(share[-1]), styles.colour(arm)))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4]))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlim=(1, LARGEST_RATIO), ylim=(-0.04, 1.04), xlabel=f"{clock}, relative to the best")
        axes.set_ylabel("share of problems")
        plain_axes(axes)
    number = len({problem for times in clocks.values() for problem, _ in times})
    title(figure, f"performance profiles over {number} problem{'s' if number > 1 else ''}")
    beside = grid[-1] if len(grid) > len(clocks) else None
    name_lines(grid[len(clocks) - 1], ends, [styles.handle(arm) for arm in shown], beside)
    return figure


@in_style
def ablation_figures(table: pd.DataFrame) -> dict[str, Figure | None]:
    """Effect of replacing one part of the base, one figure per measure: bars by part, with intervals."""
    return {
        f"ablation-{str(measure).replace(' ', '-').replace('_', '-')}": _ablation(str(measure), group)
        for measure, group in table.groupby("measure", sort=False)
    }


def _ablation(measure: str, table: pd.DataFrame) -> Figure:
    whole = ALL_PROBLEMS if (table.problem == ALL_PROBLEMS).any() else table.problem.iloc[0]
    chosen = table[table.problem == whole].sort_values("part", kind="stable")
    names = [f"{part}: {value}" for part, value in zip(chosen.part, chosen.value, strict=True)]
    room = 72 * (column_width() - 0.6)
    wrapped = ["\n".join(lines_of(name, "small", room)) for name in names]
    heights = [0.2 + 0.12 * (name.count("\n") + 1) for name in wrapped]
    figure, axes = one_panel(0.75 + sum(heights))
    numbers = chosen[["ratio", "low", "high"]].to_numpy(dtype=float)
    bound = min(_EDGE, 1.25 * max([1.5, *_distances(numbers)]))
    tops = np.concatenate([[0.0], np.cumsum(heights)])
    for entry, words, bottom in zip(numbers, _words(chosen), tops[1:], strict=True):
        place = float(bottom) - 0.085
        _bar(axes, place, entry, bound)
        axes.annotate(words, (1.01, place), xycoords=("axes fraction", "data"), fontsize="small", va="center")
    axes.axvline(1.0, color="0.3", linewidth=0.9)
    axes.set_xscale("log")
    axes.set_xlim(1 / bound, bound)
    near = (0.8, 1.25) if bound < 4 else ()  # beside 1 on a longer axis they would be written over one another
    axes.xaxis.set_major_locator(FixedLocator([*(2.0**power for power in range(-4, 5)), *near]))
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())
    plain_axes(axes)
    # Names stand above their bars, so that long ones leave the bars their room.
    axes.set_yticks(tops[:-1] + 0.02, [literal(name) for name in wrapped], fontsize="small")
    axes.tick_params(axis="y", length=0, pad=-3)
    for label in axes.get_yticklabels():
        label.set(ha="left", va="top", bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.5})
    axes.grid(visible=False, axis="y")
    axes.set_ylim(tops[-1] + 0.05, -0.03)
    axes.set(xlabel=f"{measure.replace('_', ' ')}: ratio to the base")
    title(figure, f"{whole}: replacing one part of the base", f"{whole}: one part replaced")
    note(figure, "left of 1 is better; on the same seeds; faint where the interval covers 1")
    return figure


def _bar(axes: Axes, place: float, entry: NDArray[np.float64], bound: float) -> None:
    """Bar from 1 to the ratio, whisker over the interval, both cut at the edges."""
    ratio, low, high = (float(value) for value in entry)
    shown, start, end = (min(max(value, 1 / bound), bound) for value in (ratio, low, high))
    clear = high < 1 or low > 1
    colour = COLOURS[0] if ratio < 1 else COLOURS[1]
    left, right = min(1.0, shown), max(1.0, shown)
    axes.barh([place], [right - left], left=[left], height=0.13, color=colour, alpha=0.9 if clear else 0.45)
    if not math.isnan(low):
        axes.plot([start, end], [place, place], color="0.15", linewidth=1.0, marker="|", markersize=4.5)


def _words(chosen: pd.DataFrame) -> list[str]:
    """What stands beside each bar: a ratio that comes from misses is told in words."""
    found = []
    for ratio, pairs, own, base in chosen[["ratio", "pairs", "misses", "base misses"]].itertuples(index=False):
        if own == base == pairs:
            found.append("both miss")
        elif ratio == 0.0:
            found.append("the base misses")
        else:
            found.append("miss" if math.isinf(ratio) else f"{ratio:.3g}")
    return found


def _distances(numbers: NDArray[np.float64]) -> list[float]:
    """How far each finite ratio is from 1, as a factor."""
    usable = numbers[np.isfinite(numbers) & (numbers > 0)]
    return [float(factor) for factor in np.maximum(usable, 1 / usable)]
