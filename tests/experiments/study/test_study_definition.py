"""What a study is: its file, its spaces, what is refused before the first run, and the book of its runs."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
from osculate.errors import ArgumentError, UnknownNameError
from osculate.experiments.commands.cli import execute
from osculate.experiments.commands.study import scaled
from osculate.experiments.report.study_records import read_study as read_record
from osculate.experiments.rivals.catalogue import RIVALS
from osculate.experiments.runs.config import Budget
from osculate.experiments.runs.targets import exclusive
from osculate.experiments.study.checking import checked
from osculate.experiments.study.conductor import _Crew
from osculate.experiments.study.definition import Arm, Study, StudyProblem, Tuning
from osculate.experiments.study.folders import (
    NOT_FINISHED,
    describe_study,
    run_folder,
    settle,
    told,
    write_trial,
)
from osculate.experiments.study.ledger import FINAL, TUNE, Ledger, Slot, open_storage
from osculate.experiments.study.presence import clear, is_alive
from osculate.experiments.study.reading import find_study, read_study, shipped_studies
from osculate.experiments.study.spaces import Choice, Grid, LogUniform, Uniform, points
from osculate.experiments.study.worker import Assignment, Place, perform

HEAD = """seeds = [1, 2]
[[problems]]
name = "curves-autoencoder"
options = { size = "small" }
[budget]
epochs = 2
"""


def read(tmp_path: Path, text: str) -> Study:
    file = tmp_path / "some.toml"
    file.write_text(HEAD + text)
    return read_study(file)


def test_points_depend_on_the_seed_alone_and_more_trials_continue_them() -> None:
    space = {"lr": LogUniform(1e-3, 1.0), "damping": Uniform(0.0, 2.0), "pairs": Choice(("double", "none"))}
    eight = points(space, 8, seed=3)
    assert points(space, 5, seed=3) == eight[:5] and points(space, 8, seed=4) != eight
    assert all(1e-3 <= p["lr"] <= 1 and 0 <= p["damping"] <= 2 for p in eight)
    halves = [p["lr"] < 10**-1.5 for p in eight]
    assert sum(halves) == 4, "the first 8 points of a Sobol sequence fill both halves equally"
    assert {p["pairs"] for p in eight} == {"double", "none"}
    assert points(space, 4, "random", 1) == points(space, 4, "random", 1) != points(space, 4, "random", 2)


def test_a_space_of_grids_is_tried_whole_each_point_once() -> None:
    space = {"lr": Grid((0.1, 0.3, 1.0)), "pairs": Grid(("double", "none"))}
    found = points(space, 100)
    assert len(found) == 6 and len({tuple(sorted(p.items())) for p in found}) == 6
    assert points(space, 4) == found[:4] and points({}, 5) == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LogUniform(0.0, 1.0),
        lambda: Uniform(2, 1),
        lambda: Grid(()),
        lambda: Choice((1, 1)),
        lambda: LogUniform("a", 1.0),
    ],
)  # type: ignore[arg-type]
def test_ranges_are_checked(wrong: object) -> None:
    with pytest.raises(ArgumentError):
        wrong()  # type: ignore[operator]


def test_one_part_at_a_time_or_crossed_and_arms_that_extend(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        """
[base]
method = "kfac"
space = { lr = { grid = [0.1, 1.0] } }
[vary]
inverses_every = [1, 100]
[cross]
momentum = ["HeavyBall(0.9)", "NoMomentum"]
damping = ["Split", "Factored"]
[arms.joint]
extends = "first"
lr = 1.0
step_size = "RelativeBound(JointLayerwise)"
[arms.first]
method = "kfac"
eager = 3
space = { lr = { log = [0.1, 1.0] }, damping = { grid = [1.0, 3.0] } }
""",
    )
    arms = {arm.label: arm for arm in study.arms}
    assert len(arms) == 2 + 1 + 2 + 4 and study.base == "base"
    assert arms["inverses_every=100"].varied == ("inverses_every", "100")
    crossed = arms["momentum=NoMomentum,damping=Factored"].config(study.problems[0], {"lr": 0.1}, 7)
    assert (
        crossed.parts == {"momentum": "NoMomentum", "damping": "Factored"} and crossed.lr == 0.1 and crossed.seed == 7
    )
    assert arms["joint"].settings["eager"] == 3 and set(arms["joint"].space) == {"damping"}


@pytest.mark.parametrize("epochs", ["0", "true", "inf", "'two'", "-3"])
def test_epochs_of_a_study_are_a_whole_number_above_zero(tmp_path: Path, epochs: str) -> None:
    file = tmp_path / "some.toml"
    file.write_text(HEAD.replace("epochs = 2", f"epochs = {epochs}") + "[arms.a]\nmethod = 'sgdm'")
    with pytest.raises(ArgumentError, match=r"some\.toml.*epochs"):
        read_study(file)


def test_places_that_end_in_one_word_keep_their_whole_names_in_labels(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        """
[base]
method = "kfac"
[vary]
"inputs.average.decay" = [0.5]
"outputs.average.decay" = [0.5]
inverses_every = [1]
""",
    )
    assert [arm.label for arm in study.arms] == [
        "base",
        "inputs.average.decay=0.5",
        "outputs.average.decay=0.5",
        "inverses_every=1",
    ]


def test_tuning_runs_may_be_shorter_but_never_longer_than_final_ones(tmp_path: Path) -> None:
    arms = "[arms.a]\nmethod = 'sgdm'\nspace = { lr = { grid = [1e-3, 1e-2] } }\n"
    whole = read(tmp_path, arms)
    assert whole.tuning_budget(whole.problems[0]) == Budget(epochs=2) and whole.seconds is None
    shorter = read(tmp_path, "seconds = 10\n[tuning]\nepochs = 1\nseconds = 4\n" + arms)
    assert shorter.tuning_budget(shorter.problems[0]) == Budget(1, 4) and shorter.problem_budget(
        shorter.problems[0]
    ) == Budget(2, 10)
    assert shorter.seconds == 2 * 4 + 2 * 10
    longer = read(tmp_path, "[tuning]\nepochs = 9\n" + arms)
    assert longer.tuning_budget(longer.problems[0]) == Budget(2)
    definition = [study.definition(study.problems[0], study.arms[0]) for study in (whole, longer, shorter)]
    assert definition[0] == definition[1] != definition[2], "a budget that changes nothing continues the same book"
    for wrong in ("epochs = 0", "seconds = -1.0", "seconds = inf", "pruner = 'mean'"):
        with pytest.raises(ArgumentError, match="tuning"):
            read(tmp_path, f"[tuning]\n{wrong}\n" + arms)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[tuning]\ntrals = 3\n[arms.a]\nmethod = 'sgdm'",
            "line 7, tuning: unknown key of .tuning. 'trals'; did you mean 'trials'",
        ),
        (
            "[arms.a]\nmethod = 'sgdm'\nspace = { lr = { lg = [1, 2] } }",
            "line 9, arms.a.space.lr: unknown kind of range 'lg'",
        ),
        ("[arms.a]\nmethod = 'sgdm'\n\nspace = { lr = { log = [2, 1] } }", "line 10.*0 < low < high, got .2, 1."),
        ("[arms.a]\nlr = 3", "line 7, arms.a: arm 'a' needs a method"),
        ("[arms.a]\nextends = 'b'", "unknown arm 'b'"),
        ("[vary]\npairs = ['PowellH']", "line 7, vary: .vary. and .cross. change parts of a .base."),
        ("[arms.a", "cannot be read as TOML"),
        ("[arms.a]\nmethod = 3", "line 7, arms.a: arm 'a' needs a method, its name as text, got 3"),
        ("[arms.a]\nmethod = 'sgdm'\n[arms.A]\nmethod = 'sgdm'", "arms must differ, but 'A', 'a'"),
        ("[tuning]\npruner = 3\n[arms.a]\nmethod = 'sgdm'", "line 7, tuning: unknown pruner 3"),
        (
            "[tuning]\nseconds = 'x'\n[arms.a]\nmethod = 'sgdm'",
            "tuning: .*seconds must be positive and finite, got 'x'",
        ),
        ("[base]\nmethod = 'kbfgs'\n[vary]\npairs = []", "at least one thing"),
        ("[arms.a]\nmethod = 'sgdm'\nlr = 1\nspace = { lr = { grid = [1] } }", "both set and searched"),
    ],
)
def test_a_bad_file_is_told_by_line_and_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method = 'kbfg'", "some.toml, line 7: arm 'a'.*did you mean 'kbfgs'"),
        ("method = 'kfac'\ninverse_every = 3", "arm 'a'.*did you mean 'inverses_every'"),
        ("method = 'kbfgs'\npairs = 'PowelH'", "arm 'a'.*did you mean 'PowellH'"),
        ("method = 'kbfgs'\ndamping = 2.0", "arm 'a' on 'curves-autoencoder'.*damping"),
        (
            "method = 'kbfgs'\nspace = { damping = { grid = [0.3, 2.0] } }",
            "arm 'a' on 'curves-autoencoder': with .'damping': 2.0.: double damping needs",
        ),
        ("method = 'sgdm'\nlr = 'fast'", "lr must be a number, got 'fast'"),
    ],
)
def test_every_arm_is_built_before_the_first_run(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ArgumentError, match=f"(?s){says}"):
        checked(read(tmp_path, f"[arms.a]\n{text}"), None, load=False)


def test_metrics_that_a_problem_does_not_have_are_refused(tmp_path: Path) -> None:
    text = "[tuning]\nmetric = 'valid_loss'\n[arms.a]\nmethod = 'sgdm'"
    with pytest.raises(ArgumentError, match="it has no valid_loss; it has train_loss, test_loss"):
        checked(read(tmp_path, text), None)
    assert checked(read(tmp_path, "[arms.a]\nmethod = 'sgdm'"), None).tuned_by == {"curves-autoencoder": "train_loss"}


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_shipped_studies_are_sound(name: str) -> None:
    study = read_study(find_study(name))
    for arm in study.arms:
        rival = RIVALS.get(arm.method)
        if rival is not None and rival.installed is None:
            pytest.skip(f"{rival.distribution} is not installed")
    assert checked(study, None, load=False).runs == study.runs > 0


def test_unknown_studies_have_near_misses() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'joint_steps'"):
        find_study("joint_step")


def test_scaling_down_is_noted(tmp_path: Path) -> None:
    study = read(tmp_path, "[arms.a]\nmethod = 'sgdm'\nspace = { lr = { log = [0.1, 1] } }\n[arms.b]\nmethod = 'adam'")
    small = scaled(study, trials=2, epochs=1, seeds=(5,), arms=("a",))
    assert small.runs == 3 and len(small.notes) == 4 and "without arms b" in small.notes[-1]
    assert scaled(study).notes == ()
    with pytest.raises(UnknownNameError):
        scaled(study, arms=("c",))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    problem = StudyProblem("curves-autoencoder", "curves", {"size": "small"})
    arms = (Arm("tuned", "sgdm", space={"lr": Grid((0.1, 0.2, 0.3))}), Arm("fixed", "adam"))
    study = Study("some", arms, (problem,), (1, 2), Budget(1), Tuning(3))
    book = Ledger(open_storage(tmp_path, None), study, tmp_path / "workers")
    book.publish()
    return book


def test_a_run_is_granted_to_one_worker_and_entering_twice_does_no_harm(ledger: Ledger, tmp_path: Path) -> None:
    ledger.publish()
    other = Ledger(open_storage(tmp_path, None), ledger.study, ledger.presence)
    other.publish()
    study = ledger._ids["curves", "tuned", TUNE]
    ledger._enter(study, 0, {}, {}, 0)  # as if two had entered the run at the same time
    entries = ledger.entries()
    assert len(entries) == 3 + 2 + 2
    first = entries[Slot("curves", "tuned", TUNE, 0)]
    assert ledger.claim(first, "me") and not other.claim(first, "you")
    assert other.entries()[first.slot].owner == "me"


def test_runs_of_the_dead_are_given_back_and_crashes_end_as_a_miss(ledger: Ledger) -> None:
    slot = Slot("curves", "tuned", TUNE, 1)
    with exclusive(ledger.presence / "alive"):
        ledger.claim(ledger.entries()[slot], "alive")
        assert ledger.recover(ledger.entries()) == []
        ledger.give_back(ledger.entries()[slot])
    for crash in range(3):
        entry = ledger.entries()[slot]
        assert entry.state == "waiting" and entry.crashes == crash
        assert ledger.claim(entry, "dead")
        (ledger.presence / "dead").write_text("")
        assert ledger.recover(ledger.entries()) == [slot]
        assert not ledger.finish(entry, 1.0, "finished") or crash == 2, "a worker thought gone has lost its run"
    assert ledger.entries()[slot].state == "done" and ledger.entries()[slot].value is None


def test_final_runs_wait_for_the_tuning_and_take_its_best_point(ledger: Ledger) -> None:
    final = Slot("curves", "tuned", FINAL, 1)
    values = [5.0, None, 3.0]
    for number, value in enumerate(values):
        entries = ledger.entries()
        assert not ledger.ready(final, entries)
        entry = entries[Slot("curves", "tuned", TUNE, number)]
        ledger.claim(entry, "me")
        assert ledger.finish(entry, value, "finished")
    entries = ledger.entries()
    assert ledger.ready(final, entries)
    assert ledger.point(final, entries) == ledger.study.points(ledger.study.arms[0])[2]
    misses = {slot: dataclasses.replace(entry, value=None) for slot, entry in entries.items()}
    assert ledger.point(final, misses) is None
    assert ledger.point(Slot("curves", "fixed", FINAL, 1), entries) == {}


def test_another_definition_under_the_same_name_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    longer = dataclasses.replace(ledger.study, budget=Budget(2))
    with pytest.raises(ArgumentError, match="another definition"):
        Ledger(open_storage(tmp_path, None), longer, ledger.presence).publish()
    more = dataclasses.replace(ledger.study, seeds=(1, 2, 3))
    book = Ledger(open_storage(tmp_path, None), more, ledger.presence)
    book.publish()
    assert len(book.entries()) == 3 + 3 + 3


def test_presence_ends_with_its_holder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "w" / "me"):
        assert is_alive(tmp_path / "w", "me", None)
    assert not is_alive(tmp_path / "w", "me", None)
    assert is_alive(tmp_path / "w", "far", time.time()) and not is_alive(tmp_path / "w", "far", time.time() - 1e4)
    (tmp_path / "w" / "dead").mkdir()
    assert not is_alive(tmp_path / "w", "dead", time.time())
    clear(tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_an_arm_with_misses_only_leaves_its_final_runs_as_misses(ledger: Ledger, tmp_path: Path) -> None:
    told = Assignment(ledger.study, Place(tmp_path), str(os.getpid()))
    slot = Slot("curves", "tuned", FINAL, 2)
    assert perform(told, slot, None, "train_loss") == ("every tuning run of this arm was a miss", None)
    assert (tmp_path / "runs" / slot.folder / "trial.json").exists()


class Process:
    """A worker process that only notes what is done to it."""

    exitcode = -9

    def __init__(self) -> None:
        self.done: list[str] = []

    def kill(self) -> None:
        self.done.append("killed")

    def join(self) -> None:
        self.done.append("joined")


def test_runs_over_the_limit_are_misses_of_the_report_even_without_a_folder(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their workers' ends are no deaths of which too many would end the study."""
    crew = _Crew(ledger.study, Place(tmp_path))
    started: list[bool] = []
    monkeypatch.setattr(_Crew, "start", lambda self: started.append(True))
    late = [Slot("curves", "fixed", FINAL, 1), *(Slot("curves", "tuned", TUNE, number) for number in range(3))]
    for slot in late:
        ledger.claim(ledger.entries()[slot], "me")
        process = crew.processes["me"] = Process()  # type: ignore[assignment]
        assert crew.enforce(3600.0, ledger.entries(), ledger) == []
        assert crew.enforce(-1.0, ledger.entries(), ledger) == [slot]
        assert process.done == ["killed", "joined"] and not crew.processes
    assert len(started) == len(late) and crew.deaths == 0
    runs = read_record(tmp_path).runs.set_index("run")
    assert set(runs.state) == {"missed"} and set(runs.reason) == {"over the limit of -1 s"}
    assert runs.loc["runs/curves/fixed/final-1", "seed"] == 1
    assert runs.loc["runs/curves/tuned/tune-2", "settings"] == ledger.study.points(ledger.study.arms[0])[2]


def test_a_run_whose_process_died_too_often_is_a_miss_of_the_report(ledger: Ledger, tmp_path: Path) -> None:
    slot, other = Slot("curves", "fixed", FINAL, 2), Slot("curves", "fixed", FINAL, 1)
    for run in (slot, other):
        write_trial(run_folder(tmp_path, run), run, run.index, {}, None, NOT_FINISHED)
    ledger.presence.mkdir()
    (ledger.presence / "dead").write_text("")
    for _ in range(3):
        ledger.claim(ledger.entries()[slot], "dead")
        assert ledger.recover(ledger.entries()) == [slot]
    assert settle(tmp_path, ledger) == [slot] and settle(tmp_path, ledger) == []
    runs = read_record(tmp_path).runs.set_index("seed")
    assert runs.state.to_dict() == {1: "unfinished", 2: "missed"}
    assert runs.reason[2] == "its process died 3 times"


def test_a_study_killed_again_and_again_loses_no_run(ledger: Ledger) -> None:
    slot = Slot("curves", "fixed", FINAL, 1)
    for _ in range(5):
        assert ledger.claim(ledger.entries()[slot], "dead")
        ledger.presence.mkdir(exist_ok=True)
        (ledger.presence / "dead").write_text("")
        assert ledger.recover(ledger.entries(), blamed=False) == [slot]
    assert ledger.entries()[slot].state == "waiting" and ledger.entries()[slot].crashes == 0


def test_shipped_studies_are_listed_and_a_missing_name_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["study", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in shipped_studies())
    assert execute(["study"]) == 2 and "--list" in capsys.readouterr().err


def test_a_dry_run_says_how_long_at_most_or_that_nothing_bounds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["study", "smoke", "--dry-run", "--workers", "2"]) == 0
    assert "30 runs, at most 0.25 h of training with 2 worker(s)" in capsys.readouterr().out
    file = tmp_path / "unbounded.toml"
    file.write_text(HEAD + '[arms.a]\nmethod = "sgdm"\n')
    assert execute(["study", str(file), "--dry-run"]) == 0
    assert "2 runs, no bound on their time: seconds in [budget] would be one" in capsys.readouterr().out


ON = """
[arms.a]
method = "sgdm"
weight_decay = 1e-5
space = { lr = { grid = [0.01, 0.1, 1.0] }, damping = { grid = [0.1, 0.2] } }
on.short = { lr = 0.3, damping = 0.5 }
[arms.a.on.other]
weight_decay = 0.0
space = { lr = { grid = [3.0, 10.0] } }
[arms.b]
extends = "a"
momentum = 0.5
[arms.c]
method = "adam"
"""


def _several(tmp_path: Path) -> Study:
    labels = "".join(
        f'[[problems]]\nname = "curves-autoencoder"\nlabel = "{label}"\noptions = {{ size = "small" }}\n{more}\n'
        for label, more in (("usual", ""), ("short", "seeds = [4]"), ("other", "seeds = [1, 2, 3]"))
    )
    file = tmp_path / "some.toml"
    file.write_text(f"seeds = [1, 2]\n{labels}[budget]\nepochs = 1\n[tuning]\ntrials = 9\n{ON}")
    return read_study(file)


def test_an_arm_has_other_settings_and_spaces_on_some_problems(tmp_path: Path) -> None:
    study = checked(_several(tmp_path), None, load=False)
    a, b, c = study.arms
    tried = {label: [study.points(arm.at(label)) for arm in (a, b, c)] for label in ("usual", "short", "other")}
    assert [len(found) for found in tried["usual"]] == [6, 6, 0]
    assert tried["short"] == [[], [], []], "what is set on a problem is not searched there"
    assert [sorted(point["lr"] for point in found) for found in tried["other"]] == [[3.0, 10.0], [3.0, 10.0], []]
    configs = [b.at(problem.label).config(problem, {}, 7) for problem in study.problems]
    assert [config.lr for config in configs] == [None, 0.3, None]
    assert [config.weight_decay for config in configs] == [1e-5, 1e-5, 0.0]
    assert all(config.method_options == {"momentum": 0.5} for config in configs)
    assert study.runs == 2 * (6 + 0 + 2) + 3 * (2 + 1 + 3)


def test_the_book_has_the_runs_of_each_problem_and_study_json_says_which(tmp_path: Path) -> None:
    study = checked(_several(tmp_path), None, load=False)
    ledger = Ledger(open_storage(tmp_path / "out", None), study, tmp_path / "workers")
    ledger.publish()
    entries = ledger.entries()
    assert len(entries) == study.runs
    finals = {(slot.problem, slot.index) for slot in entries if slot.phase == FINAL}
    assert finals == {("usual", 1), ("usual", 2), ("short", 4), ("other", 1), ("other", 2), ("other", 3)}
    assert ledger.point(Slot("short", "a", FINAL, 4), entries) == {}
    assert told(study, Slot("short", "a", FINAL, 4), {})[1] == {"weight_decay": 1e-5, "lr": 0.3, "damping": 0.5}
    described = describe_study(study, ledger)
    assert [problem["seeds"] for problem in described["problems"]] == [[1, 2], [4], [1, 2, 3]]
    assert {label: there["trials"] for label, there in described["arms"]["a"]["on"].items()} == {"short": 0, "other": 2}
    assert "on" not in described["arms"]["c"] and "on 1 or 2 or 3 other seeds" in described["protocol"]


def test_one_arm_more_joins_the_book_of_a_study(tmp_path: Path) -> None:
    study = _several(tmp_path)
    storage = open_storage(tmp_path / "out", None)
    Ledger(storage, dataclasses.replace(study, arms=study.arms[:2]), tmp_path / "workers").publish()
    Ledger(storage, scaled(study, arms=("c",)), tmp_path / "workers").publish()
    whole = Ledger(storage, study, tmp_path / "workers")
    whole.publish()
    assert len(whole.entries()) == study.runs


def test_a_study_scaled_down_to_some_problems_keeps_what_arms_have_there(tmp_path: Path) -> None:
    study = scaled(_several(tmp_path), problems=("short",))
    assert study.runs == 3 and study.arms[0].at("short").settings["lr"] == 0.3
    assert scaled(_several(tmp_path), seeds=(8, 9), problems=("short",)).runs == 6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[arms.a]\nmethod = 'sgdm'\non.nowhere = { lr = 0.1 }", "nowhere"),
        ("[arms.a]\nmethod = 'sgdm'\non.curves-autoencoder = { method = 'adam' }", "one method on all problems"),
        ("[arms.a]\nmethod = 'sgdm'\non.curves-autoencoder = 3", "must be a table"),
    ],
)
def test_what_an_arm_cannot_have_on_a_problem_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ArgumentError, match=rf"(?s)some\.toml.*{says}"):
        read(tmp_path, text)


def test_the_tuning_seed_is_no_final_seed_of_any_problem_with_a_tuned_arm(tmp_path: Path) -> None:
    study = _several(tmp_path)
    with pytest.raises(ArgumentError, match="seed 3 is the tuning seed"):
        dataclasses.replace(study, tuning=Tuning(seed=3))
    dataclasses.replace(study, tuning=Tuning(seed=4), problems=study.problems[1:2])


def test_workers_take_no_more_threads_than_they_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("osculate.experiments.study.worker.processors", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Place(tmp_path, workers=2).threads == 4 and Place(tmp_path, workers=20).threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Place(tmp_path, workers=2).threads == 3 and Place(tmp_path, workers=4).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert Place(tmp_path, workers=2).threads == 4


@pytest.mark.parametrize("seeds", ["[1, 1]", "[1, 2, 1, 2]"])
def test_seeds_that_come_twice_are_told_without_a_word_on_letters(tmp_path: Path, seeds: str) -> None:
    file = tmp_path / "twice.toml"
    file.write_text(HEAD.replace("seeds = [1, 2]", f"seeds = {seeds}") + '[arms.a]\nmethod = "sgdm"\n')
    with pytest.raises(ArgumentError, match=r"seeds must differ, but 1.* comes twice") as refused:
        read_study(file)
    assert "letters" not in str(refused.value)


def test_arms_that_differ_by_capital_letters_alone_are_told_why(tmp_path: Path) -> None:
    file = tmp_path / "twice.toml"
    file.write_text(HEAD + '[arms.a]\nmethod = "sgdm"\n[arms.A]\nmethod = "sgdm"\n')
    with pytest.raises(ArgumentError, match=r"'A', 'a' comes twice .capital or small letters alone are no difference"):
        read_study(file)


def test_a_dry_run_counts_by_problem_and_says_by_what_arms_are_tuned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = '[[problems]]\nname = "curves-autoencoder"\nlabel = "other"\noptions = { size = "small" }\n'
    file = tmp_path / "two.toml"
    tuned = '[tuning]\ntrials = 3\n[arms.a]\nmethod = "sgdm"\nspace = { lr = { log = [0.01, 1.0] } }\n'
    file.write_text(HEAD + second + tuned)
    assert execute(["study", str(file), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 x 2 problems" in said and "2 x 2 problems" in said and "10 runs" in said
    assert "by the validation loss where a problem holds samples back, else the training loss" in said
