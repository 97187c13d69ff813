"""Exported submissions, driven as the benchmark drives them, by a workload with its signatures."""

from __future__ import annotations

import collections
import enum
import importlib.util
import itertools
import json
import math
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import osculate as osc
import pytest
import torch
from osculate.experiments.commands.cli import execute
from osculate.experiments.commands.submission import search_space, submission_source
from torch import Tensor, nn
from torch.nn import functional


class LossType(enum.Enum):
    SOFTMAX_CROSS_ENTROPY = 0
    SIGMOID_CROSS_ENTROPY = 1
    MEAN_SQUARED_ERROR = 2
    CTC_LOSS = 3
    MEAN_ABSOLUTE_ERROR = 4


class ForwardPassMode(enum.Enum):
    TRAIN = 0
    EVAL = 1


class Workload:
    """Classes of random points, with padded batches, dropout and batch normalisation."""

    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    step_hint = 40
    metrics_logger = None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(256, 6, generator=generator)
        self.targets = (self.inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)

    def init_model_fn(self, rng: list[int]) -> tuple[nn.Module, None]:
        torch.manual_seed(rng[0])
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)), None

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: dict[str, Tensor],
        model_state: Any,
        mode: ForwardPassMode,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float,
    ) -> tuple[Tensor, None]:
        assert mode is ForwardPassMode.TRAIN and params.training and update_batch_norm
        hidden = functional.dropout(augmented_and_preprocessed_input_batch["inputs"], dropout_rate)
        return params(hidden), None

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        each = functional.cross_entropy(logits_batch, label_batch, reduction="none", label_smoothing=label_smoothing)
        weights = torch.ones_like(each) if mask_batch is None else mask_batch
        return {"summed": (each * weights).sum(), "n_valid_examples": weights.sum(), "per_example": each}

    def queue(self, size: int) -> Iterator[dict[str, Tensor]]:
        weights = torch.ones(size)
        weights[-3:] = 0.0
        for start in itertools.cycle(range(0, len(self.inputs), size)):
            cut = slice(start, start + size)
            yield {"inputs": self.inputs[cut], "targets": self.targets[cut], "weights": weights}

    def loss(self, model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return float(functional.cross_entropy(model(self.inputs), self.targets))


@pytest.fixture(autouse=True)
def algoperf(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a submission imports of the benchmark."""
    package, spec = types.ModuleType("algoperf"), types.ModuleType("algoperf.spec")
    spec.LossType, spec.ForwardPassMode = LossType, ForwardPassMode  # type: ignore[attr-defined]
    package.spec = spec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "algoperf", package)
    monkeypatch.setitem(sys.modules, "algoperf.spec", spec)


def exported(name: str, folder: Path, *options: str) -> tuple[types.ModuleType, dict[str, Any]]:
    assert execute(["export-submission", name, "--out", str(folder), *options]) == 0
    specification = importlib.util.spec_from_file_location("submission", folder / "submission.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module, json.loads((folder / "tuning_search_space.json").read_text())


def point(space: dict[str, Any], **chosen: float) -> Any:
    """A point of the space as the benchmark hands it over; the middle where nothing is chosen."""
    middle = {
        name: entry["feasible_points"][0] if "feasible_points" in entry else math.sqrt(entry["min"] * entry["max"])
        for name, entry in space.items()
    }
    return collections.namedtuple("Hyperparameters", middle)(**middle | chosen)  # type: ignore[misc]


def train(module: types.ModuleType, hyperparameters: Any, steps: int) -> tuple[float, float, dict[str, Any]]:
    """Loss before and after, and the final state, the way the benchmark's runner calls a submission."""
    workload, rng = Workload(), [7, 11]
    model, model_state = workload.init_model_fn(rng)
    state = module.init_optimizer_state(workload, model, model_state, hyperparameters, rng)
    before, queue = workload.loss(model), workload.queue(32)
    for step in range(steps):
        batch = module.data_selection(workload, queue, state, model, model_state, hyperparameters, step, rng)
        state, model, model_state = module.update_params(
            workload=workload,
            current_param_container=model,
            current_params_types={},
            model_state=model_state,
            hyperparameters=hyperparameters,
            batch=batch,
            loss_type=workload.loss_type,
            optimizer_state=state,
            eval_results=[],
            global_step=step,
            rng=rng,
            train_state={"is_time_remaining": True},
        )
    arguments = (workload, model, {}, model_state, hyperparameters, workload.loss_type, state, [], steps, rng)
    state, model, model_state = module.prepare_for_eval(*arguments)
    return before, workload.loss(model), state


@pytest.mark.parametrize("name", ["kbfgs", "mbf", "kfac", "joint-kfac", "lw-adamw", "muon", "adamw"])
def test_a_submission_trains(name: str, tmp_path: Path) -> None:
    """Methods with and without a closure, with and without sampled labels, with and without a learning rate."""
    module, space = exported(name, tmp_path)
    defaults = osc.registry.methods()[name].defaults
    chosen = {"learning_rate": max(defaults["lr"], 0.01), "weight_decay": 1e-6, "dropout_rate": 0.0}
    before, after, state = train(module, point(space, **chosen), 40)
    assert after < 0.8 * before
    assert state["optimizer"].param_groups[0]["lr"] < 1e-2 * chosen["learning_rate"]  # the cosine has come down


def test_it_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    module, space = exported("mbf", tmp_path)
    hyperparameters = point(space, learning_rate=0.02, dropout_rate=0.0, weight_decay=0.01)._replace(warmup_factor=0.1)
    _, after, _ = train(module, hyperparameters, 5)
    workload = Workload()
    model, _ = workload.init_model_fn([7, 11])
    optimizer = osc.build("mbf", model, lr=0.02, damping=hyperparameters.damping, weight_decay=0.01)
    for step, batch in zip(range(5), workload.queue(32), strict=False):
        factor = (step + 1) / 4 if step < 4 else 1.0
        optimizer.param_groups[0]["lr"] = 0.02 * factor
        model.train()

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            output = model(batch["inputs"])
            loss = functional.cross_entropy(output[:-3], batch["targets"][:-3])
            loss.backward()
            return loss

        optimizer.step(closure)
    assert after == pytest.approx(workload.loss(model), rel=1e-5)


def test_every_method_exports_a_space_that_holds_its_defaults(tmp_path: Path) -> None:
    for name, entry in osc.registry.methods().items():
        space = search_space(entry.factory())
        compile(submission_source(name, {}), name, "exec")
        for key, ours in (("learning_rate", "lr"), ("damping", "damping")):
            if key in space and "min" in space[key]:
                assert 0 < space[key]["min"] < entry.defaults[ours] < space[key]["max"], (name, key)
        for corner in ("min", "max"):
            method, values = (
                entry.factory(),
                {key: choice.get(corner, choice.get("feasible_points", [0])[0]) for key, choice in space.items()},
            )
            damping = values.get("damping", entry.defaults["damping"])
            method.check_values(lr=values["learning_rate"], damping=damping, weight_decay=values["weight_decay"])
        chooses = name.startswith(("lw-", "joint-"))
        assert (space["learning_rate"] == {"feasible_points": [1.0]}) == chooses


def test_options_are_part_of_the_submission(tmp_path: Path) -> None:
    module, _ = exported("kbfgs-l", tmp_path, "--option", "memory=7")
    assert module.OPTIONS == {"memory": 7} and module.METHOD == "kbfgs-l"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    assert execute(["export-submission", "kbfsg", "--out", str(tmp_path)]) == 2
    assert execute(["export-submission", "kbfgs", "--out", str(tmp_path), "--option", "lr=3"]) == 2
    assert execute(["export-submission", "kbfgs", "--out", str(tmp_path), "--option", "nothing=3"]) == 2
    assert not list(tmp_path.iterdir())


def test_batch_sizes_cover_the_workloads(tmp_path: Path) -> None:
    module, _ = exported("adamw", tmp_path)
    named = [
        "criteo1tb",
        "fastmri",
        "finewebedu_lm",
        "imagenet_resnet",
        "imagenet_vit",
        "librispeech_conformer",
        "ogbg",
        "wmt",
    ]
    assert all(module.get_batch_size(name) >= 32 for name in named)
    with pytest.raises(ValueError, match="unknown workload 'nothing'"):
        module.get_batch_size("nothing")


# -- the self-tuning ruleset -------------------------------------------------------------------------------------------


class MnistWorkload:
    """The size of the benchmark's ``mnist`` (784-128-10, sigmoids, target 97 %) on images that are made up here.

    An image is one of ten smooth patterns, moved by up to four pixels, with noise.
    """

    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    step_hint = 7813
    validation_target_value = 0.97
    metrics_logger = None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(10, 1, 7, 7, generator=generator)
        patterns = functional.interpolate(coarse, size=(28, 28), mode="bilinear")
        labels = torch.randint(10, (3072,), generator=generator)
        moves = torch.randint(-4, 5, (3072, 2), generator=generator).tolist()
        images = [patterns[label].roll((x, y), (1, 2)) for label, (x, y) in zip(labels.tolist(), moves, strict=True)]
        noise = torch.randn(3072, 1, 28, 28, generator=generator)
        self.images, self.labels = torch.stack(images) + 0.3 * noise, labels

    def init_model_fn(self, rng: list[int]) -> tuple[nn.Module, None]:
        torch.random.manual_seed(rng[0])
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.Sigmoid(), nn.Linear(128, 10)), None

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: dict[str, Tensor],
        model_state: Any,
        mode: ForwardPassMode,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float = 0.0,
    ) -> tuple[Tensor, None]:
        assert dropout_rate == 0.0  # the workload's own
        if mode is ForwardPassMode.EVAL:
            params.eval()
        with torch.set_grad_enabled(mode is ForwardPassMode.TRAIN):
            return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        assert label_smoothing == 0.0
        each = functional.cross_entropy(logits_batch, label_batch, reduction="none")
        if mask_batch is not None:
            each *= mask_batch
        count = len(each) if mask_batch is None else mask_batch.sum()
        return {"summed": each.sum(), "n_valid_examples": torch.as_tensor(count), "per_example": each}

    def queue(self, size: int, rng: list[int]) -> Iterator[dict[str, Tensor]]:
        """The first 2048 images, shuffled; every weight is True."""
        generator = torch.Generator().manual_seed(rng[1])
        while True:
            for index in torch.randperm(2048, generator=generator).split(size):
                weights = torch.ones(len(index), dtype=torch.bool)
                yield {"inputs": self.images[index], "targets": self.labels[index], "weights": weights}

    def accuracy(self, model: nn.Module, rng: list[int]) -> float:
        batch = {"inputs": self.images[2048:], "targets": self.labels[2048:]}
        logits, _ = self.model_fn(model, batch, None, ForwardPassMode.EVAL, rng, update_batch_norm=False)
        return float((logits.argmax(dim=1) == batch["targets"]).double().mean())


def run_to_target(module: types.ModuleType, most: int, every: int = 5) -> tuple[int, float]:
    """Steps and accuracy at the first evaluation past the target, as the benchmark's runner goes under self-tuning."""
    workload, rng, hyperparameters = MnistWorkload(), [3, 5], None
    model, model_state = workload.init_model_fn(rng)
    state = module.init_optimizer_state(workload, model, model_state, hyperparameters, rng)
    queue = workload.queue(module.get_batch_size("mnist"), rng)
    accuracy = workload.accuracy(model, rng)
    assert accuracy < 0.4
    for step in range(most):
        batch = module.data_selection(workload, queue, state, model, model_state, hyperparameters, step, rng)
        state, model, model_state = module.update_params(
            workload=workload,
            current_param_container=model,
            current_params_types={},
            model_state=model_state,
            hyperparameters=hyperparameters,
            batch=batch,
            loss_type=workload.loss_type,
            optimizer_state=state,
            eval_results=[],
            global_step=step,
            rng=rng,
            train_state={"is_time_remaining": True},
        )
        if (step + 1) % every == 0:
            arguments = (workload, model, {}, model_state, hyperparameters, workload.loss_type, state, [], step, rng)
            state, model, model_state = module.prepare_for_eval(*arguments)
            accuracy = workload.accuracy(model, rng)
            if accuracy > workload.validation_target_value:
                return step + 1, accuracy
    return most, accuracy


def self_tuning(name: str, folder: Path, *options: str) -> types.ModuleType:
    assert execute(["export-submission", name, "--self-tuning", "--out", str(folder), *options]) == 0
    assert [file.name for file in folder.iterdir()] == ["submission.py"]
    specification = importlib.util.spec_from_file_location("submission", folder / "submission.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


WITHOUT_LEARNING_RATE = sorted(name for name in osc.registry.methods() if name.startswith(("lw-", "joint-")))


@pytest.mark.parametrize("name", WITHOUT_LEARNING_RATE)
def test_an_untuned_module_reaches_the_target_of_the_mnist_workload(name: str, tmp_path: Path) -> None:
    """End to end at the benchmark's size: nothing is handed over but the workload."""
    steps, accuracy = run_to_target(self_tuning(name, tmp_path), 400)
    assert accuracy > 0.97, f"{name}: {accuracy} after {steps} steps"


def test_a_self_tuning_module_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    module = self_tuning("joint-kfac", tmp_path, "--option", "weight_decay=1e-3", "--option", "damping=0.5")
    workload, rng = MnistWorkload(), [3, 5]
    models = [workload.init_model_fn(rng)[0] for _ in range(2)]
    state = module.init_optimizer_state(workload, models[0], None, None, rng)
    numbers = {"damping": 0.5, "weight_decay": 1e-3}
    plain = osc.build("joint-kfac", models[1], likelihood="categorical", seed=module._seed(rng), **numbers)
    assert "scheduler" not in state
    for step, batch in zip(range(5), workload.queue(64, rng), strict=False):
        keywords = {"eval_results": [], "global_step": step, "rng": rng, "loss_type": workload.loss_type}
        module.update_params(workload, models[0], {}, None, None, batch, optimizer_state=state, **keywords)

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            plain.zero_grad()
            loss = functional.cross_entropy(models[1](batch["inputs"]), batch["targets"])
            loss.backward()
            return loss

        plain.step(closure)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_self_tuning_refuses_a_learning_rate_and_a_search_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export-submission", "--self-tuning", "--out", str(tmp_path)]

    def said() -> str:
        return re.sub(r"[\s│]+", " ", capsys.readouterr().err)

    assert execute([*words, "kbfgs"]) == 2
    refusal = said()
    assert "'kbfgs' has a learning rate" in refusal and all(name in refusal for name in WITHOUT_LEARNING_RATE)
    assert execute([*words, "joint-kfac", "--option", "lr=0.5"]) == 2
    assert "the method chooses its steps" in said()
    assert execute([*words, "joint-kfac", "--option", "damping=-1"]) == 2
    assert execute([*words, "joint-kfca"]) == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "tuning_search_space.json").write_text("{}")
    assert execute([*words, "joint-kfac"]) == 2
    assert "remove it" in said()
    assert not (tmp_path / "submission.py").exists()


def test_every_method_without_a_learning_rate_has_a_self_tuning_form() -> None:
    for name in osc.registry.methods():
        if name in WITHOUT_LEARNING_RATE:
            text = submission_source(name, {}, self_tuning=True)
            compile(text, name, "exec")
            assert not re.search(r"hyperparameters\.\w", text) and "import math" not in text
        else:
            with pytest.raises(osc.ArgumentError, match="has a learning rate"):
                submission_source(name, {}, self_tuning=True)
