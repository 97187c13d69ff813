"""The commands that look into a run: diagnose, microscope, compare-structures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from osculate.analysis.monitors.monitor_plots import read_readings
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs.records import RunFolder


@pytest.fixture
def run(tiny: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Two epochs of K-BFGS, watched, with both checkpoints."""
    words = ["train", "--method", "kbfgs", "--epochs", "2", "--watch", "--watch-every", "1", "--keep-checkpoints"]
    words += ["--damping", "0.3"]  # with which the Hessian stays positive definite, and cosines are defined
    assert execute([*words, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_diagnose_measures_every_layer_at_every_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["diagnose", str(run), "--samples", "20", "--targets", "ggn", "hessian"]) == 0
    found = rows(run / "diagnosis" / "approximation.csv")
    assert [(row["iterations"], row["block"], row["target"]) for row in found] == [
        (steps, layer, target) for steps in ("4", "8") for layer in ("0", "3") for target in ("ggn", "hessian")
    ]
    assert all(float(row["error_frobenius"]) > 0.0 and -1.0 <= float(row["cosine"]) <= 1.0 for row in found)
    last = next(row for row in found[4:] if row["block"] == "3" and row["target"] == "ggn")
    assert f"{float(last['cosine']):.3g}" in capsys.readouterr().out
    for name in ("approximation", "spectra", "monitors"):
        assert (run / "diagnosis" / f"{name}.png").stat().st_size > 10_000


def test_what_was_recorded_holds_when_it_is_read_again(run: Path) -> None:
    """The rounding that was allowed for is in the file too."""
    folder = RunFolder(run)
    recorded = [json.loads(line)["holds"] for line in folder.monitors_file.read_text().splitlines()]
    assert [reading.inequality.holds for reading in read_readings(folder.monitors_file)] == recorded


def test_diagnose_without_kept_checkpoints_takes_the_last_one(tiny: object, tmp_path: Path) -> None:
    assert execute(["train", "--method", "kfac", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert execute(["diagnose", str(tmp_path), "--samples", "10"]) == 0
    assert {row["iterations"] for row in rows(tmp_path / "diagnosis" / "approximation.csv")} == {"4"}
    assert not (tmp_path / "diagnosis" / "monitors.png").exists()


def test_microscope_takes_one_step_of_every_method(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "checkpoint.pt").read_bytes()
    assert execute(["microscope", str(run), "--methods", "kbfgs", "kfac", "adam", "--history", "3"]) == 0
    found = rows(run / "microscope" / "microscope.csv")
    assert [row["method"] for row in found] == ["kbfgs", "kfac", "adam"]
    for row in found:
        assert float(row["ratio"]) == pytest.approx(float(row["actual"]) / float(row["predicted"]))
        assert float(row[f"cosine {row['method']}"]) == pytest.approx(1.0)
    assert "after 8 iterations of kbfgs" in capsys.readouterr().out
    assert (run / "microscope" / "microscope.png").stat().st_size > 10_000
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_run_that_broke_down_at_once_is_seen_at_its_beginning(tiny: object, tmp_path: Path) -> None:
    words = ["train", "--method", "kbfgs", "--epochs", "1", "--lr", "1e30", "--option", "growth=inf"]
    assert execute([*words, "--option", "limit=inf", "--out", str(tmp_path)]) == 1
    assert not RunFolder(tmp_path).checkpoint_file.exists()
    assert execute(["microscope", str(tmp_path), "--methods", "adam", "--history", "2"]) == 0
    saved = json.loads((tmp_path / "microscope" / "microscope.json").read_text())
    assert saved["iterations"] == 0 and len(saved["steps"]) == 1


def test_compare_structures_ranks_by_angle(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # every name on one line
    words = ["compare-structures", str(run), "--structures", "Dense", "Diagonal", "--samples", "20"]
    assert execute([*words, "--history", "3", "--out", str(tmp_path / "out")]) == 0
    found = rows(tmp_path / "out" / "structures.csv")
    cosines: dict[str, list[float]] = {}
    for row in found:
        if row["cosine"] != "nan":
            cosines.setdefault(row["structure"], []).append(float(row["cosine"]))
    means = {name: sum(values) / len(values) for name, values in cosines.items()}
    printed = capsys.readouterr().out
    places = [printed.index(f" {name} ") for name in sorted(means, key=lambda name: -means[name])]
    assert places == sorted(places) and len(places) >= 2
    assert execute([*words[:2], "--structures", "nothing of the kind"]) == 2
    assert execute(words) == 0
    assert (run / "structures" / "structures.csv").exists()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_compare_structures_needs_damping(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["compare-structures", "--structures", "Diagonal", "--damping", value]) == 2
    assert "damping must be a finite number > 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["diagnose", "microscope", "compare-structures"])
def test_a_folder_without_a_run_is_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("nowhere", "."):
        assert execute([command, place]) == 2
        shown = capsys.readouterr().err
        assert f"'{place}' holds no run" in shown and "--out" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["diagnose", "microscope", "compare-structures"])
def test_the_beginning_never_passes_for_a_lost_end(
    command: str, tiny: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["train", "--method", "kfac", "--epochs", "1", "--out", str(tmp_path)]) == 0
    (tmp_path / "checkpoint.pt").unlink()
    assert execute([command, str(tmp_path)]) == 2
    assert "missing" in capsys.readouterr().err


def test_diagnose_that_measures_nothing_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["diagnose", str(run), "--samples", "10"]) == 0
    table = (run / "diagnosis" / "approximation.csv").read_bytes()
    assert execute(["diagnose", str(run), "--samples", "10", "--largest", "1"]) == 2
    assert "raise --largest" in capsys.readouterr().err
    assert (run / "diagnosis" / "approximation.csv").read_bytes() == table


def test_diagnose_leaves_no_figure_of_an_earlier_measurement(run: Path) -> None:
    assert execute(["diagnose", str(run), "--samples", "10"]) == 0
    RunFolder(run).monitors_file.unlink()
    assert execute(["diagnose", str(run), "--samples", "10"]) == 0
    assert {file.stem for file in (run / "diagnosis").iterdir()} == {"approximation", "spectra"}


@pytest.mark.parametrize(
    ("words", "message"), [(["--methods"], "at least one"), (["--history", "0"], "history must be")]
)
def test_microscope_refuses_bad_numbers(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["microscope", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_compare_structures_refuses_matrices_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any is made: the first layer of the full autoencoder has 314 000 parameters."""
    words = ["compare-structures", "--problem", "curves-autoencoder", "--largest", "400000", "--train-steps", "0"]
    assert execute([*words, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "789 GB" in shown and "--largest 23170" in shown
