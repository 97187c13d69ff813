"""The training loop and the folder a run writes."""

import json
import signal
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from osculate.errors import ArgumentError, NumericalError
from osculate.experiments.runs import training_run
from osculate.experiments.runs.batches import BatchOrder
from osculate.experiments.runs.config import Budget, RunConfig, WarmStart, differences, parse_options
from osculate.experiments.runs.progress import Display
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.runs import Resume, RunResult, run_in_folder
from osculate.experiments.runs.training import BoundedShare, EveryEpoch, measure, prepare
from osculate.experiments.runs.training_run import Stopwatch
from rich.console import Console

NOT_REPEATED = {"seconds", "warm_start_seconds", "peak_memory_bytes"}


def run(config: RunConfig, epochs: int, path: Path, resume: Resume = Resume.AUTO) -> RunResult:
    return run_in_folder(config, Budget(epochs), RunFolder(path), None, resume, Console(file=StringIO()))


def repeatable(path: Path) -> list[dict[str, Any]]:
    lines = RunFolder(path).read_metrics()
    return [{name: value for name, value in line.items() if name not in NOT_REPEATED} for line in lines]


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {key: item for name, value in state.items() for key, item in flat(value, f"{prefix}/{name}").items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)), prefix)
    return {prefix: state}


def assert_same_checkpoint(first: Path, second: Path) -> None:
    one, two = (flat(RunFolder(path).load_checkpoint(torch.device("cpu"))) for path in (first, second))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.strip("/") not in NOT_REPEATED:
            same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
            assert same, f"{name}: {value} and {two[name]}"


class TestBatchOrder:
    def test_each_epoch_is_a_new_permutation_without_the_last_partial_batch(self) -> None:
        order = BatchOrder(samples=10, batch_size=3, seed=0)
        epochs = [torch.cat([order.next() for _ in range(3)]) for _ in range(2)]
        assert [len(set(epoch.tolist())) for epoch in epochs] == [9, 9]
        assert epochs[0].tolist() != epochs[1].tolist()

    def test_depends_on_the_seed_alone(self) -> None:
        first = BatchOrder(50, 10, seed=1)
        torch.manual_seed(77)
        again, other = BatchOrder(50, 10, seed=1), BatchOrder(50, 10, seed=2)
        before = torch.get_rng_state()
        expected = first.next()
        assert torch.equal(again.next(), expected)
        assert not torch.equal(other.next(), expected)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("taken", [0, 2, 3, 4])
    def test_continues_from_any_batch(self, taken: int) -> None:
        order = BatchOrder(10, 3, seed=0)
        for _ in range(taken):
            order.next()
        other = BatchOrder(10, 3, seed=5)
        other.load_state_dict(order.state_dict())
        assert [order.next().tolist() for _ in range(7)] == [other.next().tolist() for _ in range(7)]

    def test_refuses_a_batch_larger_than_the_data(self) -> None:
        with pytest.raises(ArgumentError, match="at most the 10 training samples, got 11"):
            BatchOrder(10, 11, seed=0)


@pytest.mark.usefixtures("tiny")
class TestRunFolder:
    def test_holds_everything(self, tmp_path: Path) -> None:
        result = run(RunConfig("tiny", "adam"), 2, tmp_path)
        lines = RunFolder(tmp_path).read_metrics()
        assert result.status == "finished"
        assert [line["epoch"] for line in lines] == [0, 1, 2]
        assert [line["iterations"] for line in lines] == [0, 4, 8]
        expected = {"train_loss", "test_loss", "test_accuracy", "seconds", "gradient_evaluations", "peak_memory_bytes"}
        assert all(expected <= line.keys() for line in lines)
        assert lines[2]["train_loss"] < lines[0]["train_loss"]
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["method"] == "adam"
        assert config["batch_size"] == 16
        assert config["lr"] > 0
        assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"

    def test_says_nothing_about_where_it_ran(self, tmp_path: Path) -> None:
        run(RunConfig("tiny", "adam"), 1, tmp_path)
        for name in ("environment.json", "config.json"):
            text = (tmp_path / name).read_text()
            assert str(Path.cwd()) not in text
            assert str(Path.home()) + "/" not in text

    @pytest.mark.parametrize("method", ["adam", "kbfgs", "kbfgs-l", "kfac", "mbf", "lw-sgdm", "joint-kfac"])
    def test_two_epochs_and_two_more_are_four(self, tmp_path: Path, method: str) -> None:
        config = RunConfig("tiny", method, seed=4)
        run(config, 2, tmp_path / "parts")
        run(config, 4, tmp_path / "parts")
        run(config, 4, tmp_path / "whole")
        assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")
        assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole")

    def test_ctrl_c_within_an_epoch_loses_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = RunConfig("tiny", "kbfgs")
        run(config, 3, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(Display, "step", lambda self, run: run.iterations == 6 and signal.raise_signal(signal.SIGINT))
            stopped = run(config, 3, tmp_path / "parts")
        assert stopped.status == "interrupted"
        assert RunFolder(tmp_path / "parts").read_metrics()[-1]["epoch"] == 1.5
        assert run(config, 3, tmp_path / "parts").status == "finished"
        assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole")

    def test_another_configuration_is_refused_with_what_differs(self, tmp_path: Path) -> None:
        run(RunConfig("tiny", "adam", lr=0.01), 1, tmp_path)
        with pytest.raises(ArgumentError, match=r"(?s)lr: saved 0\.01, asked for 0\.1\n.*seed: saved 0, asked for 1"):
            run(RunConfig("tiny", "adam", lr=0.1, seed=1), 2, tmp_path)
        assert run(RunConfig("tiny", "adam", lr=0.1, seed=1), 2, tmp_path, Resume.NEVER).status == "finished"

    def test_other_data_are_refused(self, tmp_path: Path, tiny: Any) -> None:
        run(RunConfig("tiny", "adam"), 1, tmp_path)
        tiny.samples = 69
        with pytest.raises(ArgumentError, match=r"(?s)data_checksum.*training_samples: saved 70, asked for 69"):
            run(RunConfig("tiny", "adam"), 2, tmp_path)

    def test_lines_after_the_checkpoint_are_written_again(self, tmp_path: Path) -> None:
        config = RunConfig("tiny", "sgdm")
        run(config, 1, tmp_path)
        checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
        run(config, 2, tmp_path)
        expected = repeatable(tmp_path)
        (tmp_path / "checkpoint.pt").write_bytes(checkpoint)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 3, "tra')
        run(config, 2, tmp_path)
        assert repeatable(tmp_path) == expected

    def test_a_damaged_checkpoint_is_named(self, tmp_path: Path) -> None:
        run(RunConfig("tiny", "sgdm"), 1, tmp_path)
        (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
        with pytest.raises(ArgumentError, match=r"checkpoint\.pt cannot be read.*--resume never"):
            run(RunConfig("tiny", "sgdm"), 2, tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"iterations": 0}\n{"iterations": \n', "after line 1"),
            (b"{}\n", "after line 0"),
            (b"[]\n", "after line 0"),
            (b"\xff\xfe\n", "UnicodeDecodeError"),
        ],
    )
    def test_damaged_metrics_are_named(self, tmp_path: Path, content: bytes, message: str) -> None:
        run(RunConfig("tiny", "sgdm"), 1, tmp_path)
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with pytest.raises(ArgumentError, match=rf"metrics\.jsonl cannot be read.*{message}.*--resume never"):
            run(RunConfig("tiny", "sgdm"), 2, tmp_path)

    @pytest.mark.parametrize("missing", ["model", "optimizer", "order", "random_state", "iterations", None])
    def test_a_checkpoint_of_something_else_is_refused(self, tmp_path: Path, missing: str | None) -> None:
        run(RunConfig("tiny", "sgdm"), 1, tmp_path)
        state: Any = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        if missing is None:
            state = [1]
        else:
            del state[missing]
        torch.save(state, tmp_path / "checkpoint.pt")
        with pytest.raises(
            ArgumentError, match=r"checkpoint\.pt (does not hold the state|holds no state).*--resume never"
        ):
            run(RunConfig("tiny", "sgdm"), 2, tmp_path)

    def test_an_error_of_another_kind_does_not_leave_the_run_running(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: Display, run: Any) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(Display, "step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(RunConfig("tiny", "sgdm"), 1, tmp_path)
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["status"], status["reason"]) == ("broken down", "RuntimeError: out of memory")

    def test_a_second_ctrl_c_stops_at_once_and_the_run_can_continue(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = RunConfig("tiny", "kbfgs")
        run(config, 3, tmp_path / "whole")

        def twice(self: Display, run: Any) -> None:
            if run.iterations == 6:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Display, "step", twice)
            assert run(config, 3, tmp_path / "parts").status == "interrupted"
        assert json.loads((tmp_path / "parts" / "status.json").read_text())["status"] == "interrupted"
        assert run(config, 3, tmp_path / "parts").status == "finished"
        assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole")

    def test_nothing_to_continue(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="no checkpoint to continue"):
            run(RunConfig("tiny", "sgdm"), 2, tmp_path, Resume.REQUIRE)

    def test_a_breakdown_is_recorded(self, tmp_path: Path, tiny: Any) -> None:
        tiny.break_after = 6
        result = run(RunConfig("tiny", "sgdm"), 3, tmp_path)
        status = json.loads((tmp_path / "status.json").read_text())
        assert result.status == status["status"] == "broken down"
        assert status["reason"] == result.reason != ""
        assert [line["epoch"] for line in RunFolder(tmp_path).read_metrics()] == [0, 1]


@pytest.mark.usefixtures("tiny")
class TestRunsWithoutAStep:
    def test_time_that_is_over_in_the_warm_start_is_not_finished(self, tmp_path: Path) -> None:
        console = Console(file=StringIO())
        config = RunConfig("tiny", "kbfgs")
        result = run_in_folder(config, Budget(2, 1e-9), RunFolder(tmp_path), None, Resume.AUTO, console)
        status = json.loads((tmp_path / "status.json").read_text())
        assert result.status == status["status"] == "no step taken"
        assert "after 0 of 4 mini-batches of the warm start" in status["reason"]
        assert "--warm-start none" in status["reason"]
        assert not (tmp_path / "checkpoint.pt").exists()
        assert run(config, 2, tmp_path).status == "finished"
        assert repeatable(tmp_path)[-1]["iterations"] == 8

    def test_without_a_warm_start_one_step_is_taken(self, tmp_path: Path) -> None:
        config = RunConfig("tiny", "kbfgs", warm_start=WarmStart.NONE)
        budget = Budget(2, 1e-9)
        result = run_in_folder(config, budget, RunFolder(tmp_path), None, Resume.AUTO, Console(file=StringIO()))
        assert (result.status, (result.metrics or {})["iterations"]) == ("finished", 1)

    def test_no_step_may_be_asked_for(self, tmp_path: Path) -> None:
        assert run(RunConfig("tiny", "kbfgs"), 0, tmp_path).status == "finished"

    def test_ctrl_c_in_the_warm_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
        config = RunConfig("tiny", "kbfgs")
        run(config, 1, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(Display, "begin", lambda self, name: signal.raise_signal(signal.SIGINT))
            assert run(config, 1, tmp_path / "parts").status == "interrupted"
        assert RunFolder(tmp_path / "parts").read_metrics() == []
        assert run(config, 1, tmp_path / "parts").status == "finished"
        assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole")


class TestMeasure:
    def test_training_loss_holds_the_weight_penalty(self, tiny: Any) -> None:
        plain, decayed = (
            next(
                measure(
                    prepare(RunConfig("tiny", "sgdm", weight_decay=decay), tiny, tiny.load(None)),
                    Budget(1),
                    EveryEpoch(),
                )
            )
            for decay in (0.0, 0.1)
        )
        squares = sum(float(p.detach().square().sum()) for p in tiny.build_model(0).parameters())
        assert plain.penalty == 0
        assert decayed.train_loss - plain.train_loss == pytest.approx(0.05 * squares, rel=1e-5)
        assert decayed.test_loss == plain.test_loss

    def test_evaluation_leaves_mode_and_random_state(self, tiny: Any) -> None:
        run = prepare(RunConfig("tiny", "sgdm"), tiny, tiny.load(None))
        before = torch.get_rng_state()
        assert run.evaluate().train_loss == run.evaluate().train_loss
        assert all(module.training for module in run.model.modules())
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_method_does_not_change_the_order_of_the_data(self, tiny: Any) -> None:
        orders = []
        for method in ("adam", "kbfgs"):
            run = prepare(RunConfig("tiny", method), tiny, tiny.load(None))
            list(measure(run, Budget(2), EveryEpoch()))
            orders.append(run.order.next())
        assert torch.equal(*orders)

    def test_warm_start_counts_and_can_be_left_out(self, tiny: Any) -> None:
        configs = [RunConfig("tiny", "kbfgs", warm_start=choice) for choice in (WarmStart.AUTO, WarmStart.NONE)]
        runs = [prepare(config, tiny, tiny.load(None)) for config in configs]
        warm, cold = (list(measure(run, Budget(1), EveryEpoch())) for run in runs)
        assert warm[0].seconds == warm[0].warm_start_seconds > 0
        assert cold[0].seconds == cold[0].warm_start_seconds == 0
        assert warm[0].train_loss == cold[0].train_loss
        assert warm[1].train_loss != cold[1].train_loss

    def test_seconds_bound_the_warm_start_too(self, tiny: Any) -> None:
        class Late(Stopwatch):
            """Ten seconds are over after the third question for the time."""

            questions = 0

            @property
            def seconds(self) -> float:
                self.questions += 1
                return 10.0 if self.questions > 3 else 0.0

        run = prepare(RunConfig("tiny", "kbfgs"), tiny, tiny.load(None))
        run.clock = Late(run.device)
        lines = list(measure(run, Budget(epochs=2, seconds=10), EveryEpoch()))
        assert 0 < run.warm_start_batches < run.order.batches_per_epoch
        assert [line.iterations for line in lines] == [0]
        assert lines[0].seconds == lines[0].warm_start_seconds == 10

    def test_ctrl_c_ends_the_warm_start(self, tiny: Any) -> None:
        run = prepare(RunConfig("tiny", "kbfgs"), tiny, tiny.load(None))
        assert list(measure(run, Budget(2), EveryEpoch(), stopping=lambda: run.warm_start_batches == 2)) == []
        assert (run.warm_start_batches, run.iterations) == (2, 0)

    @pytest.mark.usefixtures("second_per_evaluation")
    def test_seconds_bound_the_training(self, tiny: Any) -> None:
        run = prepare(RunConfig("tiny", "sgdm"), tiny, tiny.load(None))
        lines = list(measure(run, Budget(seconds=12), BoundedShare(0.25, 2)))
        assert lines[-1].seconds == lines[-1].iterations == run.iterations == 12
        assert [line.iterations for line in lines] == [0, 2, 4, 6, 8, 10, 12]

    def test_evaluation_stays_a_share_of_training(self, tiny: Any) -> None:
        run = prepare(RunConfig("tiny", "sgdm"), tiny, tiny.load(None))
        run.clock.reset(10.0)
        schedule = BoundedShare(share=0.4, longest=2.0)
        assert schedule.due(run, last=7.9, cost=4.0)
        assert not schedule.due(run, last=7.9, cost=4.1)
        assert not schedule.due(run, last=8.1, cost=0.0)
        run.iterations = run.order.batches_per_epoch
        assert schedule.due(run, last=8.1, cost=0.0)
        rarer = BoundedShare(share=0.4, longest=2.0, closest=1.0)
        assert rarer.due(run, last=9.0, cost=0.0) and not rarer.due(run, last=9.1, cost=0.0)

    def test_a_loss_that_is_not_finite_stops(self, tiny: Any) -> None:
        tiny.break_after = -1
        with pytest.raises(NumericalError, match="after 0 iterations the training loss is inf"):
            next(measure(prepare(RunConfig("tiny", "sgdm"), tiny, tiny.load(None)), Budget(1), EveryEpoch()))


def test_stopwatch_counts_only_between_start_and_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(training_run, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Stopwatch(torch.device("cpu"))
    clock.start()
    now += 2
    assert clock.seconds == 2
    clock.pause()
    now += 30
    assert clock.seconds == 2
    clock.start()
    now += 4
    clock.start()  # it goes on
    assert clock.seconds == 6


class TestConfig:
    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: RunConfig("p", "m", batch_size=0), "batch_size must be >= 1, got 0"),
            (lambda: RunConfig("p", "m", seed=-1), "seed must be >= 0 and at most 4294967295, got -1"),
            (lambda: RunConfig("p", "m", seed=2**32), "seed must be"),
            (lambda: BatchOrder(10, 0, seed=0), "batch_size must be >= 1, got 0"),
            (lambda: RunConfig("p", "m", method_options={"seed": 2}).method_arguments(), "flag of its own, --seed"),
            (lambda: RunConfig("p", "m", method_options={"model": 2}).method_arguments(), "the problem decides it"),
            (lambda: Budget(), "give epochs, seconds or both"),
            (lambda: Budget(epochs=-1), "epochs must be >= 0, got -1"),
            (lambda: Budget(seconds=0), "seconds must be positive and finite, got 0"),
            (lambda: parse_options(["memory"]), "name=value, got 'memory'"),
            (lambda: parse_options(["a=1", "a=2"]), "'a' is given twice"),
            (lambda: RunConfig("p", "m", lr=1.0, method_options={"lr": 2}).method_arguments(), "lr given twice"),
        ],
    )
    def test_refuses(self, build: Any, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            build()

    def test_options_become_literals_where_they_are(self) -> None:
        texts = ["memory=50", "decay=1e-3", "kind=per-sample", "on=true", "sizes=(1, 2)", "a-b=none"]
        expected = {"memory": 50, "decay": 1e-3, "kind": "per-sample", "on": True, "sizes": (1, 2), "a_b": None}
        assert parse_options(texts) == expected

    def test_differences_name_absent_entries(self) -> None:
        assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == [
            "b: saved 2, asked for '(absent)'",
            "c: saved '(absent)', asked for 3",
        ]

    def test_spent(self) -> None:
        assert Budget(4, 10.0).spent(epoch=1, seconds=9) == 0.9
        assert Budget(0).spent(epoch=0, seconds=0) == 1
