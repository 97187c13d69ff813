"""One training loop for methods that treat every layer by itself, and what each layer sees in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .kfac import Sampler
from .network import (
    Array,
    Evaluation,
    LayerRecord,
    Parameters,
    as_matrix,
    evaluate,
    from_matrix,
    initial_parameters,
    layers_with_matrices,
    targets_of,
)


@dataclass(frozen=True)
class Seen:
    """One layer on one mini-batch; `sampled_...` with targets drawn from the model, `None` where nobody draws."""

    gradient: Array  # [dW | db] of the batch-mean loss with true targets, no weight decay
    record: LayerRecord
    sampled_gradient: Array | None = None
    sampled_record: LayerRecord | None = None


class LayerMethod(Protocol):
    """What a method does on one layer."""

    samples: bool

    def warm(self, j: int, seen: Seen) -> None:
        """Mini-batch j of the pass over the data before training."""

    def step(self, k: int, seen: Seen) -> Array:
        """The direction of iteration k, as [W | b]; it is subtracted times the learning rate."""


Make = Callable[[tuple[int, int], Mapping[str, Any]], LayerMethod]


def run(
    meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], make: Make, sampler: Sampler
) -> dict[str, NDArray[Any]]:
    """Train; returns W_l and b_l after every iteration and the targets that were drawn, in order."""
    layers, hyper = layers_with_matrices(meta), meta["hyper"]
    parameters: Parameters = initial_parameters(arrays, len(layers))
    methods = [make(as_matrix(entry).shape, hyper) for entry in parameters]
    drawn: list[NDArray[Any]] = []

    def look(name: str, index: int, rows: NDArray[Any]) -> list[Seen]:
        x, true = arrays["data"][rows], targets_of(meta["loss"], arrays, rows)

        def at(targets: NDArray[Any]) -> Evaluation:
            return evaluate(layers, parameters, meta["loss"], x, targets)

        plain, sampled = at(true), None
        if methods[0].samples:
            drawn.append(sampler(name, index, plain.outputs))
            sampled = at(drawn[-1])
        return [
            Seen(as_matrix(plain.gradients[l]), plain.records[l])
            if sampled is None
            else Seen(
                as_matrix(plain.gradients[l]), plain.records[l], as_matrix(sampled.gradients[l]), sampled.records[l]
            )
            for l in range(len(layers))
        ]

    for j, rows in enumerate(arrays.get("warm_batches", ())):
        for method, seen in zip(methods, look("warm", j, rows), strict=True):
            method.warm(j, seen)
    columns: dict[str, list[Array]] = {}
    for k, rows in enumerate(arrays["batches"]):
        directions = [method.step(k, seen) for method, seen in zip(methods, look("step", k, rows), strict=True)]
        for l, direction in enumerate(directions):
            old = as_matrix(parameters[l])
            new = (1 - hyper["lr"] * hyper.get("gamma", 0.0)) * old - hyper["lr"] * direction
            parameters[l] = from_matrix(new, parameters[l])
            for name, value in parameters[l].items():
                columns.setdefault(f"{name}_{l}", []).append(value.copy())
    results: dict[str, Any] = {name: np.array(values) for name, values in columns.items()}
    return results | {"drawn": drawn}
