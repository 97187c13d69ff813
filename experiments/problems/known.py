"""Convex problems whose least training loss is known, all samples at once: how far is a run from it?"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import ArgumentError, NumericalError
from ..networks.models import seeded
from .problem import GENERATED_HERE, Data, Problem, Source, is_small, require_seed

__all__ = ["least_squares_optimum", "logistic", "logistic_optimum", "quadratic"]

_SOURCE = Source("random numbers", GENERATED_HERE, "ours")
_NEWTON_STEPS = 50
_NEWTON_GRADIENT = 1e-12


def logistic(size: str = "full", data_seed: int = 0) -> Problem:
    """Return logistic regression on generated data with labels at random, so that the optimum is finite.

    Args:
        size: ``full``: 5000 training samples, 50 features of scales 1 ... 0.03; ``small``: 300 and 8.
        data_seed: decides the samples, >= 0.
    """
    small = is_small(size)
    require_seed(data_seed)
    samples, features = (300, 8) if small else (5000, 50)

    def load(data_dir: Path | None) -> Data:
        rng = np.random.default_rng(data_seed)
        weights = rng.standard_normal(features)
        scales = np.logspace(0, -1.5, features)
        inputs = rng.standard_normal((2 * samples, features)) * scales
        chance = 1 / (1 + np.exp(-inputs @ (weights / scales) / math.sqrt(features)))
        labels = (rng.random(2 * samples) < chance)[:, None]
        return _halves(inputs, labels)

    return Problem(
        name="logistic",
        summary=f"{samples} generated samples of two kinds, {features} features, logistic regression",
        likelihood="bernoulli",
        epochs=200,
        build_model=partial(seeded, lambda: nn.Linear(features, 1)),
        load=load,
        source=_SOURCE,
        optimum=logistic_optimum,
    )


def quadratic(size: str = "full", condition: float = 1e4, data_seed: int = 0) -> Problem:
    """Return least squares whose Hessian has eigenvalues from 1 down to 1 / condition, equally spaced in logarithm.

    Args:
        size: ``full``: 100 unknowns; ``small``: 10.
        condition: number >= 1.
        data_seed: decides samples and eigenvectors, >= 0.
    """
    dimension = 10 if is_small(size) else 100
    require_seed(data_seed)
    if not 1 <= condition < math.inf:
        raise ArgumentError(f"condition must be >= 1 and finite, got {condition!r}")

    def load(data_dir: Path | None) -> Data:
        rng = np.random.default_rng(data_seed)
        basis = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0]
        solution = rng.standard_normal((dimension, 1))
        parts = []
        for _ in range(2):  # training and test samples: the same Hessian, other noise
            directions = np.linalg.qr(rng.standard_normal((4 * dimension, dimension)))[0]
            inputs = directions * np.sqrt(4 * dimension * np.logspace(0, -math.log10(condition), dimension)) @ basis.T
            parts.append((inputs, inputs @ solution + 0.1 * rng.standard_normal((4 * dimension, 1))))
        return _halves(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))

    return Problem(
        name="quadratic",
        summary=f"least squares, {dimension} unknowns, condition {condition:g}",
        likelihood="gaussian",
        epochs=200,
        build_model=partial(seeded, lambda: nn.Linear(dimension, 1, bias=False)),
        load=load,
        source=_SOURCE,
        optimum=least_squares_optimum,
    )


def logistic_optimum(data: Data) -> float:
    """Return the least mean cross entropy of a linear model with bias: damped Newton steps to a gradient of 1e-12.

    Raises:
        NumericalError: the classes can be separated, or it does not get there.
    """
    inputs, labels = _double(data)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    signs = 2 * labels - 1
    weights = torch.zeros(inputs.shape[1], 1, dtype=torch.float64)

    def loss_at(weights: Tensor) -> float:
        return float(nn.functional.softplus(-signs * (inputs @ weights)).mean())

    loss = loss_at(weights)
    for _ in range(_NEWTON_STEPS):
        chance = torch.sigmoid(inputs @ weights)
        gradient = inputs.T @ (chance - labels) / len(inputs)
        if bool((signs * (inputs @ weights) > 0).all()):
            raise NumericalError("the classes of the logistic regression can be separated, so it has no optimum")
        if float(gradient.norm()) < _NEWTON_GRADIENT:
            return loss
        hessian = inputs.T @ (inputs * chance * (1 - chance)) / len(inputs)
        direction = torch.cholesky_solve(gradient, torch.linalg.cholesky(hessian))
        step = 1.0
        while loss_at(weights - step * direction) > loss and step > 1e-3:
            step /= 2
        weights = weights - step * direction
        loss = loss_at(weights)
    raise NumericalError(f"Newton's method finds no optimum of the logistic regression in {_NEWTON_STEPS} steps")


def least_squares_optimum(data: Data) -> float:
    """Return the least half mean squared error of a linear model without bias, in double precision."""
    inputs, targets = _double(data)
    solution = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
    return float(0.5 * (inputs @ solution - targets).square().sum() / len(inputs))


def _double(data: Data) -> tuple[Tensor, Tensor]:
    return data.train_inputs.double().cpu(), data.train_targets.double().cpu()


def _halves(inputs: NDArray[np.float64], targets: NDArray[np.generic]) -> Data:
    """Return the first half as training samples and the second as test samples, in single precision."""
    tensors = [torch.from_numpy(part.astype(np.float32)) for part in (inputs, targets)]
    half = len(inputs) // 2
    return Data(tensors[0][:half], tensors[1][:half], tensors[0][half:], tensors[1][half:])
