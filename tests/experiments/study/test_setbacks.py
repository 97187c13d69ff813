"""What no method is to blame for ends no run for ever: a full disk, no memory, errors of the program, a cut journal."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osculate.errors import ArgumentError, NumericalError
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs.setbacks import in_words, is_setback
from osculate.experiments.runs.targets import DamagedError, HeldError, OutputError
from osculate.experiments.study.journal import open_journal
from osculate.experiments.study.ledger import Ledger, open_storage
from osculate.experiments.study.reading import read_study

STUDY = """
seeds = [1]
[[problems]]
name = "curves-autoencoder"
options = { size = "small" }
batch_size = 1000
[budget]
epochs = 2
[arms.sgdm]
method = "sgdm"
"""
MAIN = "from osculate.experiments.commands.cli import main; main()"


@pytest.mark.parametrize(
    "error",
    [
        OutputError("no room"),
        HeldError("held"),
        DamagedError("cut"),
        OSError(28, "No space left on device"),
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
        AttributeError("no such thing"),
        KeyError("name"),
    ],
)
def test_disk_memory_files_and_program_are_no_breakdowns(error: Exception) -> None:
    assert is_setback(error)


@pytest.mark.parametrize(
    "error",
    [
        NumericalError("the loss is nan"),
        ArgumentError("lr must be positive"),
        FloatingPointError(),
        torch.linalg.LinAlgError("singular"),
        RuntimeError("expected scalar type"),
    ],
)
def test_what_training_meets_is_a_breakdown(error: Exception) -> None:
    assert not is_setback(error)


def test_an_error_in_words_has_its_kind_where_it_is_not_ours() -> None:
    assert in_words(NumericalError("nan")) == "nan" and in_words(KeyError("a")) == "KeyError: 'a'"


def test_a_full_disk_gives_the_run_back_and_the_same_command_does_it(tmp_path: Path) -> None:
    file, out = tmp_path / "one.toml", tmp_path / "out"
    file.write_text(STUDY)
    command = [sys.executable, "-c", MAIN, "study", str(file), "--out", str(out)]

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    stopped = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_large_files)
    assert stopped.returncode == 1, stopped.stderr
    assert "checkpoint.pt' cannot be written" in stopped.stdout and "the run is given back" in stopped.stdout
    assert "Traceback" not in stopped.stderr
    study = read_study(file)
    (entry,) = Ledger(open_storage(out, None), study, out / "workers").entries().values()
    assert entry.state == "waiting" and not entry.crashes
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "all runs are done" in again.stdout, again.stderr
    (entry,) = Ledger(open_storage(out, None), study, out / "workers").entries().values()
    assert entry.state == "done" and entry.value is not None


def test_a_finished_run_with_damaged_files_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the book knows stays where the files agree; a run whose files do not is repeated, and named."""
    file, out = tmp_path / "two.toml", tmp_path / "out"
    file.write_text(STUDY.replace("seeds = [1]", "seeds = [1, 2, 3]"))
    command = ["study", str(file), "--out", str(out)]
    assert execute(command) == 0
    first, second, third = (out / f"runs/curves-autoencoder/sgdm/final-{seed}" for seed in (1, 2, 3))
    whole = [json.loads(line)["train_loss"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    untouched = (third / "status.json").stat().st_mtime_ns
    (first / "metrics.jsonl").write_text((first / "metrics.jsonl").read_text()[:-20])
    (second / "metrics.jsonl").write_text("")
    capsys.readouterr()
    assert execute(["report", str(out)]) == 1
    assert (
        "final-1 is damaged: metrics.jsonl ends after 4 iterations, but status.json says 8" in capsys.readouterr().out
    )
    assert execute(command) == 0
    said = capsys.readouterr().out
    assert "final-1 is done again: metrics.jsonl ends after 4" in said
    assert "final-2 is done again: status.json says that it finished" in said and "final-3 is done" not in said
    again = [json.loads(line)["train_loss"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert again == whole and (third / "status.json").stat().st_mtime_ns == untouched
    assert execute(command) == 0 and "done again" not in capsys.readouterr().out
    (out / "journal.log").unlink()
    (second / "metrics.jsonl").write_text("")
    assert execute(command) == 0 and len((second / "metrics.jsonl").read_text().splitlines()) == 3
    (out / "journal.log").unlink()
    (second / "status.json").write_text(json.dumps({"status": "running"}))
    checkpoint = bytearray((second / "checkpoint.pt").read_bytes())
    checkpoint[len(checkpoint) // 2] ^= 1
    (second / "checkpoint.pt").write_bytes(checkpoint)
    assert execute(command) == 0 and json.loads((second / "status.json").read_text())["status"] == "finished"


class TestJournal:
    def write(self, file: Path) -> list[bytes]:
        storage = open_journal(file)
        for name in "abc":
            storage.create_new_study([], name)
        return file.read_bytes().splitlines(keepends=True)

    @pytest.mark.parametrize("cut", [1, 20])
    def test_a_cut_last_line_was_never_written(self, tmp_path: Path, cut: int) -> None:
        file = tmp_path / "journal.log"
        self.write(file)
        file.write_bytes(file.read_bytes()[:-cut])
        storage = open_journal(file)
        assert [study.study_name for study in storage.get_all_studies()] == ["a", "b"]
        storage.create_new_study([], "d")
        names = [study.study_name for study in open_journal(file).get_all_studies()]
        assert names == ["a", "b", "d"]

    def test_a_file_of_one_cut_line_begins_anew(self, tmp_path: Path) -> None:
        file = tmp_path / "journal.log"
        file.write_bytes(b"x" * 10_000)
        open_journal(file).create_new_study([], "a")
        assert [study.study_name for study in open_journal(file).get_all_studies()] == ["a"]

    @pytest.mark.parametrize(
        ("place", "damage", "named"),
        [(5, b"\xff", ": line 2 is damaged"), (0, b"x", ": line 2 is damaged"), (5, b"x", "")],
    )
    def test_a_damaged_line_is_named(self, tmp_path: Path, place: int, damage: bytes, named: str) -> None:
        file = tmp_path / "journal.log"
        first, second, third = self.write(file)
        file.write_bytes(first + second[:place] + damage + second[place + 1 :] + third)
        with pytest.raises(ArgumentError, match=rf"journal\.log cannot be read{named} .*move it away"):
            open_journal(file)

    def test_lines_without_room_leave_the_file_as_it_was(self, tmp_path: Path) -> None:
        file = tmp_path / "journal.log"
        self.write(file)
        before, storage = file.read_bytes(), open_journal(file)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
        try:
            with pytest.raises(OutputError, match=r"journal\.log' cannot be written"):
                storage.create_new_study([], "d")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert file.read_bytes() == before
