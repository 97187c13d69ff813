"""The published methods, through the public optimizer, against the slow transcriptions: small nets, random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import osculate as osc
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import kbfgs, kfac, mbf
from reference.network import BERNOULLI, GAUSSIAN
from torch import Tensor
from transcribed_nets import ACTIVATIONS, BATCH, ITERATIONS, SIZES, Arrays, inputs, mean_loss, network

TOLERANCE = 1e-8


class Recorded:
    """A likelihood that hands out given labels in order."""

    def __init__(self, loss: str, labels: list[NDArray[Any]]) -> None:
        self.name, self.labels = "recorded", [torch.from_numpy(np.asarray(entry, dtype=float)) for entry in labels]
        self.inner: osc.Likelihood = osc.Bernoulli() if loss == BERNOULLI else osc.Gaussian()
        self.used = 0

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self.used += 1
        return self.labels[self.used - 1]

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        return self.inner.negative_log_likelihood(output, target)

    def curvature_root(self, output: Tensor) -> Tensor:
        raise NotImplementedError


def replay(
    name: str | osc.Method, loss: str, arrays: Arrays, labels: list[NDArray[Any]], **options: Any
) -> tuple[osc.SecondOrder, list[list[Tensor]]]:
    """Run the optimizer over the batches; the parameters after every iteration."""
    model = network(arrays)
    likelihood = Recorded(loss, labels)
    optimizer = osc.build(name, model, likelihood=likelihood, **options)
    data = torch.from_numpy(arrays["data"])
    if "warm_batches" in arrays:
        optimizer.warm_start([lambda rows=rows: model(data[rows]) for rows in torch.from_numpy(arrays["warm_batches"])])
    history = []
    for rows in torch.from_numpy(arrays["batches"]):

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            value = mean_loss(loss, model(data[rows]), data[rows])
            value.backward()
            return value

        optimizer.step(closure)
        history.append([parameter.detach().clone() for parameter in model.parameters()])
    assert likelihood.used == len(labels)
    return optimizer, history


def compare(results: Arrays, history: list[list[Tensor]]) -> None:
    """Weights and biases after every iteration."""
    for l in range(len(SIZES) - 1):
        for offset, name in enumerate("Wb"):
            found = torch.stack([entry[2 * l + offset] for entry in history]).numpy()
            expected = results[f"{name}_{l}"]
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert error <= TOLERANCE, f"{name}_{l}: {error:.1e}"


def decided(results: Arrays) -> None:
    """Leave out trajectories that pass so close to a threshold that rounding decides."""
    assume(all(np.isfinite(value).all() for value in results.values() if value.dtype.kind == "f"))
    assume(all(float(value) > 1e-7 for name, value in results.items() if name.startswith("margin_")))
    assume(all(np.abs(results[f"W_{l}"]).max() < 50 for l in range(len(SIZES) - 1)))


LOSSES = st.sampled_from([BERNOULLI, GAUSSIAN])
SEEDS = st.integers(0, 10_000)
RATES = st.floats(0.01, 0.3)


@settings(max_examples=15)
@given(
    seed=SEEDS, loss=LOSSES, lr=RATES, damping=st.floats(0.05, 0.9), tau=st.floats(0.0, 0.1),
    rho=st.floats(0.0, 0.95), decay=st.floats(0.0, 0.95), pair_decay=st.floats(0.0, 0.95),
    memory=st.sampled_from([None, 1, 2, 3, 100]), pairs=st.sampled_from(["double", "powell-then-lm"]),
    full_batch=st.booleans(),
)  # fmt: skip
def test_kbfgs(
    seed: int, loss: str, lr: float, damping: float, tau: float, rho: float, decay: float, pair_decay: float,
    memory: int | None, pairs: str, full_batch: bool,
) -> None:  # fmt: skip
    arrays = inputs(seed, full_batch)
    hyper = {
        "lr": lr, "lambda_damping": damping, "weight_decay_tau": tau, "momentum_rho": rho, "A_decay": decay,
        "powell_alpha": 0.2, "s_y_decay": pair_decay, "skip_threshold": 1e-4, "pair_damping": pairs, "memory": memory,
    }  # fmt: skip
    meta = {
        "algorithm": "K-BFGS" if memory is None else "K-BFGS(L)",
        "loss": loss, "activations": ACTIVATIONS, "hyper": hyper,
    }  # fmt: skip
    with np.errstate(all="ignore"):
        results = kbfgs.run(meta, arrays)
    decided(results)
    options: dict[str, Any] = {} if memory is None else {"memory": memory}
    if full_batch:
        _, history = replay(_full_batch(hyper, memory), loss, arrays, [])
    else:
        _, history = replay(
            "kbfgs" if memory is None else "kbfgs-l", loss, arrays, [], lr=lr, damping=damping, weight_decay=tau,
            momentum=rho, pairs=pairs, growth=float("inf"), limit=float("inf"), statistics_decay=decay,
            pair_decay=pair_decay, **options,
        )  # fmt: skip
    compare(results, history)


def _full_batch(hyper: dict[str, Any], memory: int | None) -> osc.Method:
    """Full-batch mode is another composition: A starts as zero, pairs are not averaged, no warm start."""
    start = osc.ZeroStartAverage(hyper["A_decay"])
    pairs = osc.DoubleDamping() if hyper["pair_damping"] == "double" else osc.PowellThenLM()
    raw = osc.ZeroStartAverage(0.0)
    return osc.Method(
        osc.Kronecker(
            osc.HessianActionBFGS(start),
            osc.BFGS(pairs, raw) if memory is None else osc.LBFGS(memory, pairs, raw),
            osc.Schedule(inverses=None),
        ),
        osc.SecantPairs(),
        damping=osc.Split(),
        momentum=osc.EMA(hyper["momentum_rho"]),
        defaults={"lr": hyper["lr"], "damping": hyper["lambda_damping"], "weight_decay": hyper["weight_decay_tau"]},
    )


@settings(max_examples=12)
@given(
    seed=SEEDS, loss=LOSSES, lr=RATES, damping=st.floats(0.05, 3.0), tau=st.floats(0.0, 0.1),
    rho=st.floats(0.0, 0.95), decay=st.floats(0.0, 0.95), every=st.integers(1, 5), eager=st.integers(0, 4),
)  # fmt: skip
def test_kfac(
    seed: int, loss: str, lr: float, damping: float, tau: float, rho: float, decay: float, every: int, eager: int
) -> None:
    arrays = inputs(seed)
    meta = {
        "algorithm": "KFAC", "loss": loss, "activations": ACTIVATIONS,
        "hyper": {
            "lr": lr, "lambda_damping": damping, "weight_decay_tau": tau, "momentum_rho": rho,
            "statistics_decay": decay, "inverse_every": every, "inverse_always_until": eager,
        },
    }  # fmt: skip
    results = kfac.run(meta, arrays, kfac.drawing(loss, seed))
    decided(results)
    labels = [*results["warm_fisher_targets"], *results["fisher_targets"]]
    _, history = replay(
        "kfac", loss, arrays, labels, lr=lr, damping=damping, weight_decay=tau, momentum=rho, statistics_decay=decay,
        inverses_every=every, eager=eager, limit=float("inf"),
    )  # fmt: skip
    compare(results, history)


BLOCKS = {
    "per-output": "per_output",
    "per-output-averaged": "per_output_avg",
    "per-input-averaged": "per_input_avg",
    "flat-chunk": "flat_chunk_avg",
}


@settings(max_examples=15)
@given(
    seed=SEEDS, loss=LOSSES, blocks=st.sampled_from(sorted(BLOCKS)), lr=st.floats(1e-4, 1e-2),
    damping=st.floats(0.01, 1.0), gamma=st.floats(0.0, 1.0), T1=st.integers(1, 4), T2=st.integers(1, 6),
)  # fmt: skip
def test_mbf(seed: int, loss: str, blocks: str, lr: float, damping: float, gamma: float, T1: int, T2: int) -> None:
    arrays = inputs(seed)
    meta = {
        "algorithm": "MBF", "loss": loss, "activations": ACTIVATIONS,
        "hyper": {
            "lr": lr, "damping_lambda": damping, "weight_decay": gamma, "momentum_rho": 0.9, "statistics_decay": 0.9,
            "T1_statistics": T1, "T2_inverse": T2, "fc_blocks": BLOCKS[blocks],
        },
    }  # fmt: skip
    results = mbf.run(meta, arrays, kfac.drawing(loss, seed))
    decided(results)
    optimizer, history = replay(
        "mbf", loss, arrays, list(results["warm_targets"]), lr=lr, damping=damping, weight_decay=gamma, blocks=blocks,
        statistics_every=T1, inverses_every=T2, units="absolute", limit=float("inf"),
    )  # fmt: skip
    compare(results, history)
    for l, block in enumerate(optimizer.state_dict()["state"].values()):
        np.testing.assert_allclose(block["state"]["blocks"].numpy(), results[f"F_{l}"][-1], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["kbfgs", "kfac", "mbf"])
def test_the_comparison_would_see_a_wrong_number(name: str) -> None:
    """A hyper-parameter one per cent off is far above the tolerance."""
    arrays = inputs(3)
    labels = [np.zeros((BATCH, SIZES[0]))] * (2 + ITERATIONS if name == "kfac" else 2 if name == "mbf" else 0)
    lr = 1e-3 if name == "mbf" else 0.3
    histories = [replay(name, BERNOULLI, arrays, labels, lr=lr, damping=damping)[1] for damping in (0.3, 0.303)]
    difference = max(float((a - b).abs().max()) for a, b in zip(histories[0][-1], histories[1][-1], strict=True))
    assert difference > 100 * TOLERANCE
