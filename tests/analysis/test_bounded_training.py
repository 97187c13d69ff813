"""Bounded approximations during real training, for every damping of pairs."""

from __future__ import annotations

from pathlib import Path

import osculate as osc
import pytest
from osculate.analysis.monitor_plots import PAIR_DAMPINGS, bounded_plots, bounded_run, read_readings, reading_plots
from osculate.analysis.readings import JsonLines


@pytest.mark.parametrize("name", PAIR_DAMPINGS)
def test_every_bound_holds_while_an_autoencoder_is_trained(name: str) -> None:
    run = bounded_run(PAIR_DAMPINGS[name], steps=30)
    assert run.certificate.ok, run.certificate.summary()
    assert run.certificate.steps == 30 and len(run.losses) == 30
    if name == "double damping":
        assert sum(run.losses[-5:]) < 0.8 * sum(run.losses[:5])


def test_double_damping_keeps_the_largest_eigenvalue_below_that_of_powells_stage_alone() -> None:
    def largest(rule: osc.PowellH | osc.DoubleDamping) -> float:
        readings = bounded_run(rule, steps=60).readings
        return max(entry.inequality.measured for entry in readings if entry.inequality.name == "lambda_max(H)")

    assert 3.0 * largest(osc.DoubleDamping()) < largest(osc.PowellH())


def test_the_figure_shows_every_damping_beside_its_bound(tmp_path: Path) -> None:
    runs = {name: bounded_run(PAIR_DAMPINGS[name], steps=4) for name in ("double damping", "none")}
    plots = bounded_plots(runs)
    assert [plot.y_label for plot in plots] == ["lambda_max(H)", "lambda_min(H)", "lambda_max(E)", "lambda_min(E)"]
    for plot in plots:
        assert [curve.label for curve in plot.curves][:2] == ["double damping", "double damping, bound"]
        measured, bound = plot.curves[0].y, plot.curves[1].y
        above = plot.y_label.startswith("lambda_max")
        slack = [b - m if above else m - b for m, b in zip(measured, bound, strict=True)]
        assert len(slack) == 4 and min(slack) > -1e-9


def test_readings_survive_the_file(tmp_path: Path) -> None:
    readings = bounded_run(osc.DoubleDamping(), steps=2).readings
    sink = JsonLines(tmp_path / "monitors.jsonl")
    for reading in readings:
        sink.write(reading)
    sink.close()
    back = read_readings(tmp_path / "monitors.jsonl")
    assert [entry.as_dict()["measured"] for entry in back] == [entry.as_dict()["measured"] for entry in readings]
    assert len(reading_plots(back)) == len({(entry.layer, entry.inequality.name) for entry in readings})
    (tmp_path / "monitors.jsonl").write_text("{broken\n")
    with pytest.raises(osc.ArgumentError, match="after line 0"):
        read_readings(tmp_path / "monitors.jsonl")
