"""Optimizers of other packages: they take the steps that their packages take, and stand in runs like every method."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from osculate.errors import ArgumentError, NumericalError, UnknownNameError
from osculate.experiments.commands.cli import execute
from osculate.experiments.problems import Data
from osculate.experiments.rivals.catalogue import RIVALS, runnable
from osculate.experiments.rivals.foreign import ForeignOptimizer
from osculate.experiments.rivals.rival import Option, Rival
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.training import EveryEpoch, measure, prepare
from osculate.experiments.study.checking import checked
from osculate.experiments.study.reading import read_study
from torch import Tensor, nn
from torch.nn import functional

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS[:, :3].argmax(dim=1)


def installed(name: str) -> Rival:
    rival = RIVALS[name]
    if rival.installed is None:
        pytest.skip(f"{rival.distribution} is not installed")
    return rival


def network(normalised: bool = False) -> nn.Module:
    torch.manual_seed(5)
    middle: list[nn.Module] = [nn.BatchNorm1d(8), nn.Dropout(0.2)] if normalised else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        cut = slice(16 * (step % 4), 16 * (step % 4) + 16)
        yield INPUTS[cut], TARGETS[cut]


def closure(optimizer: Any, model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    return evaluate


def train(optimizer: ForeignOptimizer, model: nn.Module, steps: int) -> None:
    for inputs, targets in batches(steps):
        optimizer.step(closure(optimizer, model, inputs, targets))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def by_its_readme(name: str, model: nn.Module) -> tuple[Any, Any]:
    """The optimizer as the package's own documentation makes it, and what averages."""
    module, parameters = importlib.import_module(RIVALS[name].module), model.parameters()
    if name == "prodigy":
        return module.Prodigy(parameters, lr=1.0), None
    if name == "dadapt-adam":
        return module.DAdaptAdam(parameters, lr=1.0), None
    if name == "mechanic-adamw":
        return module.mechanize(torch.optim.AdamW)(parameters, lr=1.0, weight_decay=0.0), None
    if name == "momo":
        return module.Momo(parameters, lr=1.0), None
    if name == "momo-adam":
        return module.MomoAdam(parameters, lr=1e-2), None
    if name in ("dog", "ldog"):
        cls = module.DoG if name == "dog" else module.LDoG
        return cls(parameters, reps_rel=1e-6), module.PolynomialDecayAverager(model)
    return module.AdamWScheduleFree(parameters), None


@pytest.mark.parametrize("name", RIVALS)
def test_steps_are_those_of_the_package(name: str) -> None:
    """Bit for bit, in a loop as its documentation writes it; the model that is evaluated too."""
    rival = installed(name)
    theirs, ours = network(), network()
    optimizer, averager = by_its_readme(name, theirs)
    if rival.modes:
        optimizer.train()
    for inputs, targets in batches(12):
        optimizer.zero_grad()
        loss = functional.cross_entropy(theirs(inputs), targets)
        loss.backward()
        optimizer.step(loss=loss) if rival.takes_loss else optimizer.step()
        if averager is not None:
            averager.step()
    foreign = ForeignOptimizer(rival, ours, {})
    train(foreign, ours, 12)
    assert torch.equal(weights(theirs), weights(ours)) and not torch.equal(weights(ours), weights(network()))
    if rival.modes:
        optimizer.eval()
    shown = theirs if averager is None else averager.averaged_model
    with foreign.evaluated(list) as model:
        assert torch.equal(weights(shown), weights(model))
        assert torch.equal(weights(model), weights(ours)) or averager is not None or rival.modes
    assert foreign.gradient_evaluations == 12 and foreign.last_report.step == 11


@pytest.mark.parametrize("name", RIVALS)
def test_a_state_in_a_file_continues_bit_for_bit(name: str) -> None:
    rival = installed(name)
    straight, first, second = network(), network(), network()
    one = ForeignOptimizer(rival, straight, {})
    train(one, straight, 8)
    before = ForeignOptimizer(rival, first, {})
    train(before, first, 4)  # a whole pass, so that the same batches follow
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    after = ForeignOptimizer(rival, second, {})
    after.load_state_dict(saved["optimizer"])
    train(after, second, 4)
    assert torch.equal(weights(straight), weights(second))
    with one.evaluated(list) as model, after.evaluated(list) as other:
        assert torch.equal(weights(model), weights(other))
    assert after.gradient_evaluations == 8


@pytest.mark.parametrize("name", RIVALS)
def test_evaluations_leave_no_trace(name: str) -> None:
    """With batch normalisation and dropout: parameters, running statistics and the random state are as without."""
    rival, found = installed(name), []
    for evaluate in (False, True):
        model = network(normalised=True)
        optimizer = ForeignOptimizer(rival, model, {})
        torch.manual_seed(9)
        for inputs, targets in batches(8):
            optimizer.step(closure(optimizer, model, inputs, targets))
            if evaluate:
                with optimizer.evaluated(lambda: [entry for entry, _ in batches(4)]) as shown:
                    assert (shown is model) == (rival.averager is None)
        found.append([*model.state_dict().values(), torch.rand(1)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_schedule_free_running_statistics_are_those_of_the_parameters_that_are_evaluated() -> None:
    rival = installed("schedule-free-adamw")
    model = network(normalised=True)
    optimizer = ForeignOptimizer(rival, model, {"lr": 0.1})
    train(optimizer, model, 20)
    before = model[1].running_mean.clone()
    with ForeignOptimizer(rival, network(normalised=True), {}).evaluated(lambda: [INPUTS]) as start:
        assert torch.equal(start[1].running_mean, torch.zeros(8))  # before the first step all show the same
    with optimizer.evaluated(lambda: [INPUTS] * 60) as shown, torch.no_grad():
        mean = shown[0](INPUTS).mean(dim=0)
        assert torch.allclose(shown[1].running_mean, mean, atol=0.02)  # after 50 batches nearly all of it is new
        assert not torch.allclose(before, mean, atol=0.02)
    assert torch.equal(model[1].running_mean, before)


def test_dog_takes_its_authors_first_step_on_networks_with_batch_normalisation() -> None:
    rival = installed("dog")
    assert ForeignOptimizer(rival, network(), {}).arguments["reps_rel"] == 1e-6
    assert ForeignOptimizer(rival, network(normalised=True), {}).arguments["reps_rel"] == 1e-4
    assert ForeignOptimizer(rival, network(normalised=True), {"reps_rel": 1e-5}).arguments["reps_rel"] == 1e-5
    model = network()
    plain = ForeignOptimizer(rival, model, {"average": False})
    train(plain, model, 3)
    with plain.evaluated(list) as shown:
        assert shown is model


@pytest.mark.parametrize("name", ["dog", "momo", "momo-adam"])
def test_a_parameter_without_a_gradient_counts_as_flat(name: str) -> None:
    rival, model = installed(name), network()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    optimizer = ForeignOptimizer(rival, model, {})
    train(optimizer, model, 3)
    assert torch.equal(model.unused, torch.ones(2))


# -- in runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIVALS)
def test_every_command_runs_it_by_name_and_records_the_package(name: str, tiny: object, tmp_path: Path) -> None:
    rival, out = installed(name), tmp_path / "run"
    assert execute(["train", "--problem", "tiny", "--method", name, "--epochs", "2", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["library"] == f"{rival.distribution} {rival.installed}" and config["damping"] is None
    assert config["lr"] == rival.lr and set(config["method_options"]) == set(rival.keywords)
    lines = RunFolder(out).read_metrics()
    assert [line["gradient_evaluations"] for line in lines] == [0, 4, 8]
    assert lines[-1]["train_loss"] != lines[0]["train_loss"]
    assert execute(["train", "--problem", "tiny", "--method", name, "--epochs", "3", "--out", str(out)]) == 0
    whole = tmp_path / "whole"
    assert execute(["train", "--problem", "tiny", "--method", name, "--epochs", "3", "--out", str(whole)]) == 0
    ends = [RunFolder(path).read_metrics()[-1] for path in (out, whole)]
    assert ends[0]["train_loss"] == ends[1]["train_loss"] and ends[0]["test_loss"] == ends[1]["test_loss"]


def test_rivals_race_against_methods(tiny: object, tmp_path: Path) -> None:
    installed("prodigy")
    words = ["compare", "--problem", "tiny", "--methods", "sgdm", "prodigy", "--epochs", "2", "--out", str(tmp_path)]
    assert execute([*words, "--option", "prodigy.d-coef=0.5"]) == 0
    curves = json.loads((tmp_path / "comparison.json").read_text())["curves"]
    assert [curve["method"] for curve in curves] == ["sgdm", "prodigy"]
    assert "library" not in curves[0]["config"]
    assert curves[1]["config"]["method_options"]["d_coef"] == 0.5
    assert curves[0]["points"][0]["train_loss"] == curves[1]["points"][0]["train_loss"]


STUDY = """
seeds = [1, 2]
[[problems]]
name = "quadratic"
[budget]
epochs = 1
[tuning]
trials = 2
[arms.prodigy]
method = "prodigy"
space = { d_coef = { log = [0.5, 2.0] } }
[arms.momo]
method = "momo"
"""


def study_file(folder: Path, text: str) -> Path:
    file = folder / "rivals.toml"
    file.write_text(text)
    return file


def test_a_study_has_them_for_arms(tmp_path: Path) -> None:
    installed("prodigy"), installed("momo")
    file, out = study_file(tmp_path, STUDY), tmp_path / "out"
    assert execute(["study", str(file), "--out", str(out), "--workers", "1"]) == 0
    runs = sorted(out.glob("runs/*/*/*/config.json"))
    assert len(runs) == 2 + 2 + 2
    assert {json.loads(run.read_text())["library"].split()[0] for run in runs} == {"prodigyopt", "momo-opt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('d_coef = "Adam()"', "d_coef|part"),
        ("damping = 0.1", "no damping"),
        ("memory = 3", "unknown setting of 'prodigy': 'memory'"),
        ("lr = -1.0", "Invalid learning rate"),
    ],
)
def test_a_study_refuses_before_its_first_run(change: str, message: str, tmp_path: Path) -> None:
    installed("prodigy")
    arm = (
        f'seeds = [1]\n[[problems]]\nname = "quadratic"\n[budget]\nepochs = 1\n[arms.a]\nmethod = "prodigy"\n{change}\n'
    )
    with pytest.raises(ArgumentError, match=message):
        checked(read_study(study_file(tmp_path, arm)), None)


def test_what_only_methods_have_is_refused_by_name(
    tiny: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("prodigy")
    words = ["train", "--problem", "tiny", "--method", "prodigy", "--epochs", "1", "--out"]
    assert execute([*words, str(tmp_path / "watched"), "--watch"]) == 2
    assert not (tmp_path / "watched").exists()
    assert execute([*words, str(tmp_path / "run")]) == 0
    assert execute(["diagnose", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("records nothing that could be examined") == 2
    assert execute([*words, str(tmp_path / "damped"), "--damping", "0.1"]) == 2
    with pytest.raises(ArgumentError, match="no part damping to exchange"):
        RunConfig("tiny", "prodigy", parts={"damping": "Split()"}).composed()


@pytest.mark.parametrize("name", RIVALS)
def test_without_the_package_the_line_for_pip_is_told(
    name: str, tiny: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rival = RIVALS[name]
    monkeypatch.setitem(sys.modules, rival.module, None)
    words = ["--problem", "tiny", "--epochs", "1", "--out", str(tmp_path / "out")]
    assert execute(["train", "--method", name, *words]) == 2
    assert execute(["compare", "--methods", "sgdm", name, *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"python -m pip install '{rival.distribution}=={rival.tested}'") == 2
    assert said.count("python -m pip install -e '.[rivals]'") == 2 and not (tmp_path / "out").exists()
    with pytest.raises(ArgumentError, match="not installed"):
        checked(read_study(study_file(tmp_path, STUDY.replace('"momo"', f'"{name}"'))), None)


def test_the_extra_and_the_pages_name_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).resolve().parents[3]
    extra = (root / "pyproject.toml").read_text().split("rivals = [")[1].split("]")[0]
    page = (root / "docs" / "rivals.md").read_text()
    for rival in RIVALS.values():
        assert f'"{rival.distribution}>={rival.tested}"' in extra
        row = next(line for line in page.splitlines() if line.startswith(f"| `{rival.name}`"))
        assert all(word in row for word in (rival.distribution, rival.tested, rival.licence, rival.paper))
        assert execute(["methods", rival.name]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in (rival.distribution, rival.licence, *rival.keywords))
    assert execute(["methods"]) == 0
    table = capsys.readouterr().out
    assert set(RIVALS) <= {line.split()[0] for line in table.splitlines() if line.strip()}
    assert set(RIVALS) < set(runnable())


# -- what holds of any rival, tried on one of torch's own --------------------------------------------------------------


def _sgd(module: Any, groups: Any, keywords: Any) -> torch.optim.Optimizer:
    return module.SGD(groups, **keywords)


SGD = Rival(
    "their-sgd",
    "torch",
    "torch.optim",
    _sgd,
    tested="2.13",
    licence="BSD",
    paper="none",
    summary="torch's SGD.",
    lr=0.1,
    keywords={"momentum": Option(0.9, "of the velocity")},
    coupled=True,
)


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> Rival:
    monkeypatch.setitem(RIVALS, SGD.name, SGD)
    return SGD


def losses(config: RunConfig, problem: Any, data: Data | None = None, epochs: int = 2) -> list[float]:
    run = prepare(config, problem, problem.load(None) if data is None else data, Budget(epochs))
    return [metrics.train_loss for metrics in measure(run, Budget(epochs), EveryEpoch())]


def test_torchs_sgd_is_the_registered_one(sgd: Rival, tiny: Any) -> None:
    """Weight decay, the penalty in the loss, parameters without decay and a declining rate included."""
    for undecayed, schedule in (((), None), (("*.bias",), None), (("*.bias",), "cosine")):
        tiny.undecayed = undecayed
        numbers = {"lr": 0.05, "weight_decay": 0.1, "lr_schedule": schedule}
        ours = losses(RunConfig("tiny", "sgdm", **numbers), tiny)
        theirs = losses(RunConfig("tiny", "their-sgd", **numbers), tiny)
        assert theirs == pytest.approx(ours, rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_moves(sgd: Rival, tiny: Any) -> None:
    run = prepare(RunConfig("tiny", "their-sgd"), tiny, tiny.load(None))
    run.step()
    before = weights(run.model)
    tiny.break_after = 1
    with pytest.raises(NumericalError, match="loss is inf after 1 steps of their-sgd"):
        run.step()
    assert torch.equal(weights(run.model), before)


def test_near_misses_are_named(sgd: Rival) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'momentum'"):
        ForeignOptimizer(sgd, network(), {"momentun": 0.5})
    with pytest.raises(UnknownNameError, match="did you mean 'prodigy'"):
        RunConfig("tiny", "prodgy").composed()
    with pytest.raises(ArgumentError, match="refuses its arguments"):
        ForeignOptimizer(sgd, network(), {"momentum": -1.0})
