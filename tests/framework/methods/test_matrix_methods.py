"""Methods with matrices of all kinds, and K-FAC and K-BFGS on convolutions, against their transcriptions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import osculate as osc
import pytest
import torch
from numpy.typing import NDArray
from reference import kbfgs, kfac, matrix_methods
from reference.layer_loop import run
from reference.network import CATEGORICAL
from torch import Tensor, nn

Arrays = dict[str, NDArray[Any]]
TOLERANCE = 1e-9
SIZES = (3, 4, 5, 6)  # [W | b] is square: no eigenvalue of G G' or G' G is zero more than once
SAMPLES, BATCH, ITERATIONS = 24, 8, 9
CONV = [
    {"type": "conv", "kernel": 2, "stride": 1, "padding": 1, "then": ["tanh", "flatten"]},
    {"type": "dense", "then": []},
]


def inputs(seed: int, warm: bool, shapes: list[tuple[int, ...]], features: tuple[int, ...], classes: int) -> Arrays:
    """Data, labels, batches in two epochs, initial weights."""
    generator = np.random.default_rng(seed)
    arrays: Arrays = {
        "data": generator.normal(size=(SAMPLES, *features)),
        "labels": generator.integers(0, classes, SAMPLES),
        "batches": np.array([generator.permutation(SAMPLES)[:BATCH] for _ in range(ITERATIONS)]),
    }
    if warm:
        arrays["warm_batches"] = np.arange(SAMPLES).reshape(-1, BATCH)
    for l, shape in enumerate(shapes):
        arrays[f"W_init_{l}"] = generator.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        arrays[f"b_init_{l}"] = generator.normal(0, 0.1, shape[0])
    return arrays


def dense(seed: int, warm: bool) -> tuple[Arrays, nn.Sequential]:
    """3-4-5-6 with tanh."""
    shapes = [(outer, inner) for inner, outer in itertools.pairwise(SIZES)]
    arrays = inputs(seed, warm, shapes, SIZES[:1], SIZES[-1])
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)).double()
    return arrays, initialised(model, arrays)


def convolutional(seed: int) -> tuple[Arrays, nn.Sequential]:
    """One 2 x 2 convolution on 2 x 3 x 3 images, 16 positions, and a dense layer."""
    arrays = inputs(seed, True, [(3, 2, 2, 2), (4, 48)], (2, 3, 3), 4)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double()
    return arrays, initialised(model, arrays)


def initialised(model: nn.Sequential, arrays: Arrays) -> nn.Sequential:
    """The weights of the arrays."""
    with torch.no_grad():
        for l, layer in enumerate(layers_of(model)):
            layer.weight.copy_(torch.from_numpy(arrays[f"W_init_{l}"]))
            layer.bias.copy_(torch.from_numpy(arrays[f"b_init_{l}"]))
    return model


def layers_of(model: nn.Sequential) -> list[Any]:
    """Modules with parameters."""
    return [module for module in model if list(module.parameters())]


class Recorded(osc.Categorical):
    """A likelihood that hands out given labels in order."""

    def __init__(self, labels: list[NDArray[Any]]) -> None:
        self.labels = [torch.from_numpy(np.asarray(entry)).long() for entry in labels]

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return self.labels.pop(0)


def compare(name: str, arrays: Arrays, model: nn.Sequential, results: Arrays, drawn: Any, **options: Any) -> None:
    """Train with the optimizer; weights and biases after every iteration."""
    likelihood = Recorded(list(drawn))
    optimizer = osc.build(name, model, likelihood=likelihood, **options)
    data, labels = torch.from_numpy(arrays["data"]), torch.from_numpy(arrays["labels"])
    if "warm_batches" in arrays and optimizer.has_warm_start:
        optimizer.warm_start([lambda rows=rows: model(data[rows]) for rows in torch.from_numpy(arrays["warm_batches"])])
    for k, rows in enumerate(torch.from_numpy(arrays["batches"])):

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data[rows]), labels[rows])
            loss.backward()
            return loss

        optimizer.step(closure)
        for l, layer in enumerate(layers_of(model)):
            for key, parameter in (("W", layer.weight), ("b", layer.bias)):
                expected = results[f"{key}_{l}"][k]
                error = np.abs(parameter.detach().numpy() - expected).max() / np.abs(expected).max()
                assert error <= TOLERANCE, f"iteration {k}, {key}_{l}: {error:.1e}"
    assert not likelihood.labels


INFINITE = float("inf")
"""The papers' forms: no bound on a step."""

CASES: dict[str, tuple[Any, dict[str, float], dict[str, Any]]] = {
    "shampoo": (
        matrix_methods.Shampoo,
        {"lr": 0.1, "damping": 0.01, "momentum": 0.8, "every": 3, "eager": 2},
        {"limit": INFINITE, "momentum": 0.8, "inverses_every": 3, "eager": 2},
    ),
    "tnt": (
        matrix_methods.TNT,
        {"lr": 0.01, "damping": 0.1, "momentum": 0.8, "decay": 0.7, "gamma": 0.3, "every": 3, "eager": 2},
        {"limit": INFINITE, "momentum": 0.8, "statistics_decay": 0.7, "inverses_every": 3, "eager": 2},
    ),
    "soap": (
        matrix_methods.SOAP,
        {"lr": 0.02, "damping": 1e-3, "momentum": 0.9, "beta2": 0.8, "gamma": 0.3, "every": 3},
        {"beta1": 0.9, "beta2": 0.8, "basis_every": 3},
    ),
    "muon": (
        matrix_methods.Muon,
        {"lr": 0.05, "damping": 0.0, "momentum": 0.9, "beta2": 0.8, "gamma": 0.3, "output_rows": SIZES[-1]},
        {"momentum": 0.9, "beta2": 0.8},
    ),
    "ekfac": (
        matrix_methods.EKFAC,
        {"lr": 0.1, "damping": 0.05, "momentum": 0.8, "decay": 0.7, "every": 3, "eager": 2},
        {"limit": INFINITE, "momentum": 0.8, "statistics_decay": 0.7, "basis_every": 3, "eager": 2},
    ),
    "ngd-exact": (
        matrix_methods.NaturalGradient,
        {"lr": 0.1, "damping": 0.05, "momentum": 0.8, "decay": 0.7, "every": 3, "eager": 0},
        {"limit": INFINITE, "momentum": 0.8, "statistics_decay": 0.7, "inverses_every": 3},
    ),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_dense(name: str, warm: bool, seed: int) -> None:
    make, hyper, options = CASES[name]
    against_transcription(name, warm, seed, make, hyper, options)


@pytest.mark.parametrize(("output", "rows"), [("", 0), ("2", 5), ("4", 6)])
def test_muon_with_another_output_layer(output: str, rows: int) -> None:
    """None: every matrix is orthogonalised. Or the one that the user names; the layers are 0, 2 and 4."""
    make, hyper, options = CASES["muon"]
    against_transcription("muon", False, 0, make, hyper | {"output_rows": rows}, options | {"heads": output})


def against_transcription(
    name: str, warm: bool, seed: int, make: Any, hyper: dict[str, float], options: dict[str, Any]
) -> None:
    arrays, model = dense(seed, warm and make.samples)
    meta = {"algorithm": name, "loss": CATEGORICAL, "activations": ("tanh", "tanh", "linear"), "hyper": hyper}
    results = run(meta, arrays, make, kfac.drawing(CATEGORICAL, seed))
    values = {"lr": hyper["lr"], "damping": hyper["damping"], "weight_decay": hyper.get("gamma", 0.0)}
    compare(name, arrays, model, results, results["drawn"], **values, **options)


@pytest.mark.parametrize("name", ["ekfac", "ngd-exact", "tnt"])
def test_convolutions(name: str) -> None:
    """Per-sample gradients sum over positions; factors sum over them inside and average over them outside."""
    make, hyper, options = CASES[name]
    arrays, model = convolutional(2)
    meta = {"algorithm": name, "loss": CATEGORICAL, "layers": CONV, "hyper": hyper}
    results = run(meta, arrays, make, kfac.drawing(CATEGORICAL, 2))
    values = {"lr": hyper["lr"], "damping": hyper["damping"], "weight_decay": hyper.get("gamma", 0.0)}
    compare(name, arrays, model, results, results["drawn"], **values, **options)


def test_kfac_on_convolutions() -> None:
    """Heavy ball is the transcription's average with another learning rate."""
    arrays, model = convolutional(3)
    hyper = {
        "lr": 0.1, "lambda_damping": 0.2, "weight_decay_tau": 0.0, "momentum_rho": 0.9, "statistics_decay": 0.8,
        "inverse_every": 3, "inverse_always_until": 2,
    }  # fmt: skip
    meta = {"algorithm": "KFAC", "loss": CATEGORICAL, "layers": CONV, "hyper": hyper}
    results = kfac.run(meta, arrays, kfac.drawing(CATEGORICAL, 3))
    compare(
        "kfac-conv", arrays, model, results, [*results["warm_fisher_targets"], *results["fisher_targets"]],
        lr=0.01, damping=0.2, limit=INFINITE, statistics_decay=0.8, statistics_every=1, inverses_every=3, eager=2,
    )  # fmt: skip


@pytest.mark.parametrize("action", ["averaged", "mini-batch"])
def test_kbfgs_on_convolutions(action: str) -> None:
    arrays, model = convolutional(4)
    hyper = {
        "lr": 0.1, "lambda_damping": 0.3, "weight_decay_tau": 0.0, "momentum_rho": 0.8,
        "A_decay": 0.7 if action == "averaged" else 0.0, "powell_alpha": 0.2, "s_y_decay": 0.6,
        "skip_threshold": 1e-4, "pair_damping": "powell-then-lm", "memory": None,
    }  # fmt: skip
    meta = {"algorithm": "K-BFGS", "loss": CATEGORICAL, "layers": CONV, "hyper": hyper}
    results = kbfgs.run(meta, arrays)
    assert results["margin_powell"] > 1e-7
    compare(
        "kbfgs-conv", arrays, model, results, [], lr=0.1, damping=0.3, action=action, momentum=0.8,
        statistics_decay=0.7, pair_decay=0.6, growth=INFINITE, limit=INFINITE,
    )  # fmt: skip


def test_a_wrong_number_would_be_seen() -> None:
    """A damping one per cent off is far above the tolerance."""
    make, hyper, options = CASES["ekfac"]
    arrays, model = dense(0, False)
    meta = {"algorithm": "", "loss": CATEGORICAL, "activations": ("tanh", "tanh", "linear"), "hyper": hyper}
    results = run(meta, arrays, make, kfac.drawing(CATEGORICAL, 0))
    with pytest.raises(AssertionError, match="iteration 0"):
        compare("ekfac", arrays, model, results, results["drawn"], lr=0.1, damping=0.0505, **options)


def test_numbers_out_of_range_are_refused() -> None:
    for name, option in (("muon", {"scale": "x"}), ("ekfac", {"statistics": "x"}), ("kbfgs-conv", {"action": "x"})):
        with pytest.raises(osc.ArgumentError, match="must be"):
            osc.build(name, nn.Linear(2, 2), likelihood="gaussian", **option)
