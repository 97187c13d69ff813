"""Misses in tables and figures of effects: a ratio that comes from them is told in words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
from made_studies import MadeStudy, whole_study
from osculate.experiments.commands.report import report_tables
from osculate.experiments.report.report_figures import ablation_figures
from osculate.experiments.report.study_records import read_study


def test_effects_count_the_misses_of_both_sides(tmp_path: Path) -> None:
    table = report_tables(read_study(whole_study(tmp_path / "s").folder))[0]["ablation"]
    mine = table[(table.measure == "steps to target") & (table.problem == "all problems")].set_index("arm")
    lost = mine.loc["no guard"]
    assert (lost["pairs"], lost["misses"], lost["base misses"]) == (6, 4, 0)


def test_ratios_that_come_from_misses_are_told_in_words() -> None:
    misses = [(1.0, 3, 3, 3), (0.0, 3, 0, 3), (math.inf, 3, 3, 0), (1.0, 3, 1, 1), (0.5, 3, 0, 0)]
    table = pd.DataFrame(misses, columns=["ratio", "pairs", "misses", "base misses"])
    table = table.assign(part="damping", value=list("abcde"), problem="p", measure="steps", low=math.nan, high=math.nan)
    figure = ablation_figures(table)["ablation-steps"]
    assert figure is not None
    said = {text.get_text() for text in figure.axes[0].texts}
    assert said == {"both miss", "the base misses", "miss", "1", "0.5"}


def test_figures_of_names_with_dots_do_not_meet_in_one_file(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from osculate.experiments.report.figures import save_figure

    first, second = (save_figure(Figure(), tmp_path / f"decay-0.{digit}") for digit in (5, 7))
    assert [path.name for path in first] == ["decay-0.5.png", "decay-0.5.pdf"]
    assert not set(first) & set(second) and all(path.exists() for path in (*first, *second))


def test_a_run_of_other_settings_than_the_study_names_is_said_and_enters_no_number(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path, seeds=(0, 1))
    study.problem("p")
    study.arm("a")
    for seed in study.seeds:
        path = study.run("p", "a", seed, 0.5)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"lr": 0.003}))
    record = read_study(study.write())
    assert list(record.finals("p", "a").seed) == [0]
    (gap,) = record.gaps
    assert "final-1" in gap and "lr is 0.003, not 0.5" in gap


def test_a_miss_has_no_accuracy_where_the_problem_has_none(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path, seeds=(0,))
    for problem in ("values", "classes"):
        study.problem(problem)
        for arm, status in (("fine", "finished"), ("wild", "broken down")):
            path = study.run(problem, arm, 0, 0.5, status=status)
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            for line in lines:
                line.pop("test_accuracy", None)
                line |= {"test_accuracy": 0.5} if problem == "classes" else {}
            (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for arm in ("fine", "wild"):
        study.arm(arm)
    values = report_tables(read_study(study.write()))[1].set_index(["problem", "arm"])
    assert values.loc[("classes", "wild"), "test_accuracy"] == -math.inf
    assert math.isnan(values.loc[("values", "wild"), "test_accuracy"])
    assert values.loc[("values", "wild"), "train_loss"] == math.inf
