"""A loss that is exactly 0 stays in sight on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from osculate.analysis.theorem import Curve as Line
from osculate.analysis.theorem import Plot
from osculate.experiments.report.comparison_figure import comparison_figure
from osculate.experiments.report.figures import Styles, one_panel, scale_losses
from osculate.experiments.report.report_figures import budget_figure
from osculate.experiments.report.theorem_figures import plots_figure
from osculate.experiments.runs.comparison import Comparison, Curve
from osculate.experiments.runs.config import Budget

COURSES = {
    "reaches 0": [10.0, 0.1, 1e-6, 1e-12, 0.0, 0.0],
    "at once": [10.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "slow": [10.0, 8.0, 6.0, 5.0, 4.0, 3.0],
}


def scaled(values: Sequence[float], starts: Sequence[float]) -> tuple[Axes, str]:
    _, axes = one_panel()
    axes.plot(range(len(values)), values)
    return axes, scale_losses(axes, np.array(values), starts)


def heights(axes: Axes, values: Sequence[float]) -> list[float]:
    """Where values are drawn: 0 at the lower edge, 1 at the upper one."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    points = axes.transData.transform([(0.0, value) for value in values])
    places: list[float] = axes.transAxes.inverted().transform(points)[:, 1].tolist()
    return places


@pytest.mark.parametrize("least", [0.0, -1e-17])
def test_zero_is_drawn_below_all_other_values_with_a_tick_of_its_own(least: float) -> None:
    values = [10.0, 1e-3, 1e-9, 3e-14, least]
    axes, said = scaled(values, [10.0])
    found = heights(axes, values)
    assert found == sorted(found, reverse=True) and 0 < found[-1] < 0.1 and 0.9 < found[0] < 1
    steps = -np.diff(found)
    assert min(steps) > 0.03  # none is lost among the others
    assert said == "grey: linear from 1e-14 to 0"
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["0", "1e-14"]
    ticks = heights(axes, axes.get_yticks().tolist())
    assert min(np.diff([tick for tick in ticks if tick < 1])) > 0.07  # their numbers do not touch


def test_other_scales_are_what_they_were() -> None:
    for values, scale in (([3.0, 1.0, 0.1], "log"), ([3.0, 2.9], "linear"), ([0.0, 0.0], "linear")):
        axes, said = scaled(values, [values[0]])
        assert (axes.get_yscale(), said) == (scale, "")
    for values in ([3.0, -1.0, -5.0], [5.0, 4.0, 3.0, 0.0], [-1.0, -2.0]):  # truly negative; nothing to be spread
        axes, said = scaled(values, [3.0])
        assert (axes.get_yscale(), said) == ("linear", "")


def test_what_diverges_leaves_at_the_top_here_too() -> None:
    axes, _ = scaled([10.0, 1e-4, 0.0, 1e30], [10.0])
    assert axes.get_ylim()[1] < 100 and heights(axes, [10.0])[0] > 0.8


def test_values_below_what_doubles_tell_apart_count_as_zero() -> None:
    axes, _ = scaled([10.0, 1e-3, 1e-300, 0.0], [10.0])
    tiny, zero, small = heights(axes, [1e-300, 0.0, 1e-3])
    assert tiny == pytest.approx(zero) and small > 0.5


def comparison(**options: float) -> Figure:
    curves = []
    for name, losses in COURSES.items():
        points = [{"epoch": float(k), "seconds": 0.1 * k, "train_loss": loss} for k, loss in enumerate(losses)]
        curves.append(Curve(name, {"batch_size": 10}, points))
    return comparison_figure(Comparison("tiny", Budget(6), {}, curves, **options))


@pytest.mark.parametrize("options", [{}, {"floor": 0.0}])
def test_a_race_in_which_a_method_reaches_zero(options: dict[str, float]) -> None:
    figure = comparison(**options)
    left, right = figure.axes[:2]
    for axes in (left, right):
        for line in axes.get_lines()[: len(COURSES)]:
            assert all(0 < place < 1 for place in heights(axes, [float(value) for value in line.get_ydata()]))
        assert len(axes.patches) == 1  # the grey strip
    assert figure.get_supxlabel() == "grey: linear from 1e-12 to 0"


def test_what_tuning_buys() -> None:
    rows = [
        {"problem": "p", "arm": arm, "metric": "valid_loss", "trials": k + 1, "median": value, "q25": value}
        | {"q75": 2 * value, "expected": value, "miss": 0.0, "unfinished": 0}
        for arm, values in (("exact", [1.0, 1e-5, 0.0]), ("slow", [3.0, 1.0, 0.5]), ("bad", [math.inf] * 3))
        for k, value in enumerate(values)
    ]
    figure = budget_figure(pd.DataFrame(rows), "p", Styles(["exact", "slow", "bad"]))
    assert figure is not None
    assert figure.axes[0].get_yscale() == "symlog"
    assert 0 < heights(figure.axes[0], [0.0])[0] < heights(figure.axes[0], [6.0])[0] < 1
    assert figure.get_supxlabel() == "only misses: bad; grey: linear from 1e-05 to 0"


def test_figures_of_theorems() -> None:
    steps = list(range(6))
    errors = Line("measured", steps, [1.0, 1e-4, 1e-8, 1e-12, 0.0, 0.0])
    bound = Line("bound", steps, [10.0 ** (1 - k) for k in steps], "bound")
    nothing = Line("nothing", steps, [0.0] * 6)
    figure = plots_figure([Plot("errors", "x", "y", (errors, bound), y_log=True), Plot("z", "x", "y", (nothing,))])
    axes = figure.axes[0]
    assert axes.get_yscale() == "symlog"
    assert np.isfinite(axes.get_lines()[0].get_ydata()).all() and 0 < heights(axes, [0.0])[0] < 0.1
    (alone,) = plots_figure([Plot("zeros", "x", "y", (nothing,), y_log=True)]).axes
    assert alone.get_yscale() == "linear" and heights(alone, [0.0])[0] == pytest.approx(0.5)
