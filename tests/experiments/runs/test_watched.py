"""Runs that are watched, and runs that keep their checkpoints."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
from osculate.errors import ArgumentError
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.runs import Resume, run_in_folder
from osculate.experiments.runs.watched import Extras
from rich.console import Console

CONFIG = RunConfig("tiny", "kbfgs", lr=0.1, damping=0.3)
EXTRAS = Extras(watch_every=1, keep_checkpoints=True)


def steps(path: Path) -> list[int]:
    lines = RunFolder(path).monitors_file.read_text().splitlines()
    return sorted({json.loads(line)["step"] for line in lines})


def run(path: Path, epochs: int, extras: Extras = EXTRAS, resume: Resume = Resume.AUTO) -> None:
    console = Console(file=StringIO())
    result = run_in_folder(CONFIG, Budget(epochs), RunFolder(path), None, resume, console, extras)
    assert result.status == "finished" and (result.certificate is None) == (extras.watch_every is None)


def test_a_watched_run_streams_readings_keeps_checkpoints_and_certifies(tiny: object, tmp_path: Path) -> None:
    run(tmp_path, 2)
    assert steps(tmp_path) == list(range(8))
    assert [file.stem for file in RunFolder(tmp_path).kept_checkpoints()] == ["00000004", "00000008"]
    certificate = json.loads(RunFolder(tmp_path).certificate_file.read_text())
    assert certificate["steps"] == 8 and {entry["monitor"] for entry in certificate["claims"]} >= {"SecantEquation"}


def test_a_continued_run_has_every_reading_once(tiny: object, tmp_path: Path) -> None:
    run(tmp_path, 1)
    with RunFolder(tmp_path).monitors_file.open("a") as file:
        file.write(json.dumps({"step": 5}) + "\n" + '{"step": ')  # written after the checkpoint, then a crash
    run(tmp_path, 2)
    assert steps(tmp_path) == list(range(8))


def test_starting_over_removes_what_was_there(tiny: object, tmp_path: Path) -> None:
    run(tmp_path, 2)
    run(tmp_path, 1, Extras(), Resume.NEVER)
    folder = RunFolder(tmp_path)
    assert not folder.monitors_file.exists() and not folder.certificate_file.exists() and not folder.kept_checkpoints()


def test_watching_and_keeping_change_no_number(tiny: object, tmp_path: Path) -> None:
    run(tmp_path / "plain", 2, Extras())
    run(tmp_path / "watched", 2)
    first, second = (RunFolder(tmp_path / name).read_metrics() for name in ("plain", "watched"))
    assert [line["train_loss"] for line in first] == [line["train_loss"] for line in second]


def test_the_command_prints_the_certificate(tiny: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--method", "kbfgs", "--epochs", "1", "--watch", "--watch-every", "2", "--out", str(tmp_path)]
    assert execute(words) == 0
    printed = capsys.readouterr().out
    assert "2 steps examined" in printed and "EigenvalueBounds: lambda_max(H): held" in printed


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(ArgumentError, match="watch_every"):
        Extras(watch_every=0)


def test_bounds_are_checked_on_a_problem(tiny: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bounded-training", "--problem", "tiny", "--train-steps", "6", "--every", "2", "--out", str(tmp_path)]
    assert execute([*words, "--pairs", "double", "none"]) == 0
    printed = capsys.readouterr().out
    assert "powell" not in printed and printed.count("held") == 4
    saved = json.loads((tmp_path / "bounded.json").read_text())
    steps = [row[0] for row in saved["runs"]["kbfgs"]["none"]["curves"]["0 outputs"]["lambda_max(H)"]]
    assert saved["ok"] and steps == [0, 2, 4] and (tmp_path / "bounded.png").stat().st_size > 10_000
    assert execute([*words, "--methods", "mbf"]) == 2  # has no pairs


def test_the_word_none_names_a_damping_of_pairs(tiny: object, tmp_path: Path) -> None:
    words = ["train", "--method", "kbfgs", "--epochs", "1", "--option", "pairs=none", "--out", str(tmp_path)]
    assert execute(words) == 0


def scalars(path: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = reading.EventAccumulator(str(path / "tensorboard"))
    seen.Reload()
    return {name: {event.step: event.value for event in seen.Scalars(name)} for name in seen.Tags()["scalars"]}


def test_tensorboard_shows_what_the_files_hold_also_of_a_continued_run(tiny: object, tmp_path: Path) -> None:
    extras = Extras(watch_every=1, tensorboard=True)
    run(tmp_path, 1, extras)
    first = scalars(tmp_path)["train_loss"]
    run(tmp_path, 3, extras)
    lines, shown = RunFolder(tmp_path).read_metrics(), scalars(tmp_path)
    assert [line["iterations"] for line in lines] == [0, 4, 8, 12] and set(first) == {0, 4}
    for name in ("train_loss", "test_loss", "test_accuracy", "gradient_evaluations"):
        assert shown[name] == {line["iterations"]: pytest.approx(line[name], rel=1e-6) for line in lines}
    assert set(shown["PairCurvature/s'y / s's >= c/0 inputs"]) == set(range(12))
    run(tmp_path, 1, Extras(tensorboard=True), Resume.NEVER)
    assert scalars(tmp_path)["train_loss"] == first


def test_tensorboard_that_is_not_installed_is_told_before_anything_is_written(
    tiny: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for words in (["train", "--method", "sgdm", "--epochs", "1"], ["study", "smoke"]):
        assert execute([*words, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
        assert "needs the package tensorboard" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
