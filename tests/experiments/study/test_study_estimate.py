"""What a study costs is worked out from the first steps of every arm."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from osculate.experiments.commands.cli import execute
from osculate.experiments.runs.config import Budget
from osculate.experiments.study.checking import checked
from osculate.experiments.study.estimate import Cost, _kind, _mean_step, _slow_downs, estimate, study_seconds
from osculate.experiments.study.reading import read_study
from osculate.experiments.study.worker import Assignment, Place, perform, processors
from osculate.preconditioners.protocol import Schedule

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


def test_dear_first_steps_and_a_slow_machine_are_counted() -> None:
    cost = Cost(warm_start=1.0, step=0.5, evaluation=3.0, batches=4, setup=2.0, first=6.0, eager=8)
    whole = 1 + 6 + 12 * 0.5 + 2 + (1 + 3) * 3
    assert cost.run(Budget(epochs=3)) == whole
    assert cost.run(Budget(epochs=3), slow=2.0) == 2 * whole
    assert cost.run(Budget(epochs=1)) == 1 + 3 + 4 * 0.5 + 2 + 2 * 3, "only half of the dear steps are taken"
    slow = cost.run(Budget(epochs=3, seconds=14.0), slow=2.0)
    assert slow == 14 + 2 * (2 + 3), "seconds of training stay what they are; the dear steps take all of them"


def test_an_arm_that_broke_down_costs_what_it_did_until_then() -> None:
    cost = Cost(warm_start=1.0, step=math.nan, evaluation=3.0, batches=4, setup=2.0, broke=2, spent=0.5)
    assert cost.run(Budget(epochs=100)) == 2 + 3 + 1 + 0.5


def test_workers_share_the_runs_and_final_ones_wait_for_their_tuning(file: Path) -> None:
    study = checked(read_study(file), None)
    plain = {"warm_start": 0.0, "evaluation": 0.0, "batches": 1}
    costs = {arm.label: Cost(step=1.0, **plain) for arm in study.arms}
    costs["diverging"] = Cost(step=math.nan, broke=1, spent=0.25, **plain)
    known = {("curves-autoencoder", label): cost for label, cost in costs.items()}
    trials, finals = 2 * 1.0, 2 * 2 * 3.0
    assert study_seconds(study, known, 1, 1.0, "share") == trials + finals + 2 * 0.25
    # kbfgs 1, 1; sgdm 3, 3 beside its finals, which begin after 1; the diverging runs fill a gap.
    assert study_seconds(study, known, 2, 1.0, "share") == 7.25
    assert study_seconds(study, known, 100, 1.0, "share") == 1 + 3, "never less than tuning and final run of one arm"
    assert study_seconds(study, known, 1, 3.0, "share") == 3 * (trials + finals + 0.5)


def test_a_tuned_arm_is_timed_at_a_point_that_holds(tmp_path: Path) -> None:
    path = tmp_path / "partly.toml"
    path.write_text(STUDY.replace("grid = [0.1, 0.3]", "grid = [1e30, 0.1]"))
    study = checked(read_study(path), None)
    cost = next(cost for _, arm, cost in estimate(study, None, 1) if arm.label == "kbfgs")
    first = study.points(study.arms[0])[0]["lr"]
    assert cost.broke is None and cost.step > 0 and cost.lost == (first > 1)
    least, middle, most = (
        study_seconds(study, {("curves-autoencoder", arm.label): cost for arm in study.arms}, 1, 1.0, lost)
        for lost in ("most", "share", "few")
    )
    assert least <= middle <= most


def test_means_are_taken_over_a_whole_period_of_refreshes() -> None:
    schedules = [Schedule(statistics=1, inverses=5, eager=3)]
    means = {_kind(schedules, 4): 1.0, _kind(schedules, 5): 6.0}
    step, first, eager = _mean_step(schedules, means)
    assert (step, eager) == (2.0, 4) and first == 4 * (6.0 - 2.0)
    assert _mean_step([], {(): 0.5}) == (0.5, 0.0, 1)


def test_a_busy_machine_makes_a_range() -> None:
    alone, crowded = _slow_downs(busy=2.0, others=3.0, workers=1, threads=1)
    assert alone == 1.0 and crowded >= 2.0
    assert _slow_downs(busy=1.0, others=0.0, workers=1, threads=1) == (1.0, 1.0)
    many = 8 * processors()
    assert _slow_downs(busy=1.0, others=0.0, workers=many, threads=1) == (8.0, 8.0), "they share the processors"


def test_the_number_is_that_of_the_study_which_follows(tmp_path: Path) -> None:
    """In processor time, so that other work on the machine does not matter."""
    path = tmp_path / "short.toml"
    path.write_text(STUDY.replace("epochs = 3", "epochs = 5"))
    study = checked(read_study(path), None)
    costs = {(problem.label, arm.label): cost for problem, arm, cost in estimate(study, None, 1)}
    expected = study_seconds(study, costs, 1, 1.0, "share")
    place = Place(tmp_path / "out")
    ledger = place.ledger(study)
    ledger.publish()
    began = time.process_time()
    for slot in ledger.entries():
        point = study.points(study.arms[0])[slot.index % 2] if slot.arm == "kbfgs" else {}
        assert perform(Assignment(study, place, "one"), slot, point, "train_loss") is not None
    spent = time.process_time() - began
    assert spent / 2 < expected < 2 * spent, (expected, spent)
