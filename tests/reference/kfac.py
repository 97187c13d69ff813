"""KFAC (arXiv:1503.05671) as run beside K-BFGS in arXiv:2006.08877: sampled targets, damping split evenly.

A dense layer has one position (T = 1). For convolutions: A sums over positions, G is a mean over them, and the damping
is split as sqrt(lambda T) and sqrt(lambda / T), the convention of arXiv:2102.06737.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kbfgs import second_moment
from .network import (
    Array,
    Evaluation,
    Parameters,
    as_matrix,
    evaluate,
    from_matrix,
    initial_parameters,
    layers_with_matrices,
    targets_of,
)
from .network import sample_targets as draw_targets

Sampler = Callable[[str, int, Array], NDArray[Any]]  # (array name, row of that array, model outputs) -> targets


def recorded(arrays: Mapping[str, NDArray[Any]]) -> Sampler:
    """A sampler that hands back the targets a trajectory holds."""
    return lambda name, index, outputs: np.asarray(arrays[name][index])


def drawing(loss: str, seed: int) -> Sampler:
    """A sampler that draws from the model's own predictive distribution."""
    generator = np.random.default_rng(seed)
    return lambda name, index, outputs: draw_targets(loss, outputs, generator)


def gradient_moment(g: Array) -> Array:
    """G of one mini-batch: mean over samples and positions of g g^T; g has shape (B, T, out)."""
    return second_moment(g) / g.shape[1]


class LayerState:
    """Everything KFAC remembers about one layer."""

    def __init__(self, entry: Mapping[str, Array]) -> None:
        """All averages start at zero."""
        out, columns = as_matrix(entry).shape
        self.momentum = np.zeros((out, columns))
        self.A, self.G = np.zeros((columns, columns)), np.zeros((out, out))
        self.A_inv, self.G_inv = np.zeros((columns, columns)), np.zeros((out, out))


class KFAC:
    """The optimizer as a loop over layers. `meta` and `arrays` are a trajectory's metadata and inputs."""

    def __init__(self, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], sampler: Sampler) -> None:
        """Read hyper-parameters and initial weights, and run the warm start in mini-batch mode."""
        self.meta, self.arrays, self.hyper, self.sampler = meta, arrays, meta["hyper"], sampler
        self.layers = layers_with_matrices(meta)
        self.parameters: Parameters = initial_parameters(arrays, len(self.layers))
        self.states = [LayerState(entry) for entry in self.parameters]
        self.sampled: dict[str, list[NDArray[Any]]] = {"warm_fisher_targets": [], "fisher_targets": []}
        self.relu_margin = np.inf
        if arrays["batches"].shape[1] < len(arrays["data"]):
            self._warm_start()

    def _evaluate(self, rows: NDArray[Any], targets: NDArray[Any]) -> Evaluation:
        evaluation = evaluate(self.layers, self.parameters, self.meta["loss"], self.arrays["data"][rows], targets)
        self.relu_margin = min(self.relu_margin, evaluation.relu_margin)
        return evaluation

    def _true(self, rows: NDArray[Any]) -> NDArray[Any]:
        return targets_of(self.meta["loss"], self.arrays, rows)

    def _sampled(self, name: str, index: int, rows: NDArray[Any]) -> Evaluation:
        """A separate pass whose targets are drawn from the model's predictive distribution."""
        outputs = self._evaluate(rows, self._true(rows)).outputs
        targets = self.sampler(name, index, outputs)
        self.sampled[name].append(targets)
        return self._evaluate(rows, targets)

    def _warm_start(self) -> None:
        """Plain averages over the batches of mean(h~ h~^T) and mean(g g^T), at the initial weights."""
        batches = self.arrays["warm_batches"]
        for j, rows in enumerate(batches):
            records = self._sampled("warm_fisher_targets", j, rows).records
            for state, record in zip(self.states, records, strict=True):
                state.A += second_moment(record.homogeneous()) / len(batches)
                state.G += gradient_moment(record.g) / len(batches)

    def step(self, k: int, rows: NDArray[Any]) -> tuple[float, float]:
        """Iteration k on the given rows; returns the loss before and after."""
        true = self._evaluate(rows, self._true(rows))
        sampled = self._sampled("fisher_targets", k, rows)
        for l, state in enumerate(self.states):
            self._observe(state, as_matrix(true.gradients[l]), sampled.records[l], l)
            # inverses: after the update of A and G, before the direction; at k <= 20 and at every multiple of 20
            if k <= self.hyper["inverse_always_until"] or k % self.hyper["inverse_every"] == 0:
                self._invert(state, sampled.records[l].h.shape[1])
        for l, state in enumerate(self.states):
            direction = -state.G_inv @ state.momentum @ state.A_inv
            moved = as_matrix(self.parameters[l]) + self.hyper["lr"] * direction
            self.parameters[l] = from_matrix(moved, self.parameters[l])
        return true.loss, self._evaluate(rows, self._true(rows)).loss

    def _observe(self, state: LayerState, gradient: Array, sampled: Any, l: int) -> None:
        """Gradient with weight decay, momentum (true targets), A and G (sampled targets; k = 0 included)."""
        hyper, decay = self.hyper, self.hyper["statistics_decay"]
        total = gradient + hyper["weight_decay_tau"] * as_matrix(self.parameters[l])
        state.momentum = hyper["momentum_rho"] * state.momentum + (1 - hyper["momentum_rho"]) * total
        state.A = decay * state.A + (1 - decay) * second_moment(sampled.homogeneous())
        state.G = decay * state.G + (1 - decay) * gradient_moment(sampled.g)

    def _invert(self, state: LayerState, positions: int) -> None:
        """Exact inverses of A + sqrt(lambda T) I and G + sqrt(lambda / T) I."""
        damping = self.hyper["lambda_damping"]
        state.A_inv = np.linalg.inv(state.A + np.sqrt(damping * positions) * np.eye(len(state.A)))
        state.G_inv = np.linalg.inv(state.G + np.sqrt(damping / positions) * np.eye(len(state.G)))


def run(
    meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], sampler: Sampler | None = None
) -> dict[str, NDArray[Any]]:
    """Replay a trajectory (or, with another `sampler`, record one); returns every array of the recorded format."""
    optimizer = KFAC(meta, arrays, sampler or recorded(arrays))
    columns: dict[str, list[Any]] = {"loss": [], "loss_after": []}
    for l, state in enumerate(optimizer.states):
        columns[f"A_init_{l}"], columns[f"G_init_{l}"] = [state.A], [state.G]
    for k, rows in enumerate(arrays["batches"]):
        loss, loss_after = optimizer.step(k, rows)
        columns["loss"].append(loss)
        columns["loss_after"].append(loss_after)
        for l, (state, entry) in enumerate(zip(optimizer.states, optimizer.parameters, strict=True)):
            record = {**entry, "A": state.A, "G": state.G, "A_inv": state.A_inv, "G_inv": state.G_inv}
            for name, value in record.items():
                columns.setdefault(f"{name}_{l}", []).append(value.copy())
    results = {name: np.array(values[0] if "_init_" in name else values) for name, values in columns.items()}
    results |= {name: np.array(values) for name, values in optimizer.sampled.items() if values}
    results["margin_relu"] = np.array(optimizer.relu_margin)
    return results
