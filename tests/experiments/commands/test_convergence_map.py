"""The command that maps certified convergence: resumable, and every output is written."""

import json
import math
from pathlib import Path

import pytest
from osculate.analysis.function_space.convergence_map import (
    MAPPED,
    Cell,
    CellKey,
    Surroundings,
    interval_of,
    measure_cell,
)
from osculate.errors import ArgumentError, UnknownNameError
from osculate.experiments.commands import convergence_map
from osculate.experiments.commands.cli import execute

WORDS = [
    "convergence-map",
    "--widths",
    "20",
    "30",
    "--dampings",
    "0.01",
    "0.1",
    "--etas",
    "0.01",
    "0.2",
    "--steps",
    "4",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_output_is_written_and_a_second_call_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--blocks", "per-output", "kfac", "--out", "here"]
    assert execute(words) == 0
    names = {path.name for path in Path("here").iterdir()}
    figures = {f"{stem}.{kind}" for stem in ("damping-eta", "damping-width", "rates") for kind in ("png", "pdf")}
    assert names == figures | {"cells.jsonl", "map.json", "map.csv"}
    cells = json.loads(Path("here/map.json").read_text())["cells"]
    assert len(cells) == len(Path("here/cells.jsonl").read_text().splitlines()) == 16
    assert "certified linear convergence" in capsys.readouterr().out
    monkeypatch.setattr(convergence_map, "measure_cell", None)
    assert execute(words) == 0


def test_only_what_is_missing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, "--blocks", "whole", "--out", "here"]
    assert execute(words) == 0
    file = Path("here/cells.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:5]) + "\n" + lines[5][:30])
    measured: list[CellKey] = []
    original = convergence_map.measure_cell

    def counting(key: CellKey, surroundings: Surroundings) -> Cell:
        measured.append(key)
        return original(key, surroundings)

    monkeypatch.setattr(convergence_map, "measure_cell", counting)
    assert execute(words) == 0
    assert len(measured) == 3
    assert len(convergence_map.CellFile(file).read()) == 8


@pytest.mark.parametrize(
    "words, message",
    [
        (["--blocks", "columns"], "unknown blocks 'columns'"),
        (["--etas", "1.5"], "eta"),
        (["--dampings", "0"], "damping"),
        (["--widths", "0"], "width"),
        (["--memory-gib", "0"], "memory_gib"),
        (["--memory-gib", "1e-7", "--widths", "5"], "one unit with 12 samples"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert execute(["convergence-map", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_file_of_something_else_is_refused() -> None:
    Path("cells.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ArgumentError, match="something else"):
        convergence_map.CellFile(Path("cells.jsonl")).read()


@pytest.mark.parametrize("blocks", MAPPED)
def test_cells_survive_the_file_and_certified_ones_keep_their_rate(blocks: str) -> None:
    file = convergence_map.CellFile(Path("folder") / "cells.jsonl")
    cells = [measure_cell(CellKey(blocks, 40, damping, 0.01, 5), Surroundings()) for damping in (1e-3, 0.03)]
    for cell in cells:
        assert not cell.certified or cell.kept
        file.append(cell)
    assert list(file.read().values()) == cells


def test_a_run_that_ran_away_is_stored_as_null() -> None:
    cell = Cell(CellKey("whole", 4, 0.1, 0.1), False, 0.0, math.inf, math.inf, *[math.nan] * 4, 0.1)
    file = convergence_map.CellFile(Path("cells.jsonl"))
    file.append(cell)
    (found,) = file.read().values()
    assert math.isnan(found.worst_ratio)
    assert not found.kept


def _cell(damping: float, eta: float, certified: bool) -> Cell:
    return Cell(CellKey("whole", 8, damping, eta), certified, float(certified), *[0.5] * 6, 0.0)


def test_intervals() -> None:
    cells = [_cell(0.1, 0.2, True), _cell(1.0, 0.2, True), _cell(0.1, 0.4, False), _cell(3.0, 0.2, False)]
    assert interval_of(cells[:2] + cells[3:]) == (0.1, 1.0)
    with pytest.raises(UnknownNameError):
        CellKey("nothing", 8, 0.1, 0.1)
