"""A report on folders that 'osculate train' wrote: runs that differ are no arm, none is left out without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from osculate.experiments.commands.cli import execute
from osculate.experiments.commands.report import report_tables
from osculate.experiments.report.study_records import read_study

from tests.made_studies import MadeStudy


def plain(folder: Path, name: str, seed: int, rate: float, **config: Any) -> Path:
    """A run with a final loss of its own, in a folder whose name says nothing."""
    made = MadeStudy(folder).run("p", "sgdm", 0, rate)
    target = folder / name
    shutil.move(made, target)
    shutil.rmtree(folder / "runs")
    (target / "trial.json").unlink()
    content = {"problem": "p", "method": "sgdm", "seed": seed, "lr": 0.1, "method_options": {"momentum": 0.9}}
    (target / "config.json").write_text(json.dumps(content | {"training_samples": 5 + seed} | config))
    return target


def test_what_differs_is_in_the_names_of_arms(tmp_path: Path) -> None:
    for number, lr in enumerate((0.003, 0.03)):
        for seed in (0, 1):
            plain(tmp_path, f"{lr}-{seed}", seed, 0.3 + 0.1 * number, lr=lr)
    plain(tmp_path, "nesterov", 0, 0.7, lr=0.03, method_options={"momentum": 0.9, "nesterov": True})
    record = read_study(tmp_path)
    assert record.arms == [
        "sgdm lr=0.003 nesterov=none",
        "sgdm lr=0.03 nesterov=none",
        "sgdm lr=0.03 nesterov=True",
    ]
    assert not record.gaps
    assert set(report_tables(record)[1].arm) == set(record.arms)


def test_problems_with_other_options_are_other_problems(tmp_path: Path) -> None:
    for size in ("small", "full"):
        plain(tmp_path, size, 0, 0.3, problem_options={"size": size})
    record = read_study(tmp_path)
    assert record.arms == ["sgdm"] and record.problems == ["p size=full", "p size=small"]
    assert set(record.samples) == set(record.problems)


def test_seeds_and_machines_make_no_arms(tmp_path: Path) -> None:
    for seed, device in enumerate(("cpu", "cuda")):
        plain(tmp_path, f"r{seed}", seed, 0.3, device=device)
    assert read_study(tmp_path).arms == ["sgdm"]


def test_a_seed_that_was_run_twice_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(tmp_path, "run01", 0, 0.3)
    plain(tmp_path, "run1", 0, 0.5)
    plain(tmp_path, "run2", 1, 0.4)
    record = read_study(tmp_path)
    assert record.gaps == ("p, sgdm: seed 0 was run 2 times; run01 counts, run1 not",)
    assert list(record.finals("p", "sgdm").run) == ["run01", "run2"]
    assert execute(["report", str(tmp_path)]) == 1
    assert "seed 0 was run 2 times" in capsys.readouterr().out
