"""What a study costs is worked out from the first steps of every arm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs.config import Budget
from osculate.experiments.study.checking import checked
from osculate.experiments.study.estimate import Cost, estimate
from osculate.experiments.study.reading import read_study

STUDY = """
seeds = [1, 2]
[[problems]]
name = "curves-autoencoder"
options = { size = "small" }
[budget]
epochs = 3
[tuning]
trials = 2
epochs = 1
[arms.kbfgs]
method = "kbfgs"
space = { lr = { grid = [0.1, 0.3] } }
[arms.sgdm]
method = "sgdm"
[arms.diverging]
method = "sgdm"
lr = 1e9
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.toml"
    path.write_text(STUDY)
    return path


def test_the_cost_of_a_run_by_hand() -> None:
    cost = Cost(warm_start=2.0, step=0.5, evaluation=3.0, batches=4)
    assert cost.run(Budget(epochs=3)) == 2 + 3 * 4 * 0.5 + (1 + 3) * 3
    assert cost.run(Budget(epochs=3), evaluations=2) == 2 + 6 + (1 + 6) * 3
    assert cost.run(Budget(seconds=6.0)) == 6 + (1 + 2) * 3, "the warm start leaves four seconds, two epochs"
    assert cost.run(Budget(epochs=3, seconds=1.0)) == 1 + 3, "the warm start takes all of it"
    assert cost.run(Budget(epochs=1, seconds=99.0)) == cost.run(Budget(epochs=1))


def test_every_arm_is_timed_and_one_that_breaks_down_is_told(file: Path) -> None:
    found = {arm.label: cost for _, arm, cost in estimate(checked(read_study(file), None), None, 1)}
    assert list(found) == ["kbfgs", "sgdm", "diverging"]
    assert found["kbfgs"].warm_start > 0 == found["sgdm"].warm_start
    assert found["sgdm"].batches == 20 and 0 < found["sgdm"].step < math.inf and found["sgdm"].evaluation > 0
    assert math.isnan(found["diverging"].step)


def test_the_command_shows_it_and_runs_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert execute(["study", str(file), "--estimate"]) == 0
    said = capsys.readouterr().out
    assert "breaks down" in said and "about" in said and "with 1 worker(s)" in said
    assert not (tmp_path / "runs").exists()
