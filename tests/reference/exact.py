"""Exact curvature of a small network as dense matrices over all its parameters.

Parameters are flattened layer by layer: W row by row, then b. `mean` losses throughout: the Hessian and the generalised
Gauss-Newton matrix are those of the batch-mean loss.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .network import BERNOULLI, GAUSSIAN, Array, Batch, Parameters, forward, loss_per_sample


def flatten(parameters: Sequence[Mapping[str, Array]]) -> Array:
    """All parameters (or gradients, or directions) as one vector."""
    return np.concatenate([entry[name].ravel() for entry in parameters for name in ("W", "b") if name in entry])


def layer_slices(parameters: Sequence[Mapping[str, Array]]) -> list[slice]:
    """Where each layer lies in the flat vector."""
    ends = np.cumsum([sum(value.size for value in entry.values()) for entry in parameters])
    return [
        slice(int(end) - sum(v.size for v in entry.values()), int(end))
        for entry, end in zip(parameters, ends, strict=True)
    ]


def unflatten(flat: Tensor, like: Sequence[Mapping[str, Array]]) -> list[dict[str, Tensor]]:
    """Undo `flatten`, differentiably."""
    entries, start = [], 0
    for entry in like:
        named = {}
        for name in ("W", "b"):
            if name in entry:
                named[name] = flat[start : start + entry[name].size].reshape(entry[name].shape)
                start += entry[name].size
        entries.append(named)
    return entries


def hessian(batch: Batch, parameters: Parameters) -> Array:
    """Hessian of the batch-mean loss, shape (P, P)."""
    inputs = torch.tensor(batch.x, dtype=torch.float64)
    targets = torch.tensor(batch.targets, dtype=torch.float64)

    def value(flat: Tensor) -> Tensor:
        return loss_per_sample(
            batch.loss, forward(batch.layers, unflatten(flat, parameters), inputs)[0], targets
        ).mean()

    return np.asarray(torch.autograd.functional.hessian(value, torch.tensor(flatten(parameters))))


def jacobian(batch: Batch, parameters: Parameters) -> Array:
    """Derivative of every output of every sample, shape (B, C, P)."""
    inputs = torch.tensor(batch.x, dtype=torch.float64)

    def outputs(flat: Tensor) -> Tensor:
        return forward(batch.layers, unflatten(flat, parameters), inputs)[0]

    return np.asarray(torch.autograd.functional.jacobian(outputs, torch.tensor(flatten(parameters))))


def output_curvature(loss: str, outputs: Array) -> Array:
    """Hessian of each sample's loss with respect to its outputs, shape (B, C, C); independent of the targets."""
    if loss == GAUSSIAN:
        return np.array([np.eye(len(z)) for z in outputs])
    if loss == BERNOULLI:
        probabilities = 1.0 / (1.0 + np.exp(-outputs))
        return np.array([np.diag(p * (1 - p)) for p in probabilities])
    exponentials = np.exp(outputs - outputs.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    return np.array([np.diag(p) - np.outer(p, p) for p in probabilities])


def gauss_newton(batch: Batch, parameters: Parameters) -> Array:
    """Mean over samples of J^T (output curvature) J, which is the Fisher matrix too, shape (P, P)."""
    J = jacobian(batch, parameters)
    curvature = output_curvature(batch.loss, batch.evaluate(parameters).outputs)
    return np.mean([j.T @ c @ j for j, c in zip(J, curvature, strict=True)], axis=0)
