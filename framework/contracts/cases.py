"""The small networks with data that every contract is checked on; the same in every run, float64 unless asked."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...curvature.likelihoods import Likelihood, resolve_likelihood
from ...errors import ArgumentError

__all__ = ["CASES", "Batch", "Case", "MeanOverPositions", "low_rank"]

Batch = tuple[Tensor, Tensor]


class MeanOverPositions(nn.Module):
    """(N, S, d) to (N, d)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the middle axis."""
        return x.mean(1)


@dataclass(frozen=True)
class Case:
    """A small network with data, drawn from a seed; the global random state is never used.

    Args:
        name: short.
        make: builds the network with fresh parameters.
        shape: of one input sample.
        likelihood: of the output: ``"gaussian"``, ``"bernoulli"`` or ``"categorical"``; the loss is its negative
            log-likelihood.
        samples: N >= 1 of a mini-batch.
        dtype: of parameters and inputs.
        device: where they lie.
        seed: of parameters and data.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    likelihood: str = "gaussian"
    samples: int = 8
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ArgumentError(f"samples of a case must be >= 1, got {self.samples}")

    def model(self) -> nn.Module:
        """The network; a fresh copy with the same parameters each time."""
        return copy.deepcopy(_template(self))

    def generator(self, key: int = 0) -> torch.Generator:
        """A generator on the CPU that depends on the case's seed and ``key`` only."""
        return torch.Generator().manual_seed(self.seed * 7919 + key)

    def randn(self, *shape: int, key: int = 0) -> Tensor:
        """Normal numbers in the case's dtype, on its device."""
        return torch.randn(shape, generator=self.generator(key), dtype=torch.float64).to(self.device, self.dtype)

    def batch(self, index: int = 0, samples: int | None = None) -> Batch:
        """Mini-batch number ``index``: inputs (N, *shape) and targets; a fresh copy each time."""
        inputs, targets = _batch(self, index, self.samples if samples is None else samples)
        return inputs.clone(), targets.clone()

    def batches(self, count: int, change: Callable[[Tensor], Tensor] = lambda value: value) -> list[Batch]:
        """The first mini-batches, inputs and targets changed alike."""
        return [(change(inputs), change(targets)) for inputs, targets in map(self.batch, range(count))]

    def order(self) -> Tensor:
        """A random order of the samples."""
        return torch.randperm(self.samples, generator=self.generator(7)).to(self.device)

    def distribution(self) -> Likelihood:
        """The likelihood as an object."""
        found = resolve_likelihood(self.likelihood)
        assert found is not None
        return found

    def loss(self, output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """Negative log-likelihood, mean or sum over samples."""
        total = self.distribution().negative_log_likelihood(output, target)
        return total / output.shape[0] if reduction == "mean" else total

    def spd(self, size: int, condition: float = 100.0, key: int = 0) -> Tensor:
        """A symmetric positive definite matrix with eigenvalues from 1/sqrt(condition) to sqrt(condition)."""
        basis = torch.linalg.qr(torch.randn(size, size, generator=self.generator(key), dtype=torch.float64))[0]
        spread = 0.5 * math.log(condition)
        values = torch.linspace(-spread, spread, size, dtype=torch.float64).exp()
        matrix = (basis * values) @ basis.T
        symmetric: Tensor = 0.5 * (matrix + matrix.T)
        return symmetric.to(self.device, self.dtype)

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> Case:
        """The case in another precision or on another device."""
        return replace(self, dtype=dtype or self.dtype, device=device or self.device)


def low_rank(case: Case) -> Iterator[tuple[str, list[Batch]]]:
    """Pairs of mini-batches whose statistics do not have full rank, each with what it is, in words."""
    (inputs, targets), zeros = case.batch(), torch.zeros(case.samples, dtype=torch.long, device=case.device)
    yield "with every sample the same", [(inputs[zeros], targets[zeros])] * 2
    yield "with inputs of zero", [(torch.zeros_like(inputs), targets[zeros])] * 2
    yield "with one sample", [case.batch(0, 1), case.batch(1, 1)]


@functools.lru_cache(maxsize=64)
def _template(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return case.make().to(dtype=case.dtype, device=case.device)


@functools.lru_cache(maxsize=256)
def _batch(case: Case, index: int, samples: int) -> Batch:
    generator = case.generator(1000 + index)
    inputs = torch.randn((samples, *case.shape), generator=generator, dtype=torch.float64)
    inputs = inputs.to(case.device, case.dtype)
    with torch.no_grad():
        output = case.model()(inputs)
    if case.likelihood == "categorical":
        target = torch.randint(0, output.shape[1], (samples, *output.shape[2:]), generator=generator)
        return inputs, target.to(case.device)
    target = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    target = (target > 0).double() if case.likelihood == "bernoulli" else target
    return inputs, target.to(case.device, case.dtype)


def _dense() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def _sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), MeanOverPositions(), nn.Linear(3, 2))


def _grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 2))


CASES: tuple[Case, ...] = (
    Case("dense", _dense, (3,)),
    Case("conv", _conv, (1, 3, 3), "categorical", seed=1),
    Case("sequence", _sequence, (3, 2), "bernoulli", seed=2),
    Case("grouped", _grouped, (2, 2, 2), seed=3),
)
"""A bias-free and a biased dense layer, a convolution, a layer with shared positions, groups; every likelihood."""
