"""``osculate bench --processes`` and ``--planned``: what is printed, written and refused; the plan's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from osculate.errors import ArgumentError, OsculateError, UnknownNameError
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs import process_bench
from osculate.experiments.runs.planned import (
    MODELS,
    RATES,
    Rates,
    _kfac,
    crossings_of,
    crossings_table,
    plan,
    plan_all,
    planned_table,
)
from osculate.experiments.runs.process_bench import Shares, benchmark_processes, processes_table
from osculate.experiments.runs.sharing import Outlined, network_named, outline
from rich.console import Console
from torch import nn


def test_processes_are_counted_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, one method, two divisions; the one spawn of this file."""
    monkeypatch.setenv("COLUMNS", "80")
    words = ["bench", "--processes", "2", "--methods", "kfac", "--divisions", "owners-only", "fsdp", "--steps", "2"]
    assert execute([*words, "--batch-size", "32", "--out", str(tmp_path / "shares.json")]) == 0
    said = capsys.readouterr().out
    assert "owners-only" in said and "…" not in said and max(map(len, said.splitlines())) <= 80
    written = json.loads((tmp_path / "shares.json").read_text())
    assert written["settings"] == {"network": "small-autoencoder", "processes": 2, "samples": 16, "steps": 2}
    assert [row["division"] for row in written["rows"]] == ["owners-only", "fsdp"]
    for row in written["rows"]:
        assert row["agrees"] and row["sent"] == row["formula"] and len(row["sent"]) == 2
        assert row["state"] == row["state_formula"] and row["busiest"] <= 1.25


def test_what_cannot_be_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything runs."""
    with pytest.raises(ArgumentError, match="2 processes, a sample each and a step, got 1, 4 and 1"):
        benchmark_processes(1, "small-autoencoder", ["kfac"], ["owners"], 4, 1)
    with pytest.raises(ArgumentError, match="division must be one of"):
        benchmark_processes(2, "small-autoencoder", ["kfac"], ["halves"], 4, 1)
    with pytest.raises(OsculateError, match="no-such"):
        benchmark_processes(2, "small-autoencoder", ["no-such"], ["owners"], 4, 1)
    with pytest.raises(UnknownNameError, match="gpt"):
        network_named("gpt")
    assert execute(["bench", "--processes", "2", "--planned"]) == 2


def test_a_process_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last it has said; the others are ended."""
    monkeypatch.setattr(process_bench, "forecast", lambda case, count: [])
    with pytest.raises(OsculateError, match=r"process \d ended with status 1: .*no-such"):
        benchmark_processes(2, "small-autoencoder", ["no-such"], ["owners"], 4, 1)


def test_a_difference_is_shown() -> None:
    """A row whose counts are not the formula's says so."""
    counts = [{"statistics": 8.0}, {"statistics": 8.0}]
    row = Shares(
        "kfac", "owners", counts, [*counts[:1], {"statistics": 9.0}], [1, 1], [1, 1], [], [], None, 4.0, 1.0, 0
    )
    assert not row.agrees and row.mean("statistics") == 8.0
    console = Console(width=80, record=True)
    console.print(processes_table([row], "title"))
    assert " no" in console.export_text()


@pytest.fixture(scope="module")
def small() -> Outlined:
    """Two dense layers, 30-20-10, under K-FAC."""
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)).to("meta")
    return outline(model, torch.empty(1, 30, device="meta"), _kfac(5120))


def test_moments_are_less_from_half_the_order_on(small: Outlined) -> None:
    """n d numbers of rows against d (d + 1) / 2 of a moment, the bias as one more on the input side."""
    first, second = crossings_of(small)
    assert (first.outputs, second.outputs) == (21 / 2, 11 / 2)
    assert first.inputs == pytest.approx(32 * 33 / 2 / 30)  # of order 31, which travels as one of 32
    assert second.rows == (10, 21)


def test_a_plan_adds_up(small: Outlined) -> None:
    """One process sends nothing; a ring's bytes and its latency; all is in the total."""
    alone = plan(small, 4, "replicated", 1, "moments")
    assert alone.gradients == alone.statistics == alone.directions == 0.0
    rates = Rates(inside=1e6, outside=1e5, near=0.0, far=0.0)
    numbers = 30 * 20 + 20 + 20 * 10 + 10
    two = plan(small, 4, "owners", 2, "moments", rates)
    assert two.gradients == pytest.approx(1e3 * 2 * numbers * 4 / 2 / 1e6, abs=1e-3)
    assert two.directions == pytest.approx(two.gradients / 2, abs=1e-3)
    assert two.total == pytest.approx(
        two.passes + two.gradients + two.statistics + two.products + two.inverses + two.directions, abs=1e-3
    )
    assert two.state < plan(small, 4, "replicated", 2, "moments", rates).state
    # Sixteen processes: seven eighths of what a node has go around in it, half of an eighth between two nodes.
    assert rates.ring(8e6, 16) == pytest.approx(7 + 1e6 / 2 / 1e5)
    assert rates.straight(1e6, 3e6, 8) == 3.0 and rates.straight(0.0, 0.0, 8) == 0.0
    assert rates.straight(1.5e6, 0.0, 16) == pytest.approx(1.5e6 * 8 / 15 / 1e5)


def test_the_plan_says_where_moments_pay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All four networks; owners' crossing lies earlier the more processes there are, for they receive from all."""
    found = plan_all((8, 512))
    assert set(found.steps) == set(MODELS)
    assert found.parameters["ResNet-50"] == 25_557_032
    assert 86e6 < found.parameters["ViT-B/16"] < 87e6 and 1.0e9 < found.parameters["1 B transformer"] < 1.05e9
    assert found.served["1 B transformer"] < 0.35 < 0.9 < found.served["1 B, limit 7169"] < 1.0
    for name, times in found.in_time.items():
        assert times[512] < times[8]
        assert len(found.steps[name]) == 2 * 4 * 2
        for step in found.steps[name]:
            assert step.total > 0 and (step.division != "replicated" or step.directions == 0)
    console = Console(width=80, record=True)
    for name, steps in found.steps.items():
        console.print(planned_table(name, steps))
    console.print(crossings_table(found))
    text = console.export_text()
    assert "…" not in text and "crossover" in text
    assert RATES.outside < RATES.inside
