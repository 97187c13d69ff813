"""Full-batch least squares in function space: everything the theory asks of a step, from n x n matrices.

The residual e = u - y of n points moves by e+ = (I - eta K) e - eta E e, where K = J (F + lambda I)^{-1} J' / n depends
on the structure of F only, and E on how far the Jacobian J moves along the step (PAPERS 2.5). K is assembled from the
Gram matrices of the blocks' Jacobians, chunk by chunk: parameters never meet in a matrix of their own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ArgumentError, NumericalError, require_positive_integer
from .function_models import UnitModel

__all__ = ["FunctionSpace", "cholesky", "spectrum"]

_BYTES = 8
_COPIES = 4
"""Tensors of the size of a chunk that are alive at once: Jacobian, its copy by blocks, solution, product."""


def cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor of (..., k, k) matrices.

    Raises:
        NumericalError: if one is not positive definite.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise NumericalError(
            f"a Gram matrix of order {matrix.shape[-1]} plus damping is not positive definite: the blocks' Jacobians "
            "have too small a rank; take damping > 0"
        )
    return factor


def spectrum(matrix: Tensor) -> Tensor:
    """Ascending eigenvalues of the symmetric part."""
    eigenvalues: Tensor = torch.linalg.eigvalsh(0.5 * (matrix + matrix.mT))
    return eigenvalues


@dataclass(frozen=True)
class FunctionSpace:
    """A model seen through its outputs on n points.

    Args:
        model: with float64 parameters and targets.
        memory_bytes: room for the tensors of one chunk of units, > 0. On a CPU more than the default is no faster, and
            tensors just below the 32 MiB from which glibc maps them leave holes in the heap that add up.

    Raises:
        ArgumentError: if not even one unit fits; the message says how much it takes.
    """

    model: UnitModel
    memory_bytes: int = 2**24

    def __post_init__(self) -> None:
        require_positive_integer("memory_bytes", self.memory_bytes)
        needed = self.bytes_per_unit()
        if needed > self.memory_bytes:
            raise ArgumentError(
                f"one unit with {self.samples} samples takes {needed} bytes and memory_bytes is {self.memory_bytes}; "
                "give more memory or fewer samples"
            )

    @property
    def samples(self) -> int:
        """n."""
        return self.model.targets.shape[0]

    def bytes_per_unit(self) -> int:
        """What one unit adds to a chunk: its Jacobian and the Gram matrices of its blocks, with work space."""
        _, inputs, kernel = self.model.initial.shape
        order = min(self.samples, max(inputs, kernel))
        jacobian = self.samples * max(self.model.positions, inputs * kernel)
        grams = (inputs if kernel > 1 else 1) * order**2
        return _BYTES * _COPIES * (jacobian + grams)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges of units, one per chunk."""
        units = self.model.initial.shape[0]
        width = max(1, self.memory_bytes // self.bytes_per_unit())
        for low in range(0, units, width):
            yield low, min(low + width, units)

    def jacobians(self, theta: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(low, high, Jacobian (n, chunk, inputs, kernel)) over all chunks."""
        for low, high in self.ranges():
            yield low, high, self.model.jacobian(theta[low:high], low)

    def residual(self, theta: Tensor) -> Tensor:
        """e = u(theta) - y, (n,)."""
        result = -self.model.targets
        for low, high in self.ranges():
            result = result + self.model.part(theta[low:high], low)
        return result

    def gram(self, theta: Tensor) -> Tensor:
        """J J', (n, n)."""
        total = theta.new_zeros(self.samples, self.samples)
        for _, _, jacobian in self.jacobians(theta):
            rows = jacobian.flatten(1)
            total.addmm_(rows, rows.T)
        return total

    def largest_block(self, theta: Tensor) -> float:
        """Largest eigenvalue of J_b J_b' over the units b taken as blocks."""
        largest = 0.0
        for _, _, jacobian in self.jacobians(theta):
            rows = jacobian.flatten(2).transpose(0, 1)
            small = rows.mT @ rows if rows.shape[2] < rows.shape[1] else rows @ rows.mT
            largest = max(largest, float(torch.linalg.eigvalsh(small).max()))
        return largest

    def jacobian_change(self, theta: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Spectral norms of J(other) - J(theta), one per other point."""
        grams = theta.new_zeros(len(others), self.samples, self.samples)
        for low, high, jacobian in self.jacobians(theta):
            for index, other in enumerate(others):
                rows = (self.model.jacobian(other[low:high], low) - jacobian).flatten(1)
                grams[index].addmm_(rows, rows.T)
        norms: Tensor = torch.linalg.eigvalsh(grams)[:, -1].clamp(min=0.0).sqrt()
        return norms
