"""The table of problems: networks, losses, options, data."""

import math
from pathlib import Path

import pytest
import torch
from osculate import registry
from osculate.errors import ArgumentError, UnknownNameError
from osculate.experiments.commands.cli import execute
from osculate.experiments.data.curves import generate_curves
from osculate.experiments.data.datafiles import LabelledImages
from osculate.experiments.problems import PROBLEMS, Target, get_problem, images
from torch import nn

NAMES = [
    name
    for name in PROBLEMS
    if not name.startswith("digits-")
    and (name.endswith("autoencoder") or name in ("mnist-cnn", "fashion-cnn", "fashion-mlp"))
]
SIZES = ["full", "small"]


@pytest.fixture
def few_samples(monkeypatch):
    """Readers that return a few generated images in place of files."""
    drawn = generate_curves(70, (0,))
    labels = drawn[:, 0, 0] % 10
    patches = torch.randn(70, 625)
    labelled = LabelledImages(drawn[:50], labels[:50], drawn[50:], labels[50:])
    monkeypatch.setattr(images, "load_images", lambda source, data_dir: labelled)
    monkeypatch.setattr(images, "load_curves", lambda train, test, seed: (drawn[:50], drawn[50:]))
    monkeypatch.setattr(images, "load_face_patches", lambda *options: (patches[:50], patches[50:]))


def test_the_default_problem_comes_first():
    assert list(PROBLEMS)[:2] == ["digits-autoencoder", "curves-autoencoder"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_network_loss_and_data_fit(name, size, few_samples):
    problem = get_problem(name, size=size)
    data = problem.load(None)
    assert problem.name == name
    assert problem.batch_size >= 1
    assert problem.epochs >= 1
    assert data.train_inputs.dtype == data.test_inputs.dtype == torch.float32
    assert len(data.train_inputs) == 50
    assert len(data.test_inputs) == len(data.test_targets) == 20
    loss = problem.loss(problem.build_model(0)(data.train_inputs), data.train_targets)
    assert loss.shape == ()
    loss.backward()
    if problem.classes is None:
        assert data.train_targets is data.train_inputs
        assert data.test_targets is data.test_inputs
    else:
        assert data.train_targets.dtype == torch.int64
        assert abs(float(loss.detach()) - math.log(problem.classes)) < 0.5


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("curves-autoencoder", [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]),
        ("mnist-autoencoder", [784, 1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("fashion-autoencoder", [784, 1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("faces-autoencoder", [625, 2000, 1000, 500, 30, 500, 1000, 2000, 625]),
        ("fashion-mlp", [784, 512, 256, 128, 10]),
        ("digits-autoencoder", [64, 128, 64, 32, 8, 32, 64, 128, 64]),
    ],
)
def test_widths_are_the_papers_or_ours(name, widths):
    layers = [module for module in get_problem(name).build_model(0).modules() if isinstance(module, nn.Linear)]
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == widths


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name.endswith("autoencoder")])
def test_the_code_and_the_output_are_linear(name):
    model = get_problem(name).build_model(0)
    kinds = [type(module) for module in model]
    code = min(
        (k for k, module in enumerate(model) if isinstance(module, nn.Linear)), key=lambda k: model[k].out_features
    )
    assert kinds[code + 1] is nn.Linear
    assert kinds[-1] is nn.Linear
    assert kinds.count(nn.ReLU) == kinds.count(nn.Linear) - 2


def test_the_loss_of_the_digits_starts_near_784_log_2(few_samples):
    problem = get_problem("mnist-autoencoder")
    inputs = problem.load(None).train_inputs
    loss = float(problem.loss(problem.build_model(0)(inputs), inputs).detach())
    assert abs(loss - 784 * math.log(2)) < 3


def test_losses_are_sums_over_pixels_and_means_over_samples():
    output, target = torch.randn(5, 7), torch.rand(5, 7)
    squared = torch.stack([0.5 * ((o - t) ** 2).sum() for o, t in zip(output, target, strict=True)]).mean()
    torch.testing.assert_close(get_problem("faces-autoencoder").loss(output, target), squared)
    probability = torch.sigmoid(output)
    entropy = -(target * probability.log() + (1 - target) * (1 - probability).log()).sum(dim=1).mean()
    torch.testing.assert_close(get_problem("curves-autoencoder").loss(output, target), entropy)


@pytest.mark.parametrize("name", PROBLEMS)
def test_parameters_depend_on_the_seed_alone(name):
    problem = get_problem(name, size="small")
    state = torch.get_rng_state()
    first, second, third = (list(problem.build_model(seed).parameters()) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0])


def test_the_initial_distribution_is_torchs_own():
    torch.manual_seed(3)
    expected = nn.Linear(784, 1000)
    built = next(get_problem("mnist-autoencoder").build_model(3).parameters())
    assert torch.equal(built, expected.weight)


@pytest.mark.parametrize("name", ["mnist-cnn", "fashion-cnn", "fashion-mlp"])
def test_classified_images_are_standardised(name, few_samples):
    inputs = get_problem(name).load(None).train_inputs
    assert abs(float(inputs.mean())) < 1e-4
    assert abs(float(inputs.std()) - 1) < 1e-4
    assert inputs.shape[1:] == ((1, 28, 28) if name.endswith("cnn") else (784,))


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_says_where_its_data_come_from(name):
    problem = get_problem(name)
    assert problem.name == name
    assert problem.source.title and problem.source.licence and problem.source.citation
    assert set(problem.settings) <= set(registry.methods())


@pytest.mark.parametrize("name", ["mnist-cnn", "fashion-cnn", "fashion-mlp"])
def test_held_out_samples_are_the_last_training_samples(name, few_samples):
    whole, part = (get_problem(name, validation=count).load(None) for count in (0, 8))
    assert whole.valid_inputs is None
    assert torch.equal(torch.cat([part.train_inputs, part.valid_inputs]), whole.train_inputs)
    assert torch.equal(torch.cat([part.train_targets, part.valid_targets]), whole.train_targets)
    assert len(part.valid_targets) == 8
    with pytest.raises(ArgumentError, match="validation"):
        get_problem(name, validation=50).load(None)


def test_targets_are_reached_from_the_right_side():
    assert Target("train_loss", 62.0).reached({"train_loss": 61.0})
    assert not Target("train_loss", 62.0).reached({"train_loss": 63.0})
    assert Target("test_accuracy", 0.8).reached({"test_accuracy": 0.81})
    assert not Target("test_accuracy", 0.8).reached({"test_accuracy": 0.79})
    assert not Target("valid_loss", 1.0).reached({})


def test_unknown_names_list_the_near_misses():
    with pytest.raises(UnknownNameError, match="'mnist-autoencoder'"):
        get_problem("mnist-autoencodr")
    with pytest.raises(UnknownNameError, match=r"mnist-cnn.*'size'"):
        get_problem("mnist-cnn", sise="small")
    with pytest.raises(UnknownNameError, match="small"):
        get_problem("mnist-cnn", size="tiny")
    with pytest.raises(ArgumentError, match="data_seed"):
        get_problem("curves-autoencoder", data_seed=-1)


def test_every_problem_that_begins_so_is_a_near_miss() -> None:
    for beginning in ("digit", "digits", "mnist"):
        with pytest.raises(UnknownNameError) as refused:
            get_problem(beginning)
        assert all(repr(name) in str(refused.value) for name in PROBLEMS if name.startswith(beginning))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits-classifier"], "test loss and accuracy are those of the 297 held-out digits"),
        (
            ["digits-classifier", "size=small"],
            "test loss and accuracy are those of the first 100 of 297 held-out digits",
        ),
        (["digits-autoencoder", "size=small"], "test loss is that of the first 100 of 297 held-out digits"),
        (["poisson-2d", "size=small"], "test loss and relative L2 error are those of the"),
        (["tabular-regression", "size=small"], "test loss is that of the"),
    ],
)
def test_a_run_says_which_measures_come_from_which_samples(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = words
    more = [word for option in options for word in ("--problem-option", option)]
    command = ["train", "--problem", name, *more, "--method", "sgdm", "--epochs", "1", "--out", str(tmp_path / "out")]
    assert execute(command) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(said)
    count = len(get_problem(name, **dict(option.split("=") for option in options)).load(None).test_inputs)
    assert str(count) in line.replace(",", "")


def test_a_run_saved_under_another_name_of_its_test_set_goes_on(tmp_path: Path) -> None:
    command = ["train", "--problem", "digits-classifier", "--problem-option", "size=small", "--method", "sgdm"]
    command += ["--out", str(tmp_path / "out")]
    assert execute([*command, "--epochs", "1"]) == 0
    file = tmp_path / "out" / "config.json"
    file.write_text(file.read_text().replace("first 100 of 297 held-out digits", "297 held-out digits"))
    assert execute([*command, "--epochs", "2", "--resume", "require"]) == 0
