"""L-BFGS on mini-blocks from secant pairs of the blocks' own parameters: no paper, our own method, written down slowly.

One iteration: 1 gradient; 2 momentum M <- 0.9 M + 0.1 g; 3 direction p_b = -H_b M_b for every block b, one after
another, H_b as p dense BFGS updates of gamma_b I; 4 step; 5 gradient again on the same mini-batch; 6 the block's pair,
s = change of its parameters, y = change of its gradient; 7 averages s <- 0.9 s + 0.1 new from zero, likewise y; 8 pair
damping with the whole lambda; 9 the angle between s and y; 10 first in, first out store, gamma_b = s.y / y.y.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blocks import dense_matrix, dense_vectors
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
from .pairs import double_damping, powell_then_lm

PAIR_DAMPING = {"double": double_damping, "powell-then-lm": powell_then_lm}


class Block:
    """One block: its averaged pair and its store, whose gamma is that of the newest pair."""

    def __init__(self, size: int, memory: int) -> None:
        """H = I before the first pair."""
        self.store = PairStore(memory, gamma=1.0)
        self.s_avg, self.y_avg = np.zeros(size), np.zeros(size)
        self.rejected = 0

    def inverse(self) -> Array:
        """H as a matrix."""
        return self.store.dense(len(self.s_avg))

    def learn(self, s: Array, y: Array, hyper: Mapping[str, Any]) -> None:
        """Items 7 to 10."""
        decay = hyper["pair_decay"]
        self.s_avg = decay * self.s_avg + (1 - decay) * s
        self.y_avg = decay * self.y_avg + (1 - decay) * y
        damp = PAIR_DAMPING[hyper["pairs"]]
        pair = damp(self.s_avg, self.y_avg, self.inverse() @ self.y_avg, 0.2, hyper["lambda"])
        curvature = pair.s @ pair.y
        if not curvature > 0.3 * np.linalg.norm(pair.s) * np.linalg.norm(pair.y):
            self.rejected += 1
            return
        self.store.offer(pair.s, pair.y, np.zeros(1), 0.0)
        self.store.gamma = float(np.clip(curvature / (pair.y @ pair.y), 1e-8, 1e3))


def run(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Train; W_l and b_l after every iteration, the number of rejected pairs, the pairs in the fullest store."""
    layers, hyper = layers_with_matrices(meta), meta["hyper"]
    parameters: Parameters = initial_parameters(arrays, len(layers))
    momenta = [np.zeros_like(as_matrix(entry)) for entry in parameters]
    rule = hyper["blocks"]
    blocks = [[Block(len(v), hyper["memory"]) for v in dense_vectors(M, rule)] for M in momenta]
    columns: dict[str, list[Array]] = {}
    for rows in arrays["batches"]:

        def gradients(rows: NDArray[Any] = rows) -> list[Array]:
            targets = targets_of(meta["loss"], arrays, rows)
            found = evaluate(layers, parameters, meta["loss"], arrays["data"][rows], targets)
            return [as_matrix(entry) for entry in found.gradients]

        before, old = gradients(), [as_matrix(entry) for entry in parameters]  # item 1
        for l, own in enumerate(blocks):
            momenta[l] = 0.9 * momenta[l] + 0.1 * before[l]  # item 2
            vectors = dense_vectors(momenta[l], rule)
            moved = np.array([block.inverse() @ v for block, v in zip(own, vectors, strict=True)])  # item 3
            new = old[l] - hyper["lr"] * dense_matrix(moved, rule, old[l].shape)  # item 4
            parameters[l] = from_matrix(new, parameters[l])
            for name, value in parameters[l].items():
                columns.setdefault(f"{name}_{l}", []).append(value.copy())
        after = gradients()  # item 5
        for l, own in enumerate(blocks):
            steps = dense_vectors(as_matrix(parameters[l]) - old[l], rule)  # item 6
            for block, s, y in zip(own, steps, dense_vectors(after[l] - before[l], rule), strict=True):
                block.learn(s, y, hyper)
    results: dict[str, Any] = {name: np.array(values) for name, values in columns.items()}
    every = [block for own in blocks for block in own]
    return results | {"rejected": sum(b.rejected for b in every), "stored": max(len(b.store.S) for b in every)}
