"""The command line: help, tables, exit statuses, one clear message for bad input."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from osculate.experiments.commands.cli import execute

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def test_help_explains_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        execute(["--help"])
    shown = capsys.readouterr().out
    for command in ("train", "compare", "replay", "methods", "problems", "bench", "certify"):
        assert f" {command} " in shown


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_names_every_flag(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        execute([command, "--help"])
    shown = capsys.readouterr().out
    flags = (
        "problem lr damping weight-decay epochs seconds batch-size seed device data-dir out threads warm-start resume"
    )
    for flag in [*flags.split(), "method" if command == "train" else "methods", "option"]:
        assert f"--{flag} " in shown


def test_train_writes_the_default_folder(tmp_path: Path) -> None:
    assert execute(["train", "--problem", "tiny", "--method", "adam", "--epochs", "1", "--lr", "0.01"]) == 0
    names = {path.name for path in (tmp_path / "runs" / "tiny-adam-0").iterdir()}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "status.json"}


def test_train_that_breaks_down_exits_with_1(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.break_after = 2
    assert execute(["train", "--method", "sgdm", "--epochs", "1"]) == 1
    assert "broke down" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--method", "kbfs"], "kbfgs"),
        (["train", "--method", "kbfgs", "--damping", "1.5"], "damping"),
        (["train", "--method", "adam", "--lr", "-1"], "lr"),
        (["train", "--seconds", "0"], "seconds must be positive"),
        (["train", "--threads", "0"], "threads must be >= 1"),
        (["train", "--device", "tpu"], "device must be 'cpu'"),
        (["train", "--batch-size", "71"], "at most the 70 training samples"),
        (["train", "--method", "adam", "--option", "no_such_thing=1"], "no_such_thing"),
        (["compare", "--methods", "adam", "nothing"], "nothing"),
        (["bench", "--only", "sgd"], "sgd"),
        (["bench", "--out", "."], "is a folder; name a file in it"),
        (["bench", "--data-dir", "nowhere"], "must be an existing folder, got 'nowhere'"),
        (["train", "--data-dir", "nowhere"], "must be an existing folder, got 'nowhere'"),
        (["compare", "--data-dir", "nowhere"], "must be an existing folder, got 'nowhere'"),
        (["train", "--out", "file"], "'file' is a file; name another folder with --out"),
        (["train", "--out", "file/below"], "'file' is a file; name another folder with --out"),
        (["compare", "--out", "file"], "'file' is a file; name another folder with --out"),
        (["bench", "--out", "file/below.json"], "'file' is a file"),
        (["train", "--threads", "100000"], "threads must be at most 1024"),
        (["train", "--seed", "99999999999999999999"], "seed must be >= 0 and at most"),
        (["train", "--method", "adam", "--option", "seed=3"], "--seed"),
        (["train", "--method", "adam", "--option", "lr=fast"], "lr must be a number, got 'fast'"),
        (["replay"], "no files to replay"),
        (["certify", "osculate", "--json", "."], "--json names a file to write, but '.' is a folder"),
        (["methods", "kbfs"], "did you mean 'kbfgs'"),
        (["methods", "--parts", "kronecer"], "did you mean 'Kronecker'"),
    ],
)
def test_bad_input_is_one_message(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    Path("file").touch()
    assert execute(words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err + shown.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["train", "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_compare_writes_table_curves_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--methods", "adam", "sgdm", "--seconds", "0.1", "--out", "here", "--option", "adam.lr=0.01"]
    assert execute(words) == 0
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {f"comparison.{ending}" for ending in ("png", "pdf", "csv", "json")}
    shown = capsys.readouterr().out
    assert "best first" in shown
    assert "train loss" in shown


def test_train_without_a_step_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["train", "--method", "kbfgs", "--seconds", "1e-9"]) == 1
    shown = capsys.readouterr().out
    assert "no step taken: the time was over after 0 of 4 mini-batches of the warm start" in shown
    assert "finished" not in shown


def test_compare_notes_a_method_without_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["compare", "--methods", "adam", "kbfgs", "--seconds", "1e-9"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "no step taken" in line]
    assert len(rows) == 1
    assert "kbfgs" in rows[0]


def test_a_run_that_needs_no_more_training_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--method", "adam", "--epochs", "1"]
    assert execute(words) == execute(words) == 0
    assert "continuing after 4 iterations; its budget is spent" in capsys.readouterr().out


def test_ctrl_c_before_training_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(data_dir: Path | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "load", load)
    assert execute(["train", "--method", "adam"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_methods_and_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["methods"]) == 0
    shown = capsys.readouterr().out
    for method in ("kbfgs", "mbf", "lw-sgdm", "joint-kfac", "adam"):
        assert method in shown
    assert execute(["methods", "--parts"]) == 0
    assert "BFGS" in capsys.readouterr().out


def test_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["problems"]) == 0
    assert "curves-autoencoder" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 1])
def test_replay_passes_files_and_status(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    given: list[Path] = []

    def replay(files: list[Path]) -> int:
        given.extend(files)
        return status

    stand_in = types.ModuleType("osculate.experiments.replay.replay")
    stand_in.replay = replay  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "osculate.experiments.replay.replay", stand_in)
    assert execute(["replay", "a.npz", "b.npz"]) == status
    assert given == [Path("a.npz"), Path("b.npz")]
