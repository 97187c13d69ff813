"""Bounded approximations during real training, for every damping of pairs, and the plots of what was seen."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import osculate as osc
import pytest
import torch
from osculate.analysis.monitors.monitor_plots import (
    BoundedRun,
    bounded_plots,
    bounded_run,
    read_readings,
    reading_plots,
)
from osculate.analysis.monitors.readings import JsonLines
from torch import Tensor, nn

PAIRS = ("double", "powell-then-lm", "powell-h", "merged", "none")


def surface(generator: torch.Generator) -> Tensor:
    """400 points near a curved surface of dimension 3 in 16 dimensions."""
    code = torch.randn(400, 3, dtype=torch.float64, generator=generator)
    mixing = torch.randn(6, 16, dtype=torch.float64, generator=generator)
    noise = 0.05 * torch.randn(400, 16, dtype=torch.float64, generator=generator)
    return torch.tanh(torch.cat([code, code.square() - 1.0], 1) @ mixing / 6**0.5) + noise


def autoencoder(generator: torch.Generator) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((16, 10, 3, 10, 16)):
        linear = nn.Linear(fan_in, fan_out).double()
        with torch.no_grad():
            linear.weight.copy_(torch.randn(fan_out, fan_in, dtype=torch.float64, generator=generator) / fan_in**0.5)
            linear.bias.zero_()
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def trained(name: str, pairs: str, steps: int) -> BoundedRun:
    """The published methods without our guard."""
    generator = torch.Generator().manual_seed(0)
    data, model = surface(generator), autoencoder(generator)
    optimizer = osc.build(osc.registry.method(name, pairs=pairs, growth=math.inf), model, lr=0.1, damping=0.3)

    def train() -> float:
        batch = data[torch.randperm(len(data), generator=generator)[:50]]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = 0.5 * (model(batch) - batch).square().sum() / len(batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss is not None
        return float(loss)

    return bounded_run(optimizer, train, steps=steps)


@pytest.mark.parametrize("name", ["kbfgs", "kbfgs-l"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_every_bound_holds_while_an_autoencoder_is_trained(name: str, pairs: str) -> None:
    run = trained(name, pairs, 25)
    assert run.certificate.ok, run.certificate.summary()
    claims = {reading.inequality.name for reading in run.readings}
    assert claims >= {"lambda_max(H)", "lambda_min(H)", "lambda_max(E)", "lambda_min(E)"}
    assert ("lambda_min(H^-1 H+)" in claims) == (name == "kbfgs")
    assert run.certificate.steps == 25 and len(run.losses) == 25
    if pairs == "double":
        assert sum(run.losses[-5:]) < 0.8 * sum(run.losses[:5])


def test_double_damping_keeps_the_largest_eigenvalue_below_that_of_powells_stage_alone() -> None:
    def largest(pairs: str) -> float:
        readings = trained("kbfgs", pairs, 60).readings
        return max(entry.inequality.measured for entry in readings if entry.inequality.name == "lambda_max(H)")

    assert 3.0 * largest("double") < largest("powell-h")


def test_a_bound_that_is_too_small_is_found_out() -> None:
    """The same eigenvalues against a hundredth of the bound: the certificate says where and by how much."""
    run = trained("kbfgs", "double", 6)
    readings = [
        replace(entry, inequality=replace(entry.inequality, bound=0.01 * entry.inequality.bound))
        for entry in run.readings
        if entry.inequality.name == "lambda_max(H)"
    ]
    assert not any(entry.inequality.holds for entry in readings)
    (plot,) = reading_plots(readings)
    assert "VIOLATED at 6 steps" in plot.title


def test_the_figure_shows_every_damping_beside_its_bound() -> None:
    plots = bounded_plots({pairs: trained("kbfgs", pairs, 4) for pairs in ("double", "none")}, "kbfgs")
    assert [plot.y_label for plot in plots[:-1]] == [
        "lambda_max(H)",
        "lambda_min(H)",
        "lambda_min(H^-1 H+)",
        "lambda_max(E)",
        "lambda_min(E)",
    ]
    for plot in plots[:-1]:
        assert [curve.label for curve in plot.curves][:2] == ["double", "double, bound"]
        measured, bound = plot.curves[0].y, plot.curves[1].y
        above = plot.y_label.startswith("lambda_max")
        slack = [b - m if above else m - b for m, b in zip(measured, bound, strict=True)]
        assert len(slack) == 4 and min(slack) > -1e-9
    assert [len(curve.y) for curve in plots[-1].curves] == [4, 4]


def test_a_run_that_breaks_down_keeps_what_was_seen() -> None:
    model = autoencoder(torch.Generator().manual_seed(0))

    def train() -> float:
        raise osc.NumericalError("the loss is nan")

    run = bounded_run(osc.build("kbfgs", model, lr=0.1, damping=0.3), train, steps=3)
    assert run.trouble == "the loss is nan" and run.losses == [] and run.certificate.steps == 0
    assert json.loads(json.dumps(run.as_dict()))["curves"] == {}


def test_readings_survive_the_file(tmp_path: Path) -> None:
    readings = trained("kbfgs", "double", 2).readings
    sink = JsonLines(tmp_path / "monitors.jsonl")
    for reading in readings:
        sink.write(reading)
    sink.close()
    back = read_readings(tmp_path / "monitors.jsonl")
    assert [entry.as_dict()["measured"] for entry in back] == [entry.as_dict()["measured"] for entry in readings]
    plots = reading_plots(back)
    assert len(plots) == len({entry.inequality.name for entry in readings})
    for plot in plots:
        claim = plot.title.split(": ")[1].split("\n")[0]
        first = [entry.inequality for entry in readings if entry.step == 0 and entry.inequality.name == claim]
        closest = min(first, key=lambda entry: entry.margin)
        assert (plot.curves[0].y[0], plot.curves[1].y[0]) == (closest.measured, closest.bound)
    (tmp_path / "monitors.jsonl").write_text("{broken\n")
    with pytest.raises(osc.ArgumentError, match="after line 0"):
        read_readings(tmp_path / "monitors.jsonl")
