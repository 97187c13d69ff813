"""Damped least squares over all parameters: (A'A + lambda I) x = A'u + v for one A and many lambda, u and v.

A (V, P) has one row per residual, scaled such that A'A is the Gauss-Newton matrix of the loss. A system is prepared
once per mini-batch and then solved for every damping that a step tries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...errors import ArgumentError, NumericalError, require_interval, require_positive_integer

__all__ = [
    "ConjugateGradients",
    "NormalEquations",
    "Products",
    "ResidualKernel",
    "SingularValues",
    "Solver",
    "System",
    "SystemBySize",
    "products_of",
]


@dataclass(frozen=True)
class Products:
    """A as what it does to vectors, for systems that need no more.

    Attributes:
        shape: (V, P).
        times: (P,) -> (V,), A x.
        transposed: (V,) -> (P,), A'u.
        like: a tensor of its dtype and device.
    """

    shape: tuple[int, int]
    times: Callable[[Tensor], Tensor]
    transposed: Callable[[Tensor], Tensor]
    like: Tensor


def products_of(rows: Tensor) -> Products:
    """Products with a matrix (V, P) that is there."""
    return Products((rows.shape[0], rows.shape[1]), lambda x: rows @ x, lambda u: rows.T @ u, rows)


class Solver(Protocol):
    """One prepared system."""

    def solve(self, residual: Tensor, rest: Tensor | None, damping: float) -> Tensor:
        """x with (A'A + damping I) x = A' residual + rest.

        Args:
            residual: (V,).
            rest: (P,), what of the right side is not in that form; ``None``: nothing.
            damping: > 0, in units of A'A.
        """

    @property
    def largest(self) -> float:
        """The largest eigenvalue of A'A, or an estimate within a factor of two: what damping is measured in."""


class System(Protocol):
    """How the equations are solved."""

    matrix_free: bool
    """Whether products are enough."""

    def declines(self, residuals: int, parameters: int) -> str:
        """Why it does not take a system of this size, or an empty string."""

    def prepare(self, rows: Tensor | None, products: Products) -> Solver:
        """Prepared for one A; ``rows`` is the matrix (V, P), ``None`` for a system that is ``matrix_free``."""


def _beyond(limit: int, what: str, size: int, way_out: str) -> str:
    return "" if size <= limit else f"{size} {what} are more than limit={limit}; {way_out}"


@dataclass(frozen=True)
class SingularValues:
    """By a thin singular value decomposition A = U S W': x = W S (S^2 + lambda)^{-1} U'u, whatever lambda.

    The only one that loses nothing: A'A has the square of A's condition number, and half of the digits of its small
    eigenvalues are rounding. Every further damping costs two products.

    Args:
        limit: on min(V, P), >= 1.

    Memory: A, and as much again. Cost: about 10 V P min(V, P) flops per mini-batch.
    """

    limit: int = 4096
    matrix_free = False

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("limit", self.limit)

    def declines(self, residuals: int, parameters: int) -> str:
        """Both sides beyond the limit."""
        return _beyond(
            self.limit, "residuals and parameters", min(residuals, parameters), "ConjugateGradients() takes any"
        )

    def prepare(self, rows: Tensor | None, products: Products) -> _Decomposed:
        """The decomposition."""
        assert rows is not None
        try:
            left, values, right = torch.linalg.svd(rows, full_matrices=False)
        except RuntimeError:  # the divide-and-conquer driver has not converged; the spectrum of the smaller side has
            wide = rows.shape[0] < rows.shape[1]
            squares, basis = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
            values = squares.clamp(min=0.0).sqrt().clamp(min=torch.finfo(rows.dtype).tiny)
            left, right = (basis, basis.T @ rows / values[:, None]) if wide else (rows @ basis / values, basis.T)
        return _Decomposed(left, values, right)


@dataclass(frozen=True)
class _Decomposed:
    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def largest(self) -> float:
        return float(self.values.max() ** 2)

    def solve(self, residual: Tensor, rest: Tensor | None, damping: float) -> Tensor:
        squares = self.values**2 + damping
        coordinates = self.values * (self.left.T @ residual) / squares
        if rest is None:
            return self.right.T @ coordinates
        own = self.right @ rest
        return self.right.T @ (coordinates + own / squares) + (rest - self.right.T @ own) / damping


@dataclass(frozen=True)
class NormalEquations:
    """By a Cholesky factorisation of A'A + lambda I, for fewer parameters than residuals.

    Args:
        limit: on P, >= 1.

    Memory: P^2 numbers. Cost: V P^2 flops per mini-batch and P^3 / 3 per damping. Damping below the rounding of A'A is
    raised until the factorisation exists.
    """

    limit: int = 4096
    matrix_free = False

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("limit", self.limit)

    def declines(self, residuals: int, parameters: int) -> str:
        """More parameters than the limit."""
        return _beyond(self.limit, "parameters", parameters, "ResidualKernel() works on the residuals' side")

    def prepare(self, rows: Tensor | None, products: Products) -> _Normal:
        """A'A."""
        assert rows is not None
        return _Normal(rows, rows.T @ rows)


@dataclass(frozen=True)
class _Normal:
    rows: Tensor
    matrix: Tensor

    @property
    def largest(self) -> float:
        return float(self.matrix.diagonal().sum())

    def solve(self, residual: Tensor, rest: Tensor | None, damping: float) -> Tensor:
        right = self.rows.T @ residual
        factor = _factor(self.matrix, damping)
        return torch.cholesky_solve((right if rest is None else right + rest).unsqueeze(1), factor).squeeze(1)


@dataclass(frozen=True)
class ResidualKernel:
    """By a Cholesky factorisation of A A' + lambda I, for fewer residuals than parameters (Woodbury).

    Args:
        limit: on V, >= 1.

    Memory: V^2 numbers. Cost: V^2 P flops per mini-batch and V^3 / 3 per damping.
    """

    limit: int = 4096
    matrix_free = False

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("limit", self.limit)

    def declines(self, residuals: int, parameters: int) -> str:
        """More residuals than the limit."""
        return _beyond(self.limit, "residuals", residuals, "NormalEquations() works on the parameters' side")

    def prepare(self, rows: Tensor | None, products: Products) -> _OnResiduals:
        """A A'."""
        assert rows is not None
        return _OnResiduals(rows, rows @ rows.T)


@dataclass(frozen=True)
class _OnResiduals:
    rows: Tensor
    matrix: Tensor

    @property
    def largest(self) -> float:
        return float(self.matrix.diagonal().sum())

    def solve(self, residual: Tensor, rest: Tensor | None, damping: float) -> Tensor:
        factor = _factor(self.matrix, damping)
        found = self.rows.T @ torch.cholesky_solve(residual.unsqueeze(1), factor).squeeze(1)
        if rest is None:
            return found
        inner = torch.cholesky_solve((self.rows @ rest).unsqueeze(1), factor).squeeze(1)
        return found + (rest - self.rows.T @ inner) / damping


def _factor(matrix: Tensor, damping: float) -> Tensor:
    """Cholesky factor of a semi-definite matrix + damping, tenfold until it exists."""
    floor = torch.finfo(matrix.dtype).eps * float(matrix.diagonal().max())
    for _ in range(20):
        damped: Tensor = matrix + damping * torch.eye(len(matrix)).to(matrix)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            found: Tensor = factor
            return found
        damping = max(10.0 * damping, floor)
    raise NumericalError("the Gauss-Newton matrix has no Cholesky factor at any damping; are the residuals finite?")


@dataclass(frozen=True)
class ConjugateGradients:
    """By conjugate gradients on products with A, for any size: nothing of size V P is ever stored.

    Args:
        iterations: at most, >= 1.
        tolerance: in (0, 1): the residual of the equations, relative to their right side, at which they are solved.

    Memory: a few vectors, and the graph of the residuals. Cost: two products with A per iteration, each about two
    gradients.
    """

    iterations: int = 200
    tolerance: float = 1e-8
    matrix_free = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("iterations", self.iterations)
        require_interval("tolerance", self.tolerance, 0.0, 1.0, closed="()")

    def declines(self, residuals: int, parameters: int) -> str:
        """Nothing."""
        return ""

    def prepare(self, rows: Tensor | None, products: Products) -> _Iterated:
        """Nothing but an estimate of the largest eigenvalue, by ten iterations of the power method."""
        generator = torch.Generator(device=products.like.device).manual_seed(0)
        like = products.like
        vector = torch.randn(products.shape[1], generator=generator, dtype=like.dtype, device=like.device)
        size = 0.0
        for _ in range(10):
            vector = vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
            vector = products.transposed(products.times(vector))
            size = float(vector.norm())
        return _Iterated(products, size, self.iterations, self.tolerance)


@dataclass(frozen=True)
class _Iterated:
    products: Products
    largest: float
    iterations: int
    tolerance: float

    def solve(self, residual: Tensor, rest: Tensor | None, damping: float) -> Tensor:
        right = self.products.transposed(residual)
        right = right if rest is None else right + rest
        found, left, along = torch.zeros_like(right), right, right
        size = float(left @ left)
        goal = self.tolerance**2 * size
        for _ in range(self.iterations):
            if size <= goal:
                break
            image = self.products.transposed(self.products.times(along)) + damping * along
            step = size / float(along @ image)
            found, left = found + step * along, left - step * image
            before, size = size, float(left @ left)
            along = left + (size / before) * along
        return found


@dataclass(frozen=True)
class SystemBySize:
    """By what suits the size: singular values of A up to ``exact``, then a Cholesky factor of the smaller side up to
    ``limit``, then conjugate gradients.

    Args:
        exact: on min(V, P), >= 1: beyond, singular values take longer than the rest of a step.
        limit: on min(V, P), >= 1.
        entries: on V P, >= 1: a larger A is not stored (2^27 numbers are 1 GiB in double precision).
        iterative: beyond that.
    """

    exact: int = 1024
    limit: int = 8192
    entries: int = 2**27
    iterative: ConjugateGradients = field(default_factory=ConjugateGradients)

    def __post_init__(self) -> None:
        require_fields(self)
        for name in ("exact", "limit", "entries"):
            require_positive_integer(name, getattr(self, name))

    matrix_free = False

    def chosen(self, residuals: int, parameters: int) -> System:
        """The system for a size."""
        small = min(residuals, parameters)
        if residuals * parameters > self.entries or small > self.limit:
            return self.iterative
        if small <= self.exact:
            return SingularValues(self.exact)
        return NormalEquations(self.limit) if parameters <= residuals else ResidualKernel(self.limit)

    def declines(self, residuals: int, parameters: int) -> str:
        """Nothing."""
        return ""

    def prepare(self, rows: Tensor | None, products: Products) -> Solver:
        """By the system for its size."""
        return self.chosen(*products.shape).prepare(rows, products)


def chosen_system(system: System, residuals: int, parameters: int) -> System:
    """The system that takes a size.

    Raises:
        ArgumentError: if it does not, with the way out.
    """
    found = system.chosen(residuals, parameters) if isinstance(system, SystemBySize) else system
    reason = found.declines(residuals, parameters)
    if reason:
        raise ArgumentError(f"{type(found).__name__}: {reason}, or SystemBySize() what suits the size")
    return found
