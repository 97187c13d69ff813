"""Spectra of symmetric matrices of which only products are known: extreme eigenvalues, norms, densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from ...errors import ArgumentError, require_positive_integer

__all__ = [
    "Density",
    "SymmetricOperator",
    "conjugate_gradients",
    "cosine",
    "lanczos",
    "relative_to",
    "signs",
    "spectral_density",
]

_DENSE = 64
"""Up to this order eigenvalues come from the dense matrix: Lanczos iterations need room."""

_ROOM = 60
"""Vectors of a Lanczos basis."""

_RESTARTS = 5
"""Of a basis, before its best value counts."""


@dataclass(frozen=True)
class SymmetricOperator:
    """A symmetric matrix as a product, in float64.

    Args:
        size: its order d.
        product: (d,) -> (d,).
        device: of the vectors.
        many: the product with every row of (n, d) at once, where that is cheaper.
    """

    size: int
    product: Callable[[Tensor], Tensor]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    many: Callable[[Tensor], Tensor] | None = None

    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        """The sum."""
        return SymmetricOperator(self.size, lambda v: self.product(v) + other.product(v), self.device)

    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator:
        """The difference."""
        return SymmetricOperator(self.size, lambda v: self.product(v) - other.product(v), self.device)

    def shifted(self, value: float) -> SymmetricOperator:
        """Plus ``value`` times the identity."""
        many = self.many
        both = None if many is None else lambda rows: many(rows) + value * rows
        return SymmetricOperator(self.size, lambda v: self.product(v) + value * v, self.device, both)

    def dense(self) -> Tensor:
        """The matrix, column by column; symmetrised."""
        basis = torch.eye(self.size, dtype=torch.float64, device=self.device)
        if self.many is not None:
            matrix = torch.cat([self.many(rows) for rows in basis.split(64)])
        else:
            matrix = torch.stack([self.product(column) for column in basis])
        return 0.5 * (matrix + matrix.T)

    def scipy(self) -> LinearOperator:
        """For scipy's iterations."""

        def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            given = torch.as_tensor(np.ascontiguousarray(vector).reshape(-1), dtype=torch.float64, device=self.device)
            result: NDArray[np.float64] = self.product(given).cpu().numpy()
            return result

        return LinearOperator((self.size, self.size), matvec=product, dtype=np.float64)

    def extremes(
        self,
        metric: Metric | None = None,
        tolerance: float = 1e-8,
        restarts: int = _RESTARTS,
        dense: int = _DENSE,
    ) -> tuple[float, float]:
        """Smallest and largest eigenvalue.

        One Lanczos run finds both; scipy's iteration goes on with an end whose error bound is still too large.

        Args:
            metric: a positive definite C and its inverse: eigenvalues of C^-1 times this matrix.
            tolerance: accuracy relative to the value, > 0; to a thousandth of the largest one for values below that.
            restarts: of scipy's iteration, >= 0. Where they are used up the best Ritz value counts, which lies inside
                the spectrum.
            dense: up to this order, at least 64, eigenvalues come from the dense matrix.
        """
        if self.size <= max(dense, _DENSE):
            values = _dense_eigenvalues(self, metric)
            return float(values[0]), float(values[-1])
        start = torch.as_tensor(np.random.default_rng(0).standard_normal(self.size), device=self.device)
        errors = [float("inf")] * 2

        def close(values: Tensor, bounds: Tensor) -> bool:
            largest = float(values.abs().max())
            allowed = tolerance * values[[0, -1]].abs().clamp(min=1e-3 * largest)
            errors[:] = (bounds[[0, -1]] - allowed).tolist()
            return max(errors) <= 0.0

        values = lanczos(self, start, _ROOM, metric, close)[0]
        ends = [float(values[0]), float(values[-1])]
        for index, which in enumerate(("SA", "LA")):
            if errors[index] > 0.0 and restarts:
                ends[index] = self._eigenvalue(which, metric, (tolerance, restarts), ends[index])
        return ends[0], ends[1]

    def norm(self, tolerance: float = 1e-8, restarts: int = _RESTARTS) -> float:
        """Operator norm; arguments as :meth:`extremes`."""
        return max(abs(value) for value in self.extremes(None, tolerance, restarts))

    def _eigenvalue(self, which: str, metric: Metric | None, effort: tuple[float, int], otherwise: float) -> float:
        start = np.random.default_rng(0).standard_normal(self.size)
        given: dict[str, Any] = {} if metric is None else {"M": metric[0].scipy(), "Minv": metric[1].scipy()}
        given |= {"which": which, "tol": effort[0], "maxiter": effort[1], "ncv": min(self.size, _ROOM), "v0": start}
        try:
            return float(eigsh(self.scipy(), k=1, return_eigenvectors=False, **given)[0])
        except ArpackNoConvergence:  # tightly clustered, as at the zeros of a singular matrix: a Ritz value will do
            return otherwise


Metric = tuple[SymmetricOperator, SymmetricOperator]


def _dense_eigenvalues(operator: SymmetricOperator, metric: Metric | None) -> Tensor:
    matrix = operator.dense()
    if metric is not None:
        matrix = relative_to(matrix, metric[0].dense())
    result: Tensor = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T))
    return result


def relative_to(matrix: Tensor, metric: Tensor) -> Tensor:
    """(..., d, d) L^-1 M L^-T for a positive definite C = L L': symmetric, with the eigenvalues of C^-1 M."""
    factor = torch.linalg.cholesky(metric)
    half = torch.linalg.solve_triangular(factor, matrix, upper=False)
    result: Tensor = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    return result


def cosine(left: Tensor, right: Tensor) -> float:
    """Of the angle between two vectors; ``nan`` if one of them is zero."""
    lengths = torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right)
    return float(torch.dot(left, right) / lengths) if float(lengths) > 0.0 else math.nan


def signs(operator: SymmetricOperator, probes: int, generator: torch.Generator) -> list[Tensor]:
    """Vectors z of random signs that fit an operator M: |M z|^2 is |M|_F^2 on average (Hutchinson's estimator)."""
    drawn = torch.randint(0, 2, (probes, operator.size), generator=generator)
    return list((2.0 * drawn.double() - 1.0).to(operator.device))


def lanczos(
    operator: SymmetricOperator,
    start: Tensor,
    steps: int,
    metric: Metric | None = None,
    enough: Callable[[Tensor, Tensor], bool] = lambda values, bounds: False,
) -> tuple[Tensor, Tensor]:
    """Lanczos' tridiagonal matrix with full reorthogonalisation.

    Args:
        operator: symmetric M.
        start: (d,) not zero.
        steps: >= 1; fewer are taken where the Krylov space ends.
        metric: a positive definite C and its inverse: of C^-1 M, in the inner product of C.
        enough: asked after every tenth step with the Ritz values so far and a bound of the distance of each to an
            eigenvalue; true ends the iteration.

    Returns:
        Ritz values, ascending, and the weights of the quadrature they are nodes of (summing to 1).
    """
    own = SymmetricOperator(operator.size, lambda v: v, operator.device)
    product, solve = (own, own) if metric is None else metric
    room = min(steps, operator.size)
    basis = start.new_empty(room, operator.size)
    duals = basis if metric is None else torch.empty_like(basis)
    residual, dual = start, product.product(start)
    diagonal: list[float] = []
    beside = [float(torch.dot(start, dual).sqrt())]
    for size in range(1, room + 1):
        basis[size - 1], duals[size - 1] = residual / beside[-1], dual / beside[-1]
        image = operator.product(basis[size - 1])
        diagonal.append(float(torch.dot(image, basis[size - 1])))
        residual = solve.product(image)
        for _ in range(2):  # twice is enough
            residual = residual - basis[:size].T @ (duals[:size] @ residual)
        dual = product.product(residual)
        length = float(torch.dot(residual, dual).clamp(min=0.0).sqrt())
        if length <= 1e-12 * (abs(diagonal[-1]) + sum(beside[1:][-1:]) + 1e-300):
            length = 0.0
        if length == 0.0 or size % 10 == 0:
            values, vectors = _tridiagonal(diagonal, beside[1:])
            if enough(values, length * vectors[-1].abs()) or length == 0.0:
                break
        beside.append(length)
    values, vectors = _tridiagonal(diagonal, beside[1 : len(diagonal)])
    return values, vectors[0].square()


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors."""
    matrix, off = (torch.tensor(entries, dtype=torch.float64) for entries in (diagonal, beside))
    values, vectors = torch.linalg.eigh(torch.diag(matrix) + torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors


@dataclass(frozen=True)
class Density:
    """A spectrum as nodes with weights that sum to 1, as many distributions as there were probes, averaged."""

    nodes: Tensor
    weights: Tensor

    def moment(self, power: int) -> float:
        """Mean of lambda^power over the spectrum."""
        return float((self.weights * self.nodes**power).sum())

    def below(self, value: float) -> float:
        """Share of the eigenvalues below ``value``."""
        return float(self.weights[self.nodes < value].sum())


def spectral_density(operator: SymmetricOperator, *, probes: int = 8, steps: int = 60) -> Density:
    """Stochastic Lanczos quadrature of the distribution of eigenvalues (Ubaru, Chen, Saad, SIMAX 38 (2017), section 3).

    Args:
        operator: symmetric.
        probes: random start vectors, >= 1.
        steps: of Lanczos' iteration from each, >= 1: polynomials up to degree 2 steps - 1 are integrated exactly.
    """
    require_positive_integer("probes", probes)
    require_positive_integer("steps", steps)
    drawn = signs(operator, probes, torch.Generator().manual_seed(0))
    found = [lanczos(operator, start, steps) for start in drawn]
    return Density(torch.cat([nodes for nodes, _ in found]), torch.cat([weights for _, weights in found]) / probes)


def conjugate_gradients(
    operator: SymmetricOperator, right: Tensor, *, tolerance: float = 1e-8, limit: int = 1000
) -> Tensor:
    """Solve M x = b for a positive definite M.

    Args:
        operator: M.
        right: (d,) b.
        tolerance: of |M x - b| / |b|, > 0.
        limit: of iterations, >= 1; the last iterate is returned where they are used up.

    Raises:
        ArgumentError: if a direction of negative or no curvature shows that M is not positive definite.
    """
    result, residual = torch.zeros_like(right), right.clone()
    direction, square = residual.clone(), torch.dot(residual, residual)
    target = tolerance**2 * float(square)
    for _ in range(limit):
        if float(square) <= target:
            break
        image = operator.product(direction)
        curvature = torch.dot(direction, image)
        if not float(curvature) > 0.0:
            raise ArgumentError(
                f"conjugate gradients need a positive definite matrix, found d'Md = {float(curvature):g}; raise the "
                "damping, or use the Gauss-Newton matrix"
            )
        along = square / curvature
        result = result + along * direction
        residual = residual - along * image
        new = torch.dot(residual, residual)
        direction, square = residual + (new / square) * direction, new
    return result
