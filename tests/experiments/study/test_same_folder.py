"""A folder holds one study: what is there is never counted as a run of other settings, whatever the file is called."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from osculate import ArgumentError
from osculate.experiments.study.checking import checked
from osculate.experiments.study.conductor import conduct
from osculate.experiments.study.ledger import FINAL, TUNE, Slot
from osculate.experiments.study.reading import read_study
from osculate.experiments.study.worker import Assignment, Place, perform
from rich.console import Console

STUDY = """
seeds = [1]
[[problems]]
name = "digits-classifier"
[budget]
epochs = 1
[arms.adamw]
method = "adamw"
lr = 0.003
"""
MORE = '[arms.sgdm]\nmethod = "sgdm"\n'
OTHER = """
seeds = [1]
[[problems]]
name = "digits-autoencoder"
options = { size = "small" }
[budget]
epochs = 1
[arms.sgdm]
method = "sgdm"
"""


def ran(text: str, file: Path, out: Path) -> bool:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return conduct(checked(read_study(file), None), Place(out), file, Console(file=io.StringIO()))


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert ran(STUDY, folder / "mine.toml", folder / "out")
    return folder / "out"


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "out"))


@pytest.mark.parametrize("name", ["mine", "another"])
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("lr = 0.003", "lr = 0.03", r"settings: saved \{'lr': 0.003\}, asked for \{'lr': 0.03\}"),
        ("epochs = 1", "epochs = 2", "epochs of the budget: saved 1, asked for 2"),
        ('name = "digits-classifier"', 'name = "digits-classifier"\nbatch_size = 50', "batch_size of the problem"),
        ('name = "digits-classifier"', 'name = "digits-classifier"\noptions = { size = "small" }', "options of the"),
        ('method = "adamw"', 'method = "adam"', "method: saved 'adamw', asked for 'adam'"),
    ],
)
def test_another_definition_is_refused_whatever_the_file_is_called(
    out: Path, tmp_path: Path, name: str, before: str, after: str, said: str
) -> None:
    held = files(out)
    with pytest.raises(ArgumentError, match=said) as refused:
        ran(STUDY.replace(before, after), tmp_path / f"{name}.toml", out)
    assert "study 'mine'" in str(refused.value) and "'adamw'" in str(refused.value)
    assert "take another folder with --out" in str(refused.value) and "another name" not in str(refused.value)
    assert files(out) == held


@pytest.mark.parametrize("name", ["mine", "another"])
def test_another_study_is_not_mixed_in(out: Path, tmp_path: Path, name: str) -> None:
    held = files(out)
    with pytest.raises(
        ArgumentError, match=r"holds another study, 'mine': .* has no arm 'adamw' on 'digits-classifier'"
    ):
        ran(OTHER, tmp_path / f"{name}.toml", out)
    assert files(out) == held


@pytest.mark.parametrize("name", ["mine", "another"])
def test_more_arms_and_seeds_may_come(out: Path, tmp_path: Path, name: str) -> None:
    first = out / "runs" / "digits-classifier" / "adamw" / "final-1" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    assert ran(STUDY.replace("[1]", "[1, 2]") + MORE, tmp_path / f"{name}.toml", out)
    assert first.stat().st_mtime_ns == before, "it is not run again"
    assert len(list(out.glob("runs/*/*/*/status.json"))) == 4


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("lr = 0.003", "lr = 0.03", "lr: saved 0.003, asked for 0.03"),
        ("lr = 0.003", "weight_decay = 0.5", "weight_decay: saved"),
        ("epochs = 1", "epochs = 2", "length: saved 1 epochs in .* asked for 2 epochs"),
        ("epochs = 1", "seconds = 1000", "length: saved 1 epochs in .* asked for 1000 s"),
    ],
)
def test_without_its_book_a_run_is_known_by_its_own_files(
    out: Path, tmp_path: Path, before: str, after: str, said: str
) -> None:
    (out / "journal.log").unlink()
    with pytest.raises(ArgumentError, match=f"final-1' holds another run than digits-classifier adamw(?s:.*){said}"):
        ran(STUDY.replace(before, after), tmp_path / "another.toml", out)
    assert ran(STUDY, tmp_path / "mine.toml", out), "and the right one is counted"


def test_a_final_run_of_another_best_point_is_run_again(tmp_path: Path) -> None:
    text = STUDY.replace("lr = 0.003", "space = { lr = { grid = [0.003, 0.03] } }")
    (tmp_path / "tuned.toml").write_text(text)
    assignment = Assignment(checked(read_study(tmp_path / "tuned.toml"), None), Place(tmp_path / "out"), "me")
    slot = Slot("digits-classifier", "adamw", FINAL, 1)
    saved = tmp_path / "out" / "runs" / slot.folder / "config.json"
    values = {}
    for lr in (0.003, 0.03, 0.03):
        ended = perform(assignment, slot, {"lr": lr}, "train_loss")
        assert ended is not None and json.loads(saved.read_text())["lr"] == lr
        values.setdefault(lr, ended[1])
        assert values[lr] == ended[1]
    assert values[0.003] != values[0.03]
    assert perform(assignment, Slot(slot.problem, slot.arm, TUNE, 0), {"lr": 0.003}, "train_loss") is not None
