"""Curves whose first values are not finite, arms of one evaluation, and names with dollar signs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from osculate.experiments.report.figures import Styles, literal, text_points
from osculate.experiments.report.report_curves import course_band, course_figure
from osculate.experiments.report.study_records import StudyRecord, read_study

from tests.made_studies import MadeStudy


def made(folder: Path, *arms: str) -> MadeStudy:
    study = MadeStudy(folder, seeds=(0, 1))
    study.problem("p", target=None)
    for arm in arms:
        study.arm(arm)
        for seed in study.seeds:
            study.run("p", arm, seed, 0.4)
    study.write()
    return study


def drawn(record: StudyRecord) -> Figure:
    figure = course_figure(record, "p", Styles(record.arms))
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_a_first_loss_that_is_not_finite_is_not_drawn_as_the_next_one(tmp_path: Path) -> None:
    study = made(tmp_path, "late", "usual")
    for seed in (0, 1):
        file = study.folder / f"runs/p/late/final-{seed}/metrics.jsonl"
        first, *others = map(json.loads, file.read_text().splitlines())
        file.write_text("".join(json.dumps(line) + "\n" for line in [first | {"train_loss": None}, *others]))
    record = read_study(study.folder)
    band = course_band(record, "p", "late", "epoch", "train_loss")
    assert band is not None and np.isinf(band[1][1][0]) and np.isfinite(band[1][1][1:]).all()
    said = words(drawn(record))
    assert "first values not finite: late" in said and "half of the runs broke down" not in said


def test_an_arm_of_one_evaluation_is_a_point(tmp_path: Path) -> None:
    study = made(tmp_path, "one", "usual")
    for seed in (0, 1):
        file = study.folder / f"runs/p/one/final-{seed}/metrics.jsonl"
        file.write_text(file.read_text().splitlines(keepends=True)[0])
        (file.parent / "trial.json").unlink()  # its value is that of the whole course
    markers = [line.get_marker() for line in drawn(read_study(study.folder)).axes[0].lines]
    assert "o" in markers and "x" not in markers


@pytest.mark.parametrize("name", ["g$h$", "$x", "a$b$c$d"])
def test_dollar_signs_are_no_mathematics(tmp_path: Path, name: str) -> None:
    figure = drawn(read_study(made(tmp_path, name, "usual").folder))
    shown = [text for text in figure.findobj(Text) if literal(name) in text.get_text()]
    assert shown and all(text._preprocess_math(text.get_text()) == (name, False) for text in shown)  # type: ignore[attr-defined]
    assert text_points(literal(name), 7) == text_points(name, 7)
