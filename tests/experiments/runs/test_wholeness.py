"""Files of a run that were damaged, cut or lost: named, made again, or refused; never other numbers without a word."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from osculate.errors import ArgumentError
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.runs import Resume, run_in_folder
from osculate.experiments.runs.targets import DamagedError
from osculate.experiments.runs.watched import Extras
from osculate.experiments.runs.wholeness import contradiction, contradiction_in
from rich.console import Console


def run(path: Path, epochs: int, extras: Extras | None = None, method: str = "sgdm") -> str:
    """Train there; what was said."""
    said, config = StringIO(), RunConfig("tiny", method)
    console = Console(file=said, width=500)
    run_in_folder(config, Budget(epochs), RunFolder(path), None, Resume.AUTO, console, extras or Extras())
    return said.getvalue()


def course(path: Path) -> list[dict[str, Any]]:
    lines = RunFolder(path).read_metrics()
    return [{key: line[key] for key in ("iterations", "train_loss", "gradient_evaluations")} for line in lines]


@pytest.mark.usefixtures("tiny")
class TestCheckpoint:
    @pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
    @pytest.mark.parametrize("method", ["sgdm", "kbfgs"])
    def test_flipped_bits_are_refused_with_the_way_out(self, tmp_path: Path, share: float, method: str) -> None:
        run(tmp_path, 1, method=method)
        file = tmp_path / "checkpoint.pt"
        content = bytearray(file.read_bytes())
        start = int(share * len(content))
        for place in range(start, start + 400):
            content[place] ^= 1
        file.write_bytes(content)
        metrics = (tmp_path / "metrics.jsonl").read_bytes()
        with pytest.raises(DamagedError, match=r"checkpoint\.pt (is damaged|cannot be read).*--resume never"):
            run(tmp_path, 2, method=method)
        assert (tmp_path / "metrics.jsonl").read_bytes() == metrics

    def test_one_flipped_bit_of_a_tensor_is_seen(self, tmp_path: Path) -> None:
        import zipfile

        run(tmp_path, 1)
        file = tmp_path / "checkpoint.pt"
        content = bytearray(file.read_bytes())
        with zipfile.ZipFile(file) as archive:
            tensor = next(entry for entry in archive.infolist() if "/data/" in entry.filename)
            stored = archive.read(tensor)
        content[content.index(stored) + 1] ^= 4
        file.write_bytes(content)
        with pytest.raises(DamagedError, match=r"is damaged: '.*/data/0'"):
            run(tmp_path, 2)

    def test_a_missing_one_is_said_and_training_starts_over(self, tmp_path: Path) -> None:
        run(tmp_path, 1)
        (tmp_path / "checkpoint.pt").unlink()
        assert "4 iterations of a run, but no checkpoint.pt: training starts over" in run(tmp_path, 2)
        assert [line["iterations"] for line in course(tmp_path)] == [0, 4, 8]


@pytest.mark.usefixtures("tiny")
class TestMetrics:
    @pytest.mark.parametrize("cut", [1, 20])
    @pytest.mark.parametrize("epochs", [2, 3])
    def test_the_evaluation_of_the_checkpoint_is_made_again(self, tmp_path: Path, cut: int, epochs: int) -> None:
        run(tmp_path / "whole", epochs)
        run(tmp_path / "cut", 2)
        file = tmp_path / "cut" / "metrics.jsonl"
        file.write_text(file.read_text()[:-cut])
        said = run(tmp_path / "cut", epochs)
        assert "lost the evaluation after 8 iterations; it is made again" in said and "without them" not in said
        assert course(tmp_path / "cut") == course(tmp_path / "whole")

    @pytest.mark.parametrize(
        ("kept", "lost"), [([], "0, 4"), ([0], "4"), ([0, 2], "4"), ([1, 2], "0"), ([1], "0"), ([2], "0, 4")]
    )
    def test_lost_lines_are_named(self, tmp_path: Path, kept: list[int], lost: str) -> None:
        run(tmp_path, 2)
        file = tmp_path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[number] for number in kept))
        with pytest.raises(DamagedError, match=f"lost the evaluations after iterations {lost};"):
            run(tmp_path, 3, Extras(whole=True))
        assert f"lost the evaluations after iterations {lost}: the record goes on without them" in run(tmp_path, 3)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        run(tmp_path, 2)
        (tmp_path / "metrics.jsonl").unlink()
        assert "lost the evaluations after iterations 0, 4" in run(tmp_path, 3)

    def test_a_bad_byte_is_named_by_its_line(self, tmp_path: Path) -> None:
        run(tmp_path, 2)
        file = tmp_path / "metrics.jsonl"
        first, second, third = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(first + second + b"\xff" + third)
        with pytest.raises(ArgumentError, match=r"after line 2, in line 3 \(UnicodeDecodeError"):
            run(tmp_path, 3)

    def test_a_whole_record_is_continued_without_a_word(self, tmp_path: Path) -> None:
        run(tmp_path, 2)
        assert "lost" not in run(tmp_path, 3, Extras(whole=True))


class TestContradiction:
    LINES = ({"iterations": 0, "train_loss": 2.0}, {"iterations": 4, "train_loss": 1.0})

    @pytest.mark.parametrize(
        ("status", "lines", "trial", "said"),
        [
            ({"iterations": 4}, LINES, {"value": 1.0}, ""),
            ({}, LINES, None, ""),
            ({"iterations": 8}, LINES, None, "ends after 4 iterations, but status.json says 8"),
            (
                {"iterations": 4},
                LINES,
                {"value": 0.5},
                "train_loss ends at 1 in metrics.jsonl, but trial.json says 0.5",
            ),
            ({"iterations": 4}, LINES[1:], None, "begins after 4 iterations"),
            ({"iterations": 4}, (), None, "missing or empty"),
        ],
    )
    def test_of_a_finished_run(self, status: Any, lines: Any, trial: Any, said: str) -> None:
        told = contradiction({"status": "finished", **status}, lines, trial, "train_loss")
        assert said in told and bool(said) == bool(told)
        assert not contradiction({"status": "interrupted", **status}, lines, trial, "train_loss")

    def test_in_a_folder(self, tmp_path: Path) -> None:
        assert contradiction_in(RunFolder(tmp_path)) == ""
        (tmp_path / "status.json").write_text(json.dumps({"status": "finished", "iterations": 4}))
        assert "missing or empty" in contradiction_in(RunFolder(tmp_path))
        (tmp_path / "metrics.jsonl").write_text("nonsense\n")
        assert "cannot be read after line 0" in contradiction_in(RunFolder(tmp_path))
