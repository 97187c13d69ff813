"""Small networks and data that the slow transcriptions and the optimizer are both run on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reference.network import BERNOULLI
from torch import Tensor, nn

Arrays = dict[str, NDArray[Any]]
SIZES = (4, 3, 2, 3, 4)
ACTIVATIONS = ("relu", "linear", "relu", "linear")
SAMPLES, BATCH, ITERATIONS = 20, 8, 8


def inputs(seed: int, full_batch: bool = False) -> Arrays:
    """Data in [0, 1], batches in two epochs, and initial weights."""
    generator = np.random.default_rng(seed)
    arrays: Arrays = {"data": generator.random((SAMPLES, SIZES[0]))}
    if full_batch:
        arrays["batches"] = np.tile(np.arange(SAMPLES), (ITERATIONS, 1))
    else:
        arrays["batches"] = np.array([generator.permutation(SAMPLES)[:BATCH] for _ in range(ITERATIONS)])
        arrays["warm_batches"] = np.arange(SAMPLES // BATCH * BATCH).reshape(-1, BATCH)
    for l, (inner, outer) in enumerate(itertools.pairwise(SIZES)):
        arrays[f"W_init_{l}"] = generator.normal(0, 1 / np.sqrt(inner), (outer, inner))
        arrays[f"b_init_{l}"] = generator.normal(0, 0.1, outer)
    return arrays


def network(arrays: Arrays) -> nn.Sequential:
    """The same network in torch."""
    modules: list[nn.Module] = []
    for l, (inner, outer) in enumerate(itertools.pairwise(SIZES)):
        layer = nn.Linear(inner, outer).double()
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(arrays[f"W_init_{l}"]))
            layer.bias.copy_(torch.from_numpy(arrays[f"b_init_{l}"]))
        modules += [layer, nn.ReLU()] if ACTIVATIONS[l] == "relu" else [layer]
    return nn.Sequential(*modules)


def mean_loss(loss: str, output: Tensor, target: Tensor) -> Tensor:
    """As the transcriptions: summed over outputs, mean over the batch."""
    if loss == BERNOULLI:
        return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(output)
    return 0.5 * (output - target).square().sum() / len(output)
