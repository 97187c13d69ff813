"""Problems on real data without a download: digits, shellfish, Python's reference."""

import json
import math
from io import StringIO
from pathlib import Path

import pytest
import torch
from osculate.analysis.quality.approximation import Effort, measure_approximation
from osculate.errors import ArgumentError, UnknownNameError
from osculate.experiments.commands.flags import ProblemFlags
from osculate.experiments.commands.train import Compare
from osculate.experiments.problems import PROBLEMS, get_problem
from osculate.experiments.problems import text as text_problems
from osculate.experiments.problems.digits import ENTROPY, MEAN_IMAGE, FreshNoise, evidence_bound
from osculate.experiments.runs.batches import data_checksum
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.reopen import probes
from osculate.experiments.runs.runs import Resume, run_in_folder
from osculate.experiments.runs.training import prepare
from rich.console import Console
from torch import Tensor, nn

NAMES = ["digits-autoencoder", "digits-classifier", "digits-vae", "tabular-regression", "char-lm"]
HELD_OUT = NAMES[:-1]


def test_the_default_problem_is_the_first_and_needs_no_files() -> None:
    assert next(iter(PROBLEMS)) == ProblemFlags().problem == "digits-autoencoder"


@pytest.mark.parametrize(
    ("name", "train", "test", "outputs"),
    [
        ("digits-autoencoder", (1500, 64), (297, 64), (64,)),
        ("digits-classifier", (1500, 64), (297, 64), (10,)),
        ("digits-vae", (1500, 72), (297, 72), (64,)),
        ("tabular-regression", (3300, 10), (877, 10), (1,)),
        ("char-lm", (6000, 64), (448, 64), (64, 96)),
    ],
)
def test_shapes_at_full_size(name: str, train: tuple, test: tuple, outputs: tuple) -> None:
    problem = get_problem(name)
    data = problem.load(None)
    assert (data.train_inputs.shape, data.test_inputs.shape) == (train, test)
    assert len(data.train_targets) == train[0] and len(data.test_targets) == test[0]
    with torch.no_grad():
        found = problem.build_model(0)(data.train_inputs[:3])
    assert (found["logits"] if isinstance(found, dict) else found).shape == (3, *outputs)


@pytest.mark.parametrize("size", ["full", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_data_are_the_same_every_time(name: str, size: str) -> None:
    first, second = (get_problem(name, size=size).load(None) for _ in range(2))
    assert data_checksum(first) == data_checksum(second)


def test_numbers_are_those_of_the_release() -> None:
    """Other numbers would be another problem: results could not be compared with earlier ones."""
    assert data_checksum(get_problem("digits-autoencoder").load(None)) == "e2561b66"


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_samples_are_the_last_training_samples(name: str) -> None:
    whole, part = (get_problem(name, size="small", validation=count).load(None) for count in (0, 60))
    assert whole.valid_inputs is None and part.valid_inputs is not None and part.valid_targets is not None
    assert len(part.valid_inputs) == len(part.valid_targets) == 60 and len(part.train_inputs) == 240
    if name in ("digits-autoencoder", "tabular-regression"):
        assert torch.equal(torch.cat([part.train_inputs, part.valid_inputs]), whole.train_inputs)
    with pytest.raises(ArgumentError, match="validation"):
        get_problem(name, size="small", validation=300).load(None)


def loss_of(name: str, output: Tensor) -> float:
    """Of a network that returns the same for all samples."""
    problem = get_problem(name)
    data = problem.load(None)
    return float(problem.loss(output.expand(len(data.train_targets), *output.shape), data.train_targets))


def test_the_plateau_of_the_mean_image_is_at_27_nats() -> None:
    images = get_problem("digits-autoencoder").load(None).train_inputs
    plateau = loss_of("digits-autoencoder", torch.logit(images.mean(0), eps=1e-6))
    assert plateau == pytest.approx(MEAN_IMAGE, abs=0.05) and get_problem("digits-autoencoder").landmarks
    assert loss_of("digits-autoencoder", torch.zeros(64)) == pytest.approx(64 * math.log(2), rel=1e-5)
    entropy = -(torch.xlogy(images, images) + torch.xlogy(1 - images, 1 - images)).sum(1).mean()
    assert ENTROPY < float(entropy) < ENTROPY + 0.1


def test_the_mean_of_the_ages_has_loss_one_half() -> None:
    data = get_problem("tabular-regression").load(None)
    assert loss_of("tabular-regression", torch.zeros(1)) == pytest.approx(0.5, abs=1e-4)
    assert float(data.train_inputs.mean(0).abs().max()) < 1e-4
    assert float((data.train_inputs.std(0) - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("size", ["full", "small"])
@pytest.mark.parametrize(
    ("name", "expected", "tolerance"),
    [
        ("digits-autoencoder", 64 * math.log(2), 1.0),
        ("digits-classifier", math.log(10), 0.2),
        ("digits-vae", 64 * math.log(2), 2.0),
        ("tabular-regression", 0.5, 0.1),
    ],
)
def test_losses_start_where_nothing_is_known(name: str, size: str, expected: float, tolerance: float) -> None:
    problem = get_problem(name, size=size)
    data = problem.load(None)
    with torch.no_grad():
        loss = problem.loss(problem.build_model(0)(data.train_inputs), data.train_targets)
    assert abs(float(loss) - expected) < tolerance


def test_classified_digits_are_standardised_by_the_training_images() -> None:
    data = get_problem("digits-classifier", validation=100).load(None)
    assert abs(float(data.train_inputs.mean())) < 1e-4 and abs(float(data.train_inputs.std()) - 1) < 1e-4
    assert data.valid_inputs is not None and 0.9 < float(data.valid_inputs.std()) < 1.1


def test_the_bound_is_cross_entropy_and_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance, logits = (torch.randn(5, n, generator=generator) for n in (3, 3, 7))
    target = torch.rand(5, 7, generator=generator)
    code = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum()
    entropy = nn.functional.binary_cross_entropy(logits.sigmoid(), target, reduction="sum")
    found = evidence_bound({"logits": logits, "mean": mean, "log_variance": log_variance}, target)
    torch.testing.assert_close(found, (divergence + entropy) / 5)


def test_the_noise_is_that_of_the_seed_and_the_step_alone() -> None:
    problem = get_problem("digits-vae", size="small")
    data = problem.load(None)
    assert torch.equal(data.train_inputs[:, :64], data.train_targets)
    noise = data.train_inputs[:, 64:]
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    change = FreshNoise(4)
    first, again, other = (change(data.train_inputs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first[:, 64:], other[:, 64:])
    assert torch.equal(first[:, :64], other[:, :64]) and not torch.equal(first[:, 64:], noise)


def test_the_code_is_mean_and_deviation_times_noise() -> None:
    problem = get_problem("digits-vae", size="small")
    model, inputs = problem.build_model(0), problem.load(None).train_inputs[:6].clone()
    inputs[:, 64:] = 0
    output = model(inputs)
    torch.testing.assert_close(model.decoder(output["mean"]), output["logits"])
    inputs[:, 64:] = 1
    code = output["mean"] + output["log_variance"].exp().sqrt()
    torch.testing.assert_close(model.decoder(code), model(inputs)["logits"])


@pytest.mark.parametrize("method", ["kfac", "ekfac", "joint-kfac"])
def test_backends_agree_on_the_variational_autoencoder(method: str) -> None:
    """The network draws nothing itself, so a backend that evaluates it again sees what the loop saw."""
    found = []
    for backend in ("hooks", "func"):
        problem = get_problem("digits-vae", size="small")
        config = RunConfig("digits-vae", method, batch_size=20, method_options={"backend": backend})
        run = prepare(config, problem, problem.load(None))
        for _ in range(3):
            run.step()
        found.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_exact_curvature_reads_the_logits_of_the_variational_autoencoder() -> None:
    problem = get_problem("digits-vae", size="small")
    data = problem.load(None)
    run = prepare(RunConfig("digits-vae", "kfac", batch_size=20), problem, data)
    run.step()
    (probe,) = probes(problem, data, 20, 1)
    found = measure_approximation(run.optimizer, probe, targets=("ggn", "hessian"), effort=Effort())
    assert found


TRAINED = {
    "digits-autoencoder": ({"kfac": {"lr": 1.0, "damping": 1.0}, "adam": {"lr": 1e-2}}, 10, 30.0),
    "digits-classifier": ({"joint-kfac": {}, "adam": {"lr": 1e-2}}, 5, 0.5),
    "digits-vae": ({"joint-kfac": {}, "adam": {"lr": 1e-2}}, 10, 30.0),
    "tabular-regression": ({"joint-kfac": {}, "adam": {"lr": 1e-2}}, 5, 0.3),
    "char-lm": ({"joint-kfac": {}, "adam": {"lr": 1e-2}}, 3, 16 * 3.2),
}


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in NAMES for method in TRAINED[name][0]])
def test_a_short_training_lowers_the_loss(name: str, method: str) -> None:
    methods, epochs, bound = TRAINED[name]
    problem = get_problem(name, size="small")
    run = prepare(RunConfig(name, method, seed=1, **methods[method]), problem, problem.load(None))
    before = run.evaluate()
    while run.epoch < epochs:
        run.step()
    after = run.evaluate()
    assert after.train_loss < min(bound, 0.9 * before.train_loss)
    assert after.test_loss < before.test_loss


def test_a_run_records_the_text_it_read(tmp_path: Path) -> None:
    def trained() -> dict:
        config = RunConfig("char-lm", "sgdm", problem_options={"size": "small"})
        run_in_folder(config, Budget(1), RunFolder(tmp_path), None, Resume.AUTO, Console(file=StringIO()))
        return json.loads((tmp_path / "config.json").read_text())["data_origin"]

    origin = trained()
    assert origin["text"].startswith("pydoc_data.topics of Python 3.") and len(origin["text_sha256"]) == 64
    assert trained() == origin


def test_a_run_on_another_text_does_not_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig("char-lm", "sgdm", problem_options={"size": "small"})
    arguments = (Budget(1), RunFolder(tmp_path), None, Resume.AUTO, Console(file=StringIO()))
    run_in_folder(config, *arguments)
    monkeypatch.setattr("osculate.experiments.data.texts.platform.python_version", lambda: "3.99.0")
    with pytest.raises(ArgumentError, match=r"data_origin.*3\.99\.0"):
        run_in_folder(config, *arguments)


def test_texts_have_names() -> None:
    with pytest.raises(UnknownNameError, match="shakespeare"):
        get_problem("char-lm", text="shakespere")
    assert "for tests" in get_problem("char-transformer").summary
    target = get_problem("char-lm", text="shakespeare").target
    assert target is not None and target.metric == "test_loss" and target.value == pytest.approx(120.32)
    assert text_problems.char_lm().target is None


def test_the_language_model_has_the_size_of_nanogpt() -> None:
    problem = get_problem("char-lm")
    model = problem.build_model(0)
    assert len(model.layers) == 4 and model.characters.embedding_dim == 128
    assert model.layers[0].self_attn.num_heads == 4 and len(model.places.weight) == 64
    assert problem.batch_size == 12 and 6000 // 12 * problem.epochs == 2000
    assert 12000 // 12 * get_problem("char-lm", text="shakespeare").epochs == 2000


def test_the_language_model_of_medium_size_is_for_studies_of_many_runs() -> None:
    problem = get_problem("char-lm", size="medium")
    data = problem.load(None)
    assert data.train_inputs.shape == (2400, 64) and len(data.train_inputs) // (problem.batch_size or 1) == 200
    model = problem.build_model(0)
    assert len(model.layers) == 2 and model.characters.embedding_dim == 64
    with torch.no_grad():
        assert model(data.train_inputs[:2]).shape == (2, 64, 96)
    assert get_problem("char-lm", size="medium", text="shakespeare").target is None
    with pytest.raises(UnknownNameError, match="medium"):
        get_problem("char-lm", size="median")


def test_the_race_without_arguments_is_on_the_digits_with_settings_of_their_own() -> None:
    race = Compare()
    problem = get_problem(race.problem)
    assert race.problem == "digits-autoencoder"
    assert set(race.methods) - problem.settings.keys() == {"joint-kfac", "joint-kfac-noise-aware"}
    assert race.seconds * len(race.methods) <= 65  # under 90 seconds with everything
    assert not get_problem(race.problem, size="small").settings


@pytest.mark.parametrize("method", sorted(get_problem("digits-autoencoder").settings))
def test_settings_of_the_digits_build_and_step(method: str) -> None:
    problem = get_problem("digits-autoencoder")
    run = prepare(RunConfig("digits-autoencoder", method), problem, problem.load(None))
    assert run.config.lr == problem.settings[method].get("lr")
    for _ in range(5):
        run.step()
    assert run.last_loss is not None and float(run.last_loss) < 45
