"""What a problem decides about a run: its own numbers for a method, what decays, what its test samples are called."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from osculate.experiments.problems import get_problem
from osculate.experiments.runs.batches import data_checksum, move_data
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.runs import Resume, run_in_folder
from osculate.experiments.runs.training import prepare
from rich.console import Console

SETTINGS = {"adamw": {"lr": 0.05, "weight_decay": 0.25, "epsilon": 1e-3}, "sgdm": {"lr": 7.0}}


def trained(config: RunConfig, path: Path) -> tuple[dict, str]:
    console = Console(file=StringIO(), width=200)
    run_in_folder(config, Budget(1), RunFolder(path), None, Resume.AUTO, console)
    return json.loads((path / "config.json").read_text()), console.file.getvalue()


def test_numbers_left_open_are_the_problems_own(tiny, tmp_path):
    tiny.settings = SETTINGS
    config, _ = trained(RunConfig("tiny", "adamw"), tmp_path / "open")
    assert (config["lr"], config["weight_decay"], config["method_options"]["epsilon"]) == (0.05, 0.25, 1e-3)
    asked = RunConfig("tiny", "adamw", lr=0.01, method_options={"epsilon": 1e-4})
    config, _ = trained(asked, tmp_path / "asked")
    assert (config["lr"], config["weight_decay"], config["method_options"]["epsilon"]) == (0.01, 0.25, 1e-4)
    config, _ = trained(RunConfig("tiny", "adam"), tmp_path / "other")
    assert config["lr"] == 3e-3


def test_a_run_with_the_problems_numbers_continues(tiny, tmp_path):
    tiny.settings = SETTINGS
    trained(RunConfig("tiny", "adamw"), tmp_path)
    assert "continuing" in trained(RunConfig("tiny", "adamw"), tmp_path)[1]


def test_weight_decay_leaves_the_second_convolution_alone():
    problem = get_problem("cora-gcn", size="small")
    run = prepare(RunConfig("cora-gcn", "sgdm", lr=0.0, weight_decay=0.1), problem, problem.load(None))
    squared = run.model.first.weight.detach().square().sum()
    assert float(run.optimizer.penalty()) == pytest.approx(0.05 * float(squared))
    assert "second.weight" in dict(run.model.named_parameters())


def test_other_test_samples_are_called_by_their_name(tiny, tmp_path, monkeypatch):
    loaded = tiny.load(None)
    monkeypatch.setattr(tiny, "load", lambda data_dir: replace(loaded, test_set="first 20 points"))
    config, text = trained(RunConfig("tiny", "adam"), tmp_path / "named")
    assert config["test_set"] == "first 20 points"
    assert "those of the first 20 points" in text
    monkeypatch.undo()


def test_the_checksum_knows_the_graph():
    data = get_problem("cora-gcn", size="small").load(None)
    changed = replace(data, context=(*data.context[:-1], data.context[-1] * 2))
    assert data_checksum(data) != data_checksum(changed)
    assert data_checksum(data) == data_checksum(move_data(data, torch.device("cpu")))


def test_what_is_shared_stays_shared_on_the_device():
    data = get_problem("curves-autoencoder", size="small").load(None)
    moved = move_data(data, torch.device("meta"))
    assert moved.train_targets is moved.train_inputs and moved.test_targets is moved.test_inputs
    assert moved.valid_inputs is None
