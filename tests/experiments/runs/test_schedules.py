"""Learning rates that change over a run: the factors of torch's schedulers, resumed bit for bit."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from osculate.errors import ArgumentError
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.reopen import saved_config
from osculate.experiments.runs.schedules import Declining
from osculate.experiments.runs.training import EveryEpoch, measure, prepare


def rates(run: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        run.step()
        found.append(run.optimizer.param_groups[0]["lr"])
    return found


def test_factors_by_hand() -> None:
    ten = {kind: Declining(kind, 0.2, Budget(5), 2) for kind in ("cosine", "linear", "constant")}  # ten steps
    found = {kind: [schedule.factor(step, 0.0) for step in range(10)] for kind, schedule in ten.items()}
    assert found["constant"] == [0.5, *[1.0] * 9]
    assert found["linear"] == pytest.approx([0.5, 1.0, *[left / 8 for left in range(8, 0, -1)]])
    assert found["cosine"][2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert all(entry.factor(11, 0.0) == (kind == "constant") for kind, entry in ten.items())


def test_without_warm_up_the_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    schedule = Declining("cosine", 0.0, Budget(3), 4)
    for step in range(12):
        assert schedule.factor(step, 0.0) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_epochs_go_before_seconds_which_count_where_they_are_the_only_bound() -> None:
    assert Declining("linear", 0.0, Budget(2, 10.0), 2).factor(1, 9.0) == 0.75
    assert Declining("linear", 0.0, Budget(None, 10.0), 2).factor(99, 7.5) == 0.25
    assert Declining("linear", 0.5, Budget(None, 10.0), 2).factor(0, 0.0) == 0.02


@pytest.mark.parametrize("method", ["sgdm", "adamw", "kfac"])
def test_a_run_scales_its_own_rate(method: str, tiny: Any) -> None:
    config = RunConfig("tiny", method, lr=0.1, damping=0.5, lr_schedule="linear", lr_warm_up=0.25)
    run = prepare(config, tiny, tiny.load(None), Budget(2))
    assert rates(run, 8) == pytest.approx([0.05, 0.1, *[0.1 * left / 6 for left in range(6, 0, -1)]])
    still = prepare(config, tiny, tiny.load(None))
    assert rates(still, 3) == [0.1] * 3


def test_a_constant_factor_changes_no_number(tiny: Any) -> None:
    plain, scheduled = (
        [m.train_loss for m in measure(prepare(config, tiny, tiny.load(None), Budget(2)), Budget(2), EveryEpoch())]
        for config in (RunConfig("tiny", "kbfgs"), RunConfig("tiny", "kbfgs", lr_schedule="constant"))
    )
    assert plain == scheduled


def test_it_is_recorded_resumed_and_not_continued_over_another_length(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--problem", "tiny", "--method", "adamw", "--lr-schedule", "cosine", "--lr-warm-up", "0.1"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert execute([*words, "--epochs", "4", "--out", str(whole)]) == 0
    config = json.loads((whole / "config.json").read_text())
    assert (config["lr_schedule"], config["lr_warm_up"]) == ("cosine", 0.1)
    assert config["lr_over"] == {"epochs": 4, "seconds": None}
    assert saved_config(RunFolder(whole)).lr_schedule == "cosine"
    run = prepare(saved_config(RunFolder(whole)), tiny, tiny.load(None), Budget(4))
    list(zip(range(3), measure(run, Budget(4), EveryEpoch()), strict=False))
    state = copy.deepcopy(run.state_dict())
    after = prepare(saved_config(RunFolder(whole)), tiny, tiny.load(None), Budget(4))
    after.load_state_dict(state)
    end = list(measure(after, Budget(4), EveryEpoch()))[-1]
    assert end.iterations == 16 and end.train_loss == RunFolder(whole).read_metrics()[-1]["train_loss"]
    assert execute([*words, "--epochs", "2", "--out", str(halves)]) == 0
    assert execute([*words, "--epochs", "4", "--out", str(halves)]) == 2
    assert "lr_over" in capsys.readouterr().err


def test_runs_without_a_schedule_are_recorded_as_before(tiny: Any, tmp_path: Path) -> None:
    assert execute(["train", "--problem", "tiny", "--method", "sgdm", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert not {"lr_schedule", "lr_warm_up", "lr_over"} & json.loads((tmp_path / "config.json").read_text()).keys()


def test_one_method_of_a_race_may_have_one(tiny: Any, tmp_path: Path) -> None:
    words = ["compare", "--problem", "tiny", "--methods", "sgdm", "adamw", "--epochs", "2", "--out", str(tmp_path)]
    assert execute([*words, "--option", "sgdm.lr-schedule=cosine", "--option", "sgdm.lr-warm-up=0.1"]) == 0
    curves = json.loads((tmp_path / "comparison.json").read_text())["curves"]
    assert curves[0]["config"]["lr_schedule"] == "cosine" and "lr_schedule" not in curves[1]["config"]


STUDY = """
seeds = [1]
[[problems]]
name = "quadratic"
[budget]
epochs = 2
[tuning]
trials = 2
epochs = 1
[arms.sgdm]
method = "sgdm"
lr_schedule = "SCHEDULE"
space = { lr = { log = [1e-3, 1e-2] }, lr_warm_up = { grid = [0.0, 0.1] } }
"""


def test_an_arm_of_a_study_has_one_over_each_runs_own_length(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "out"
    file.write_text(STUDY.replace("SCHEDULE", "cosine"))
    assert execute(["study", str(file), "--out", str(out), "--workers", "1"]) == 0
    lengths = {path.parent.name: json.loads(path.read_text())["lr_over"]["epochs"] for path in out.rglob("config.json")}
    assert lengths == {"tune-0": 1, "tune-1": 1, "final-1": 2}
    file.write_text(STUDY.replace("SCHEDULE", "cosin"))
    assert execute(["study", str(file), "--out", str(tmp_path / "other"), "--workers", "1"]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"lr_warm_up": 1.0}, "share of the budget"),
        ({"lr_warm_up": "a"}, "share of the budget"),
    ],
)
def test_what_is_no_schedule_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        RunConfig("tiny", "sgdm", **given)
