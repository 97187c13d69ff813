"""MBF, the mini-block Fisher method (arXiv:2202.04124), as released.

"Item n" in a comment is item n of one iteration in the order of the released code: 1 gradient, 2 heavy-ball momentum,
3 statistics when k mod T1 = 0, 4 inverses, 5 step with decoupled decay. Parameters without a block (bias of a
convolution, batch normalisation) follow `DiagonalRule`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blocks import AVERAGED, dense_matrix, dense_vectors, kernel_outer_products, kernel_vectors, outer_products
from .kfac import Sampler, recorded
from .network import (
    Array,
    Evaluation,
    Layer,
    Parameters,
    as_matrix,
    evaluate,
    from_matrix,
    initial_parameters,
    layers_of,
    targets_of,
)


class Block:
    """F, its inverse and the momentum of one dense layer or of one convolution's kernels."""

    def __init__(self, layer: Layer, entry: Mapping[str, Array], rule: str) -> None:
        """A convolution's bias is not part of the block, a dense layer's is."""
        self.names = [name for name in ("W", "b") if name in entry and not (layer.kind == "conv" and name == "b")]
        self.kind, self.rule = layer.kind, rule
        self.momentum = {name: np.zeros_like(entry[name]) for name in self.names}
        self.F = np.zeros_like(self.products(entry))
        self.F_inv = np.zeros_like(self.F)

    def products(self, gradient: Mapping[str, Array]) -> Array:
        """v v^T of the blocks v of a gradient."""
        if self.kind == "conv":
            return kernel_outer_products(gradient["W"])
        return outer_products(dense_vectors(as_matrix(gradient), self.rule), AVERAGED[self.rule])

    def invert(self, damping: float) -> None:
        """F_inv = inverse(F + lambda I): the full lambda, exact."""
        self.F_inv = np.linalg.inv(self.F + damping * np.eye(self.F.shape[-1]))

    def direction(self) -> dict[str, Array]:
        """F_inv M, blockwise."""
        if self.kind == "conv":
            vectors = kernel_vectors(self.momentum["W"])
            moved = [[F @ v for F, v in zip(*pair, strict=True)] for pair in zip(self.F_inv, vectors, strict=True)]
            return {"W": np.array(moved).reshape(self.momentum["W"].shape)}
        matrix = as_matrix(self.momentum)
        vectors = dense_vectors(matrix, self.rule)
        inverses = [self.F_inv] * len(vectors) if AVERAGED[self.rule] else self.F_inv
        moved = [F @ v for F, v in zip(inverses, vectors, strict=True)]
        return from_matrix(dense_matrix(np.array(moved), self.rule, matrix.shape), self.momentum)


class DiagonalRule:
    """The Adam-like rule of a parameter without a block: no T1, no warm start, no lambda."""

    def __init__(self, value: Array) -> None:
        """Both averages start at zero."""
        self.e, self.v = np.zeros_like(value), np.zeros_like(value)

    def direction(self, k: int, gradient: Array, beta1: float, beta2: float, epsilon: float) -> Array:
        """e / (sqrt(v / (1 - beta2^(k + 1))) + epsilon); v is bias-corrected, e is not."""
        self.e = beta1 * self.e + (1 - beta1) * gradient
        self.v = beta2 * self.v + (1 - beta2) * self.e**2  # the square of e, NOT of the gradient
        return self.e / (np.sqrt(self.v / (1 - beta2 ** (k + 1))) + epsilon)


class MBF:
    """The optimizer as a loop over layers. `meta` and `arrays` are a trajectory's metadata and inputs."""

    def __init__(self, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], sampler: Sampler) -> None:
        """Read hyper-parameters and initial weights, and run the warm start."""
        self.meta, self.arrays, self.hyper, self.sampler = meta, arrays, meta["hyper"], sampler
        self.layers = layers_of(meta)
        self.parameters: Parameters = initial_parameters(arrays, len(self.layers))
        self.blocks: dict[int, Block] = {}
        self.diagonal: dict[tuple[str, int], DiagonalRule] = {}
        for l, (layer, entry) in enumerate(zip(self.layers, self.parameters, strict=True)):
            if layer.kind != "batchnorm":
                self.blocks[l] = Block(layer, entry, self.hyper["fc_blocks"])
            covered = self.blocks[l].names if l in self.blocks else []
            self.diagonal |= {(name, l): DiagonalRule(entry[name]) for name in entry if name not in covered}
        self.warm_targets: list[NDArray[Any]] = []
        self.relu_margin = np.inf
        self._warm_start()

    def _evaluate(self, rows: NDArray[Any], targets: NDArray[Any] | None = None) -> Evaluation:
        loss, x = self.meta["loss"], self.arrays["data"][rows]
        true = targets_of(loss, self.arrays, rows)
        evaluation = evaluate(self.layers, self.parameters, loss, x, true if targets is None else targets)
        self.relu_margin = min(self.relu_margin, evaluation.relu_margin)
        return evaluation

    def _warm_start(self) -> None:
        """F = plain average over the batches of v v^T, v from the batch-MEAN gradient with sampled targets."""
        batches = self.arrays["warm_batches"]
        for j, rows in enumerate(batches):
            self.warm_targets.append(self.sampler("warm_targets", j, self._evaluate(rows).outputs))
            gradients = self._evaluate(rows, self.warm_targets[-1]).gradients
            for l, block in self.blocks.items():
                block.F += block.products(gradients[l]) / len(batches)

    def refreshes(self, k: int) -> bool:
        """Item 4: whether the inverses are recomputed at iteration k."""
        T1, T2 = self.hyper["T1_statistics"], self.hyper["T2_inverse"]
        return k % T2 == 0 or (k <= T2 and k % T1 == 0)

    def step(self, k: int, rows: NDArray[Any]) -> tuple[float, Parameters]:
        """Iteration k on the given rows; returns the loss and the gradient before the step."""
        before = self._evaluate(rows)  # item 1: true targets; weight decay does not enter
        hyper, decay = self.hyper, self.hyper["statistics_decay"]
        directions: list[dict[str, Array]] = [{} for _ in self.layers]
        for l, block in self.blocks.items():
            for name in block.names:  # item 2: heavy ball, no factor (1 - rho)
                block.momentum[name] = hyper["momentum_rho"] * block.momentum[name] + before.gradients[l][name]
            if k % hyper["T1_statistics"] == 0:  # item 3: of the mini-batch mean gradient, not of the momentum
                block.F = decay * block.F + (1 - decay) * block.products(before.gradients[l])
            if self.refreshes(k):  # item 4: with the F of item 3, updated or not
                block.invert(hyper["damping_lambda"])
            directions[l] |= block.direction()
        numbers = [hyper.get(f"diag_{name}", 0.0) for name in ("beta1", "beta2", "epsilon")]
        for (name, l), rule in self.diagonal.items():
            directions[l][name] = rule.direction(k, before.gradients[l][name], *numbers)
        for entry, direction in zip(self.parameters, directions, strict=True):  # item 5: every parameter decays
            for name in entry:
                shrunk = (1 - hyper["lr"] * hyper["weight_decay"]) * entry[name]
                entry[name] = shrunk - hyper["lr"] * direction[name]
        return before.loss, before.gradients


def run(
    meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], sampler: Sampler | None = None
) -> dict[str, NDArray[Any]]:
    """Replay a trajectory (or, with another `sampler`, record one); returns every array of the recorded format."""
    optimizer = MBF(meta, arrays, sampler or recorded(arrays))
    columns: dict[str, list[Any]] = {"inverse_iterations": []}
    results = {f"F_init_{l}": block.F.copy() for l, block in optimizer.blocks.items()}
    for k, rows in enumerate(arrays["batches"]):
        loss, gradients = optimizer.step(k, rows)
        record: dict[str, Any] = {"loss": loss}
        for l, entry in enumerate(optimizer.parameters):
            record |= {f"{name}_{l}": value for name, value in entry.items()}
            record |= {f"grad_{name}_{l}": value for name, value in gradients[l].items()}
        for l, block in optimizer.blocks.items():
            record |= {f"momentum_{name}_{l}": value for name, value in block.momentum.items()}
            record[f"F_{l}"] = block.F
            if optimizer.refreshes(k):
                record[f"F_inv_{l}"] = block.F_inv
        for (name, l), rule in optimizer.diagonal.items():
            record |= {f"ema_{name}_{l}": rule.e, f"v_{name}_{l}": rule.v}
        if optimizer.refreshes(k):
            record["inverse_iterations"] = k
        for name, value in record.items():
            columns.setdefault(name, []).append(np.array(value))
    results |= {name: np.array(values) for name, values in columns.items()}
    results["warm_targets"] = np.array(optimizer.warm_targets)
    results["margin_relu"] = np.array(optimizer.relu_margin)
    return results
