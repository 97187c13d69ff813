"""Racing methods: equal conditions, the table, the files, the figure."""

import dataclasses
import json
import math
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from osculate.errors import ArgumentError
from osculate.experiments.report.comparison_figure import comparison_figure
from osculate.experiments.report.figures import save_figure
from osculate.experiments.runs.comparison import (
    Comparison,
    Curve,
    compare,
    comparison_table,
    load_comparison,
    method_configs,
)
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.progress import Display
from osculate.experiments.runs.runs import Resume
from osculate.framework.optimizer.second_order import SecondOrder
from osculate.preconditioners.structures.diagonal import Diagonal
from rich.console import Console

TWO_EPOCHS = Budget(2)


def race(file: Path, methods: list[str], budget: Budget = TWO_EPOCHS, **options: Any) -> Comparison:
    configs = method_configs(RunConfig("tiny", methods[0]), methods, options.pop("options", {}))
    return compare(configs, budget, file, None, Display(Console(file=StringIO()), budget), **options)


def curve(method: str, *losses: float, failure: str = "") -> Curve:
    points = [
        {"epoch": k, "seconds": k + 0.5, "train_loss": x, "iterations": k, "test_loss": x} for k, x in enumerate(losses)
    ]
    return Curve(method, {"batch_size": 10}, points, failure)


@pytest.mark.usefixtures("tiny")
class TestCompare:
    def test_all_start_alike_and_the_best_comes_first(self, tmp_path: Path) -> None:
        comparison = race(tmp_path / "c.json", ["sgdm", "adam", "kbfgs"])
        starts = {curve.points[0]["train_loss"] - curve.points[0]["penalty"] for curve in comparison.curves}
        assert max(starts) - min(starts) < 1e-6
        losses = comparison_table(comparison)["train loss"].tolist()
        assert losses == sorted(losses)
        assert len(losses) == 3

    @pytest.mark.usefixtures("second_per_evaluation")
    def test_each_stops_when_its_time_is_over(self, tmp_path: Path) -> None:
        """A step of kbfgs takes two evaluations of the gradient: at most one step ends beyond the budget."""
        comparison = race(tmp_path / "c.json", ["sgdm", "kbfgs"], Budget(seconds=21))
        last = {one.method: one.points[-1] for one in comparison.curves}
        assert last["sgdm"]["seconds"] == last["sgdm"]["iterations"] == 21
        assert last["kbfgs"]["seconds"] in (21, 22) and last["kbfgs"]["iterations"] > 0

    def test_a_contestant_that_is_refused_on_the_way_is_no_reason_to_lose_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = SecondOrder.step

        def refuse(self: SecondOrder, closure: Any = None) -> Any:
            if self._step == 3 and isinstance(self.structures, Diagonal):
                raise ArgumentError("what was recorded does not explain it; take another")
            return step(self, closure)

        monkeypatch.setattr(SecondOrder, "step", refuse)
        comparison = race(tmp_path / "c.json", ["adam", "sgdm"])
        table = comparison_table(comparison).set_index("method")
        assert table.loc["adam", "note"] == "broke down: what was recorded does not explain it"
        assert len(load_comparison(tmp_path / "c.json").curves) == 2 and table.loc["sgdm", "train loss"] > 0

    def test_what_is_written_reads_back(self, tmp_path: Path) -> None:
        comparison = race(tmp_path / "c.json", ["sgdm", "adam"])
        assert load_comparison(tmp_path / "c.json") == comparison
        assert json.loads((tmp_path / "c.json").read_text())["environment"]["versions"]["torch"]

    def test_a_breakdown_is_reported_and_the_others_go_on(self, tmp_path: Path, monkeypatch: Any, tiny: Any) -> None:
        tiny.break_after = 5
        monkeypatch.setattr(Display, "failed", lambda self, reason: setattr(tiny, "break_after", math.inf))
        comparison = race(tmp_path / "c.json", ["sgdm", "adam"])
        assert [bool(one.failure) for one in comparison.curves] == [True, False]
        table = comparison_table(comparison)
        assert table["method"].tolist() == ["adam", "sgdm"]
        assert table["note"][1].startswith("broke down: ")
        assert math.isnan(table["train loss"][1])

    def test_finished_curves_can_be_kept(self, tmp_path: Path, tiny: Any) -> None:
        file = tmp_path / "c.json"
        first = race(file, ["sgdm", "adam"])
        tiny.calls = 0
        second = race(file, ["sgdm", "adam"], resume=Resume.AUTO)
        assert second.curves == first.curves
        assert tiny.calls == 0

    def test_another_budget_is_not_continued(self, tmp_path: Path) -> None:
        race(tmp_path / "c.json", ["sgdm"])
        with pytest.raises(ArgumentError, match="start over with --resume never"):
            race(tmp_path / "c.json", ["sgdm"], Budget(3), resume=Resume.AUTO)

    def test_bad_input_is_found_before_anything_trains(self, tmp_path: Path, tiny: Any) -> None:
        with pytest.raises(ArgumentError, match="kbfgs"):
            race(tmp_path / "c.json", ["sgdm", "kbfs"])
        assert tiny.calls == 0


class TestMethodConfigs:
    def test_options_reach_their_method(self) -> None:
        options = {"kbfgs_l.memory": 7, "kbfgs_l.lr": 0.5, "strict": False}
        first, second = method_configs(RunConfig("p", "x", lr=0.1), ["adam", "kbfgs-l"], options)
        assert (first.method, first.lr, first.method_options) == ("adam", 0.1, {"strict": False})
        assert (second.method, second.lr, second.method_options) == ("kbfgs-l", 0.5, {"strict": False, "memory": 7})

    @pytest.mark.parametrize("methods", [[], ["adam", "adam"]])
    def test_each_method_once(self, methods: list[str]) -> None:
        with pytest.raises(ArgumentError, match="each method once"):
            method_configs(RunConfig("p", "x"), methods, {})

    def test_option_for_a_stranger(self) -> None:
        with pytest.raises(
            ArgumentError, match=r"option for sgdm, but only adam run.* with --methods too, or leave the option out"
        ):
            method_configs(RunConfig("p", "x"), ["adam"], {"sgdm.lr": 1})


class TestFigure:
    def figure(self, *curves: Curve) -> Any:
        return comparison_figure(Comparison("tiny", Budget(3, 2.0), {"device_name": "a machine"}, list(curves)))

    def test_two_panels_with_the_best_first_in_the_key(self, tmp_path: Path) -> None:
        figure = self.figure(curve("adam", 9, 5, 3), curve("kbfgs", 9, 2, 1), curve("sgdm", 9, 8, failure="not finite"))
        assert len(figure.axes) == 2
        assert figure.axes[0].get_yscale() == "log"
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels == ["kbfgs  1", "adam  3", "sgdm  broke down"]
        for path in save_figure(figure, tmp_path / "comparison"):
            assert path.stat().st_size > 5000

    def test_no_two_methods_look_alike(self) -> None:
        figure = self.figure(*(curve(f"method {k}", 9, 8 - k / 20) for k in range(16)))
        looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}
        assert len(looks) == 16

    def test_a_diverging_method_does_not_flatten_the_others(self) -> None:
        figure = self.figure(curve("adam", 9, 5, 3), curve("sgdm", 9, 1e9, 1e12))
        low, high = figure.axes[0].get_ylim()
        assert high == pytest.approx(13.5)
        assert 2.5 < low < 3

    def test_ticks_are_losses_where_distances_from_the_floor_are_shown(self) -> None:
        """Methods that differ by a tenth near the floor are as far apart as methods that differ by a lot above it."""
        curves = [
            curve("adam", 44, 27, 15.6),
            curve("kfac", 44, 20, 14.6),
            curve("sgdm", 44, 43, 42, failure="stopped"),
        ]
        marked = Comparison("tiny", Budget(3), {}, curves, floor=13.6, landmarks={"mean image": 27.1})
        axes = comparison_figure(marked).axes[0]
        heights = axes.transData.transform([(0, loss) for loss in (14.6, 15.6, 17.6, 21.6)])[:, 1]
        assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], rel=1e-3)
        assert heights[2] - heights[1] == pytest.approx(heights[3] - heights[2], rel=1e-3)
        low, high = axes.get_ylim()
        assert 13.6 < low < 14.6 and high > 44
        ticks = [tick for tick in axes.get_yticks() if low < tick < high]
        assert ticks == [15, 16, 18, 20, 30, 40]
        assert "mean image" in [text.get_text() for text in axes.texts]

    def test_losses_at_or_below_the_floor_are_drawn_as_usual(self) -> None:
        marked = Comparison("tiny", Budget(3), {}, [curve("adam", 9, 3, 1)], floor=2.0)
        assert comparison_figure(marked).axes[0].get_yscale() == "log"

    def test_many_epochs_of_a_cheap_method_do_not_squeeze_the_dear_ones(self) -> None:
        cheap, dear = curve("sgdm", 9, 5, 4), curve("kbfgs", 9, 5, 3)
        assert self.figure(cheap, dear).axes[0].get_xscale() == "linear"
        cheap.points[-1]["epoch"] = 100
        figure = self.figure(cheap, dear)
        assert [axes.get_xscale() for axes in figure.axes] == ["symlog", "linear"]
        assert figure.axes[0].get_xlim() == (0, 100)

    def test_comparisons_without_landmarks_are_still_read(self, tmp_path: Path) -> None:
        plain = dataclasses.asdict(Comparison("tiny", Budget(3), {}, [curve("adam", 9, 3)]))
        del plain["floor"], plain["landmarks"]
        (tmp_path / "c.json").write_text(json.dumps(plain))
        assert load_comparison(tmp_path / "c.json").floor is None

    def test_a_narrow_range_stays_linear(self) -> None:
        assert self.figure(curve("adam", 9, 8, 7)).axes[0].get_yscale() == "linear"


def test_one_method_and_two_points_have_ticks_and_whole_axes(tmp_path: Path) -> None:
    """Landmarks far below the losses take no room; a view without a round number has ticks all the same."""
    low = Comparison("p", TWO_EPOCHS, {"device_name": "cpu"}, [curve("sgdm", 44.9, 44.87)], 1.0, {"a landmark": 2.0})
    figure = comparison_figure(low)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "c")
    for axes in figure.axes[:2]:
        assert axes.get_window_extent().height > 0.4 * figure.bbox.height
    low_end, high_end = figure.axes[0].get_ylim()
    assert sum(low_end <= tick <= high_end for tick in figure.axes[0].get_yticks()) >= 2
