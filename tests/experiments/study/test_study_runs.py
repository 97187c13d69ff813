"""A study on real processes: killed, continued, shared; one arm diverges."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from osculate.experiments.commands.study import scaled
from osculate.experiments.study.definition import Study
from osculate.experiments.study.ledger import Ledger, open_storage
from osculate.experiments.study.reading import read_study

STUDY = """
seeds = [1, 2]
[[problems]]
name = "curves-autoencoder"
options = { size = "small" }
batch_size = 1000
[budget]
epochs = 3
[tuning]
trials = 3
epochs = 2
[arms.sgdm]
method = "sgdm"
space = { lr = { log = [1e-3, 1e-2] } }
[arms.diverging]
method = "sgdm"
lr = 1e9
"""
RUNS = 3 + 2 + 2
MAIN = "from osculate.experiments.commands.cli import main; main()"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return path


def start(file: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "study", str(file), "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(process: subprocess.Popen[str], words: str, count: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        count -= words in line
        if not count:
            return
    pytest.fail(f"the study ended before it said {words!r}")


def statuses(out: Path) -> dict[Path, dict[str, object]]:
    return {path.parent: json.loads(path.read_text()) for path in out.glob("runs/*/*/*/status.json")}


def written(folder: Path) -> int:
    return (folder / "status.json").stat().st_mtime_ns


def check_complete(out: Path, study: Study, url: str | None = None) -> None:
    """Every run is there once, with metrics in order; the diverging arm's are misses."""
    entries = Ledger(open_storage(out, url), study, out / "workers").entries()
    assert len(entries) == RUNS and all(entry.state == "done" for entry in entries.values())
    assert all((entry.value is None) == (slot.arm == "diverging") for slot, entry in entries.items())


def check_folder(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["iterations"] for line in lines]
    assert steps == sorted(set(steps))
    trial = json.loads((folder / "trial.json").read_text())
    assert (trial["value"] is None) == (trial["arm"] == "diverging")
    steps_of_epoch = 4
    epochs = 2 if trial["phase"] == "tune" else 3
    assert trial["value"] is None or (
        trial["value"] == lines[-1]["train_loss"] and steps[-1] == epochs * steps_of_epoch
    )


def test_killed_in_the_middle_the_same_command_finishes_and_repeats_nothing(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    first = start(file, out, "--workers", "2")
    wait_for(first, "]", 1)  # one run is done, others are under way
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=600)  # the workers hold the other end of its output: they have noticed
    finished = {path: written(path) for path, status in statuses(out).items() if status["status"] == "finished"}
    assert finished
    second = start(file, out, "--workers", "2")
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert "runs are done already" in said and "all runs are done" in said
    assert "broke down" in said and "the loss is" in said, "the diverging arm says why"
    assert {path: written(path) for path in finished} == finished
    check_complete(out, read_study(file))
    assert len(statuses(out)) == RUNS
    for folder in statuses(out):
        check_folder(folder)
    assert not (out / "workers").exists()


def test_a_pruner_ends_bad_tuning_runs_early_and_spares_the_best(tmp_path: Path) -> None:
    grid = "space = { lr = { grid = [1e-8, 2e-8, 4e-8, 8e-8, 1e-3, 2e-3, 3e-3, 4e-3] } }"
    text = STUDY.replace("space = { lr = { log = [1e-3, 1e-2] } }", grid).replace("trials = 3", "trials = 8")
    file = tmp_path / "pruned.toml"
    file.write_text(
        text.replace("epochs = 2", 'epochs = 3\npruner = "median"').replace("seeds = [1, 2]", "seeds = [1]")
    )
    out = tmp_path / "pruned"
    said, _ = start(file, out, "--arms", "sgdm").communicate(timeout=600)
    assert "all runs are done" in said
    ended = {}
    for number in range(8):
        folder = out / "runs" / "curves-autoencoder" / "sgdm" / f"tune-{number}"
        trial = json.loads((folder / "trial.json").read_text())
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert trial["value"] == last["train_loss"], "it counts with the value it had"
        ended[number] = (last["iterations"], trial["reason"], trial["settings"]["lr"])
    early = [entry for entry in ended.values() if entry[0] < 12]
    assert early and all("before its budget" in reason for _, reason, _ in early)
    assert {rate for _, _, rate in early} & {1e-8, 2e-8, 4e-8, 8e-8} and not {rate for _, _, rate in early} & {
        3e-3,
        4e-3,
    }
    assert all(not reason for steps, reason, _ in ended.values() if steps == 12)
    final = json.loads((out / "runs/curves-autoencoder/sgdm/final-1/trial.json").read_text())
    assert final["settings"]["lr"] >= 2e-3
    assert "pruned by the median" in json.loads((out / "study.json").read_text())["protocol"]


def test_two_commands_share_one_database_and_ctrl_c_gives_back(file: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'book.db'}"
    longer = ("--storage", url, "--epochs", "20")  # so that neither has done everything before the other begins
    first = start(file, tmp_path / "one", *longer)
    second = start(file, tmp_path / "two", *longer)
    wait_for(first, "started", 1)
    wait_for(second, "started", 1)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=600)
    assert first.returncode in (0, 130), said
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    check_complete(tmp_path / "two", scaled(read_study(file), epochs=20), url)
    done = [s for out in ("one", "two") for s in statuses(tmp_path / out).values() if s["status"] != "interrupted"]
    assert len(done) == RUNS
