"""K-BFGS and K-BFGS(L), arXiv:2006.08877 (Algorithm 3 there) and arXiv:2102.06737 for convolutions.

"Item n" in a comment is item n of one iteration in the order of the released code:

    1 gradient, 2 momentum, 3 A, 4 A_LM, 5 direction, 6 step, 7 second pass, 8 pair, 9 moving average of the pair,
    10 and 11 double damping, 12 update of H_g, 13 update of H_a ("Hessian action").

A dense layer has one position (T = 1). For convolutions (arXiv:2102.06737): sums over positions in A, means over
samples and positions in s, y, mean h and mean g; the damping is split as sqrt(lambda T) and sqrt(lambda / T).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .lbfgs import PairStore
from .network import (
    Array,
    Parameters,
    as_matrix,
    evaluate,
    from_matrix,
    initial_parameters,
    layers_with_matrices,
    targets_of,
)
from .pairs import double_damping, inverse_bfgs_update, powell_then_lm, reason_to_skip

PAIR_DAMPING = {"double": double_damping, "powell-then-lm": powell_then_lm}


def second_moment(h: Array) -> Array:
    """A of one mini-batch: mean over samples of the sum over positions of h~ h~^T; h~ has shape (B, T, in + 1)."""
    total = np.zeros((h.shape[2], h.shape[2]))
    for sample in h:
        for vector in sample:
            total += np.outer(vector, vector)
    return total / len(h)


class LayerState:
    """Everything K-BFGS remembers about one layer."""

    def __init__(self, entry: Mapping[str, Array], memory: int | None) -> None:
        """`memory` = None: K-BFGS with a dense H_g; otherwise K-BFGS(L) with that many pairs."""
        out, columns = as_matrix(entry).shape
        self.momentum = np.zeros((out, columns))  # starts at zero
        self.A = np.zeros((columns, columns))  # full-batch mode: starts as zero, not bias-corrected
        self.A_LM = np.zeros((columns, columns))
        self.H_a = np.zeros((columns, columns))  # set in iteration 0
        self.H_g = np.eye(out)  # starts as the identity
        self.pairs = None if memory is None else PairStore(memory)
        self.s_avg, self.y_avg = np.zeros(out), np.zeros(out)  # the UNDAMPED moving averages
        self.s, self.y = np.zeros(out), np.zeros(out)  # after both dampings
        self.powell = self.lm = False
        self.status_H_g = self.status_H_a = 0

    def times_hg(self, v: Array) -> Array:
        """H_g v for a vector or for the columns of a matrix."""
        return self.H_g @ v if self.pairs is None else self.pairs.two_loop(v)

    def update_hg(self, g_mean: Array, threshold: float) -> None:
        """Item 12; in K-BFGS(L) the pair goes into the store instead."""
        if self.pairs is not None:
            self.status_H_g = self.pairs.offer(self.s, self.y, g_mean, threshold)
            return
        self.H_g, self.status_H_g = _guarded_update(self.H_g, self.s, self.y, g_mean, threshold)


def _guarded_update(H: Array, s: Array, y: Array, scale: Array, threshold: float) -> tuple[Array, int]:
    """The inverse BFGS update unless a skip rule forbids it; the status is 0 where it was applied."""
    status = reason_to_skip(s, y, scale, threshold)
    if status:
        return H, status
    updated = inverse_bfgs_update(H, s, y)
    return (H, 3) if np.isinf(updated).any() else (updated, 0)


class KBFGS:
    """The optimizer as a loop over layers. `meta` and `arrays` are a trajectory's metadata and inputs."""

    def __init__(self, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Read hyper-parameters and initial weights, and run the warm start if the trajectory has one."""
        self.meta, self.arrays, self.hyper = meta, arrays, meta["hyper"]
        self.layers = layers_with_matrices(meta)
        self.parameters: Parameters = initial_parameters(arrays, len(self.layers))
        memory = self.hyper["memory"] if meta["algorithm"] == "K-BFGS(L)" else None
        self.states = [LayerState(entry, memory) for entry in self.parameters]
        self.full_batch = arrays["batches"].shape[1] == len(arrays["data"])
        self.margins: dict[str, float] = {"powell": np.inf, "lm": np.inf, "relu": np.inf}
        if not self.full_batch:
            self._warm_start()

    def _evaluate(self, rows: NDArray[Any]) -> Any:
        x, t = self.arrays["data"][rows], targets_of(self.meta["loss"], self.arrays, rows)
        evaluation = evaluate(self.layers, self.parameters, self.meta["loss"], x, t)
        self.margins["relu"] = min(self.margins["relu"], evaluation.relu_margin)
        return evaluation

    def _warm_start(self) -> None:
        """A = plain average over the batches of mean(h~ h~^T), at the initial weights; nothing else is warm-started."""
        for rows in self.arrays["warm_batches"]:
            for state, record in zip(self.states, self._evaluate(rows).records, strict=True):
                state.A += second_moment(record.homogeneous()) / len(self.arrays["warm_batches"])

    def step(self, k: int, rows: NDArray[Any]) -> tuple[float, float]:
        """Iteration k on the given rows; returns the loss before and after."""
        before = self._evaluate(rows)
        directions = []
        for l, state in enumerate(self.states):
            self._observe(k, state, before.records[l], l, before.gradients[l])
            # item 5: A_LM is new, but H_a and H_g are those left by iteration k - 1
            directions.append(-state.times_hg(state.momentum) @ state.H_a)
        for l, direction in enumerate(directions):  # item 6: all layers together
            moved = as_matrix(self.parameters[l]) + self.hyper["lr"] * direction
            self.parameters[l] = from_matrix(moved, self.parameters[l])
        after = self._evaluate(rows)  # item 7: the SAME mini-batch at the new weights; no weight decay enters
        for state, old, new in zip(self.states, before.records, after.records, strict=True):
            self._look_back(state, old, new)
        return before.loss, after.loss

    def _observe(self, k: int, state: LayerState, record: Any, l: int, gradient: Mapping[str, Array]) -> None:
        """Items 1-4 of one layer."""
        hyper = self.hyper
        # item 1: gradient of the batch-mean loss plus tau [W | b], biases included
        total = as_matrix(gradient) + hyper["weight_decay_tau"] * as_matrix(self.parameters[l])
        # item 2: momentum before preconditioning, no bias correction
        state.momentum = hyper["momentum_rho"] * state.momentum + (1 - hyper["momentum_rho"]) * total
        # item 3: with the weights BEFORE the step; skipped at k = 0 in mini-batch mode
        if k > 0 or self.full_batch:
            fresh = second_moment(record.homogeneous())
            state.A = hyper["A_decay"] * state.A + (1 - hyper["A_decay"]) * fresh
        # item 4
        state.A_LM = state.A + np.sqrt(hyper["lambda_damping"] * record.h.shape[1]) * np.eye(len(state.A))
        if k == 0:
            state.H_a = np.linalg.inv(state.A_LM)  # never re-inverted

    def _look_back(self, state: LayerState, old: Any, new: Any) -> None:
        """Items 8-13 of one layer: no other layer's new quantities enter."""
        hyper, threshold = self.hyper, self.hyper["skip_threshold"]
        epsilon = np.sqrt(hyper["lambda_damping"] / old.h.shape[1])
        # item 8: means over samples and positions, old minus new
        s = old.a.mean((0, 1)) - new.a.mean((0, 1))
        y = old.g.mean((0, 1)) - new.g.mean((0, 1))
        # item 9: full-batch mode uses the raw pair
        decay = 0.0 if self.full_batch else hyper["s_y_decay"]
        state.s_avg = decay * state.s_avg + (1 - decay) * s
        state.y_avg = decay * state.y_avg + (1 - decay) * y
        # items 10 and 11, with the H_g before this update
        damp = PAIR_DAMPING[hyper.get("pair_damping", "double")]
        Hy = state.times_hg(state.y_avg)
        damped = damp(state.s_avg, state.y_avg, Hy, hyper["powell_alpha"], epsilon)
        state.s, state.y, state.powell, state.lm = damped.s, damped.y, damped.powell, damped.lm
        for name, margin in damped.margins.items():
            self.margins[name] = min(self.margins[name], margin)
        # item 12: |g| is the RAW batch mean before the step
        state.update_hg(old.g.mean((0, 1)), threshold)
        # item 13: no damping and no moving average on this pair
        h_mean = old.homogeneous().mean((0, 1))
        s_h = state.H_a @ h_mean
        y_h = state.A_LM @ s_h
        state.H_a, state.status_H_a = _guarded_update(state.H_a, s_h, y_h, h_mean, threshold)


def run(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Replay a trajectory; returns every array that the recorded format has for this algorithm."""
    optimizer = KBFGS(meta, arrays)
    columns: dict[str, list[Any]] = {}
    for l, state in enumerate(optimizer.states):
        columns[f"A_init_{l}"] = [state.A]
    for k, rows in enumerate(arrays["batches"]):
        loss, loss_after = optimizer.step(k, rows)
        for name, value in _snapshot(optimizer, loss, loss_after).items():
            columns.setdefault(name, []).append(value)
    results = {name: np.array(values[0] if "_init_" in name else values) for name, values in columns.items()}
    results["margin_powell"], results["margin_lm"], results["margin_relu"] = (
        np.array(optimizer.margins[name]) for name in ("powell", "lm", "relu")
    )
    return results


def _snapshot(optimizer: KBFGS, loss: float, loss_after: float) -> dict[str, Any]:
    """What is recorded after an iteration."""
    states = optimizer.states
    record: dict[str, Any] = {
        "loss": loss,
        "loss_after": loss_after,
        "damped_powell": [int(state.powell) for state in states],
        "damped_lm": [int(state.lm) for state in states],
        "status_H_g": [state.status_H_g for state in states],
        "status_H_a": [state.status_H_a for state in states],
    }
    for l, (state, entry) in enumerate(zip(states, optimizer.parameters, strict=True)):
        record |= {f"{name}_{l}": value.copy() for name, value in entry.items()}
        record |= {f"A_{l}": state.A, f"H_a_{l}": state.H_a, f"s_{l}": state.s, f"y_{l}": state.y}
        record |= {f"s_avg_{l}": state.s_avg, f"y_avg_{l}": state.y_avg}
        if state.pairs is None:
            record[f"H_g_{l}"] = state.H_g
    return record
