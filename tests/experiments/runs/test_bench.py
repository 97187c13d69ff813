"""The benchmark: what it counts, and that every contestant can be built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from osculate.errors import ArgumentError
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs import bench
from osculate.experiments.runs.bench import CONTESTANTS, Contestant, benchmark, random_data, tensor_bytes


def test_bytes_of_nested_tensors_count_each_once() -> None:
    tensor = torch.zeros(10, dtype=torch.float64)
    assert tensor_bytes({"a": [tensor, tensor], "b": (torch.zeros(3), 5)}) == 92


def test_ratios_and_state(tiny: Any) -> None:
    chosen = (Contestant("SGD again", "torch-sgd"), Contestant("kbfgs", "kbfgs", period=2, target=1.0))
    again, kbfgs = benchmark(chosen, tiny, tiny.load(None), rounds=3, batch_size=16)
    weights = sum(p.numel() for p in tiny.build_model(0).parameters())
    assert again.state_bytes == 4 * weights
    assert again.table_bytes is None
    assert kbfgs.ratio == kbfgs.compared > again.ratio
    assert kbfgs.spread[0] <= kbfgs.ratio <= kbfgs.spread[1]


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.label)
def test_every_contestant_can_be_built(tiny: Any, contestant: Contestant) -> None:
    (timing,) = benchmark((contestant,), tiny, tiny.load(None), rounds=1, batch_size=16)
    assert timing.ratio > 0
    if timing.table_bytes is not None:
        assert timing.state_bytes <= 1.1 * timing.table_bytes + 4096


def test_a_target_may_refer_to_another_contestant(tiny: Any) -> None:
    chosen = tuple(one for one in CONTESTANTS if one.label in ("torch Adam", "adam"))
    torch_adam, adam = benchmark(chosen, tiny, tiny.load(None), rounds=1, batch_size=16)
    assert adam.compared == pytest.approx(adam.ratio / torch_adam.ratio)


def test_random_data_only_for_autoencoders(tiny: Any) -> None:
    with pytest.raises(ArgumentError, match="give --data-dir"):
        random_data(tiny)
    tiny.classes = None
    data = random_data(tiny, samples=7)
    assert data.train_inputs.shape == (7, 5)
    assert data.train_targets is data.train_inputs


def test_command_prints_and_writes(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(bench, "random_data", lambda problem: tiny.load(None))
    words = ["bench", "--rounds", "1", "--threads", "1", "--batch-size", "16", "--only", "SGD again", "adam"]
    assert execute([*words, "--out", str(tmp_path / "bench.json")]) == 0
    assert "SGD again" in capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["label"] for row in written["rows"]] == ["SGD again", "adam"]


def test_rounds_must_be_positive(tiny: Any) -> None:
    with pytest.raises(ArgumentError, match="rounds must be >= 1, got 0"):
        benchmark(CONTESTANTS, tiny, tiny.load(None), rounds=0, batch_size=16)
