"""A run that breaks down says in the study's tables after which step, and why."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from made_studies import MadeStudy, whole_study
from osculate.experiments.commands.cli import execute
from osculate.experiments.commands.report import report_tables
from osculate.experiments.report.breakdowns import Breakdown, breakdown_rows, breakdown_screen, in_short
from osculate.experiments.report.study_records import read_study
from osculate.experiments.report.tables import screen_table
from osculate.experiments.study.definition import Study
from osculate.experiments.study.display import Board
from osculate.experiments.study.ledger import Entry, Slot
from rich.console import Console


def test_runs_that_went_the_same_way_share_a_row() -> None:
    found = [
        Breakdown("p", "a", "tune-4", 7, "step 7: the loss is nan; lower lr"),
        Breakdown("p", "a", "final-1", 3, "step 3: the loss is nan; lower lr"),
        Breakdown("p", "a", "final-2", 3, "over the limit of 5 s"),
        Breakdown("q", "a", "final-2", None, ""),
    ]
    rows = breakdown_rows(found)
    assert [tuple(row.values()) for row in rows] == [
        ("p", "a", "tune-4, final-1", "3 to 7", "the loss is nan"),
        ("p", "a", "final-2", "3", "over the limit of 5 s"),
        ("q", "a", "final-2", "", "no reason was recorded"),
    ]
    assert breakdown_screen(rows).row_count == 3


def test_reasons_are_cut_where_advice_begins_and_no_earlier() -> None:
    assert in_short("step 12: the gradient of 'a' is not finite; no parameter was changed") == (
        "the gradient of 'a' is not finite"
    )
    assert in_short("RuntimeError: shape: [3]") == "RuntimeError: shape: [3]"
    assert in_short("step size: none was found") == "step size: none was found"


def test_the_report_has_a_table_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = whole_study(tmp_path / "s")
    for seed in (1, 2):
        path = study.folder / "runs" / "cnn-2" / "no guard" / f"final-{seed}" / "status.json"
        reason = f"step {4 * seed}: the loss is inf; lower lr"
        path.write_text(json.dumps({"status": "broken down", "iterations": 4 * seed, "reason": reason}))
    table = report_tables(read_study(study.folder))[0]["breakdowns"]
    mine = table[(table.problem == "cnn-2") & (table.arm == "no guard")]
    assert mine.runs.tolist() == ["final-1 2"] and mine["after steps"].tolist() == ["4 to 8"]
    assert mine.why.tolist() == ["the loss is inf"]
    tuned = table[table.arm == "joint_kfac & co"]
    assert set(tuned.runs) == {"tune-5"} and set(tuned["after steps"]) == {"100"}, "the last evaluation where none says"
    execute(["report", str(study.folder), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "broke down" in said and "4 to 8" in said and "the loss is inf" in said
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "What broke down" in page and "the loss is inf" in page


def test_a_study_without_any_shows_no_such_table(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "s", seeds=(0,))
    study.problem("p")
    study.arm("fine")
    study.run("p", "fine", 0, 0.5)
    study.write()
    record = read_study(study.folder)
    assert not len(report_tables(record)[0]["breakdowns"])
    assert all(math.isnan(steps) for steps in record.runs["broke after"])


def test_the_board_says_it_while_the_study_runs_and_at_its_end(small: Study) -> None:
    stream = io.StringIO()
    ended = {
        Slot("p", "a", "final", 1): Entry(Slot("p", "a", "final", 1), 0, "done", 0.5),
        Slot("p", "a", "final", 2): Entry(
            Slot("p", "a", "final", 2), 1, "done", status="broken down", why="step 8: the loss is nan; x", steps=8
        ),
    }
    with Board(Console(file=stream, width=80), small) as board:
        board.show({slot: Entry(slot, entry.trial, "waiting") for slot, entry in ended.items()})
        board.show(ended)
        board.end(ended)
    said = stream.getvalue()
    assert "p a final-2: miss after 8 step(s): the loss is nan" in said
    assert "broke down" in said and "final-2" in said.split("broke down")[1]


@pytest.fixture
def small(tmp_path: Path) -> Study:
    from osculate.experiments.study.reading import read_study as read_file

    path = tmp_path / "s.toml"
    path.write_text(
        'seeds = [1, 2]\n[[problems]]\nname = "curves-autoencoder"\nlabel = "p"\n[budget]\nepochs = 1\n'
        '[arms.a]\nmethod = "sgdm"\n'
    )
    return read_file(path)


def headings(board: Board, entries: dict[Slot, Entry]) -> list[str]:
    return [str(column.header) for column in board.table(entries).columns]


def test_the_board_shows_columns_that_have_something(small: Study) -> None:
    slots = [Slot("p", "a", "final", 1), Slot("p", "a", "final", 2)]
    waiting = {slot: Entry(slot, place, "waiting") for place, slot in enumerate(slots)}
    board = Board(Console(file=io.StringIO(), width=80), small)
    assert headings(board, waiting) == ["problem", "arm", "final"]  # nothing is tuned, nothing runs yet
    running = waiting | {slots[0]: Entry(slots[0], 0, "running", started=1.0)}
    assert headings(board, running) == ["problem", "arm", "final", "running"]
    one = running | {slots[0]: Entry(slots[0], 0, "done", 0.5)}
    assert headings(board, one) == ["problem", "arm", "final", "median of finals"]
    missed = one | {slots[1]: Entry(slots[1], 1, "done", status="broken down")}
    assert headings(board, missed) == ["problem", "arm", "final", "misses", "median of finals"]
    trial = Slot("p", "a", "tune", 0)
    assert "tuned" in headings(board, {trial: Entry(trial, 0, "waiting"), **waiting})


def test_no_table_on_the_screen_has_a_column_without_anything() -> None:
    rows = [{"a": "x", "b": None, "c": math.nan, "d": "", "e": 0}, {"a": "y", "b": None, "c": 1.5, "d": "", "e": 0}]
    columns = {name: name.upper() for name in ("a", "b", "c", "d", "e", "f")}
    assert [column.header for column in screen_table("t", rows, columns).columns] == ["A", "C", "E"]
    assert len(screen_table("t", [], columns).columns) == 6


def cells(board: Board, entries: dict[Slot, Entry]) -> dict[str, str]:
    columns = board.table(entries).columns
    return {str(column.header): str(next(iter(column.cells))) for column in columns}


@pytest.mark.parametrize(
    ("finals", "median"), [([3.0, 1.0, 2.0], "2"), ([1.0, 2.0], "1.5"), ([1.0, None, 2.0], "2"), ([1.0, None], "inf")]
)
def test_the_board_has_the_median_of_the_final_runs_and_trials_apart(
    small: Study, finals: list[float | None], median: str
) -> None:
    slots = [Slot("p", "a", "final", seed) for seed in range(len(finals))]
    entries = {
        slot: Entry(slot, place, "done", value) for place, (slot, value) in enumerate(zip(slots, finals, strict=True))
    }
    trials = [Slot("p", "a", "tune", number) for number in range(3)]
    tuned = {slot: Entry(slot, 9, "done", value) for slot, value in zip(trials, (0.25, 0.5, None), strict=True)}
    board = Board(Console(file=io.StringIO(), width=80), small)
    assert cells(board, entries)["median of finals"] == median and "best trial" not in cells(board, entries)
    assert cells(board, tuned | entries)["best trial"] == "0.25"
    assert cells(board, tuned | entries)["median of finals"] == median
    right = dataclasses.replace(small, tuning=dataclasses.replace(small.tuning, metric="test_accuracy"))
    assert cells(Board(Console(file=io.StringIO(), width=80), right), tuned)["best trial"] == "0.5"


def test_what_was_left_of_an_interrupted_run_says_nothing_about_the_others(
    small: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("osculate.experiments.study.display.time.time", lambda: now[0])
    slots = [Slot("p", "a", "final", seed) for seed in range(4)]
    stream = io.StringIO()
    with Board(Console(file=stream, width=80), small, begun=slots[:1]) as board:
        entries = {slot: Entry(slot, place, "waiting") for place, slot in enumerate(slots)}
        board.show(entries)
        for place, passed in ((0, 0.2), (1, 60.0)):
            now[0] += passed
            entries[slots[place]] = Entry(slots[place], place, "done", 0.5)
            board.show(entries)
    first, second = stream.getvalue().splitlines()
    assert "left" not in first
    assert second.endswith("about 2.0 min left")
