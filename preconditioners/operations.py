"""Matrix operations that a structure may ask for: a rule per operation, requests of all layers in one batched call.

A structure answers ``matrices`` with :class:`Request` objects; :func:`compute_many` groups them by operation. What all
operations promise: the matrix of a request is not modified; half precision is factorised in float32; small matrices of
one order are stacked; a matrix that defeats every retry gives ``value=None`` and costs nobody else anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..checking import require_fields
from ..errors import require_finite_nonnegative, require_interval
from .linalg import RETRIES, Computed, factorisation_dtype, inverse_of_many, stack, stackable

__all__ = [
    "AbsoluteInverse",
    "Eigenvectors",
    "Inverse",
    "InverseRoot",
    "Operation",
    "PowerIteration",
    "Request",
    "compute_many",
]


class Operation(Protocol):
    """A rule from symmetric matrices to what is needed of them. Rules are compared: equal ones share a call."""

    def compute(self, requests: Sequence[Request]) -> list[Computed]:
        """One result per request, in order."""


@dataclass(frozen=True)
class Inverse:
    """(M + damping I)^{-1} by Cholesky, for positive semi-definite M; rescued by tenfold damping."""

    def compute(self, requests: Sequence[Request]) -> list[Computed]:
        """See :func:`.linalg.inverse_of_many`."""
        return inverse_of_many([entry.matrix for entry in requests], [entry.damping for entry in requests])


@dataclass(frozen=True)
class InverseRoot:
    """(M + damping I)^{-1/p} by eigenvalues, for positive semi-definite M.

    Negative eigenvalues within rounding (d u |M|, u the unit of the dtype) count as zero; beyond that the damping is
    raised tenfold, up to four times, until the damped matrix is definite.

    Args:
        p: > 0, finite; Shampoo on matrices takes 4 (arXiv:1802.09568v2, Algorithm 1).
    """

    p: float = 4.0

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("p", self.p, 0.0, float("inf"), closed="()")

    def compute(self, requests: Sequence[Request]) -> list[Computed]:
        """One eigendecomposition per group, one synchronisation per matrix of a group."""
        return [self._finish(entry, *found) for entry, found in zip(requests, _spectra(requests), strict=True)]

    def _finish(self, request: Request, values: Tensor | None, vectors: Tensor | None) -> Computed:
        if values is None or vectors is None:
            return Computed(None, RETRIES, request.damping)
        tolerance = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
        values = torch.where(values < -tolerance, values, values.clamp(min=0.0))
        lowest = float(values.min())
        for attempt in range(RETRIES + 1):
            damping = request.damping * 10.0**attempt
            if lowest + damping > 0.0:
                root = (vectors * (values + damping).pow(-1.0 / self.p).unsqueeze(-2)) @ vectors.mT
                return Computed(root.to(request.matrix.dtype), attempt, damping)
        return Computed(None, RETRIES, request.damping)


@dataclass(frozen=True)
class AbsoluteInverse:
    """(|M| + damping I)^{-1}, |M| with the absolute values of M's eigenvalues: for indefinite matrices.

    Implements: the saddle-free Newton step of arXiv:1406.2572v1, section 5. Damping is ours; it needs damping > 0
    only where M is singular.
    """

    def compute(self, requests: Sequence[Request]) -> list[Computed]:
        """One eigendecomposition per group."""
        results: list[Computed] = []
        for request, (values, vectors) in zip(requests, _spectra(requests), strict=True):
            if values is None or vectors is None:
                results.append(Computed(None, RETRIES, request.damping))
                continue
            scale = 1.0 / (values.abs() + request.damping)
            inverse = (vectors * scale.unsqueeze(-2)) @ vectors.mT
            results.append(Computed(inverse.to(request.matrix.dtype), 0, request.damping))
        return results


@dataclass(frozen=True)
class Eigenvectors:
    """Orthonormal eigenvectors of M as columns, largest eigenvalue first, with the eigenvalues as ``spectrum``.

    Args:
        ramp: >= 0, in units of sqrt(u) |M|_F, u the unit of the dtype: 0 ... ramp is added along the diagonal. Without
            it (0) the basis of a space where eigenvalues are equal, the null space above all, is decided by rounding.
    """

    ramp: float = 0.0

    def __post_init__(self) -> None:
        require_fields(self)
        require_finite_nonnegative("ramp", self.ramp)

    def _ramped(self, request: Request) -> Request:
        matrix = request.matrix.to(factorisation_dtype(request.matrix.dtype))
        slope = self.ramp * _noise(matrix).unsqueeze(-1)
        steps = torch.linspace(0.0, 1.0, matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        ramped = matrix.clone()
        ramped.diagonal(dim1=-2, dim2=-1).add_(slope * steps)
        return replace(request, matrix=ramped)

    def compute(self, requests: Sequence[Request]) -> list[Computed]:
        """One eigendecomposition per group. The damping plays no part but is passed on."""
        results: list[Computed] = []
        ramped = [self._ramped(request) for request in requests] if self.ramp else requests
        for request, (values, vectors) in zip(requests, _spectra(ramped), strict=True):
            if values is None or vectors is None:
                results.append(Computed(None, RETRIES, request.damping))
                continue
            dtype = request.matrix.dtype
            # Row-major, so that a loaded copy multiplies with the same rounding as the original.
            basis, spectrum = vectors.flip(-1).contiguous().to(dtype), values.flip(-1).to(dtype)
            results.append(Computed(basis, 0, request.damping, spectrum))
        return results


@dataclass(frozen=True)
class PowerIteration:
    """One step of orthogonal iteration from the request's ``start``: the Q of M start, cheaper than eigenvectors.

    Implements: arXiv:2409.11321v2, Algorithm 4. As in the authors' code the columns are orthogonalised in the order
    of their Rayleigh quotients, largest first; the result is put back into the order of ``start``, so column j
    continues column j and whatever is stored per column stays valid. So do the signs.

    Departs from both: Q of (M + shift I) start. A column that M maps to zero then stays where it is, instead of
    becoming normalised rounding errors.

    Args:
        shift: >= 0, in units of sqrt(u) |M|_F, u the unit of the dtype; 0 is the paper's.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        require_fields(self)
        require_finite_nonnegative("shift", self.shift)

    def compute(self, requests: Sequence[Request]) -> list[Computed]:
        """One product, one QR and one synchronisation per request; a matrix that is not finite gives ``None``."""
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Computed:
        assert request.start is not None
        dtype = factorisation_dtype(request.matrix.dtype)
        start = request.start.to(dtype)
        matrix = request.matrix.to(dtype)
        moved = matrix @ start
        moved += self.shift * _noise(matrix) * start
        if not bool(moved.isfinite().all()):
            return Computed(None, RETRIES, request.damping)
        quotients = (start * moved).sum(-2)
        order = quotients.argsort(descending=True)
        basis = torch.linalg.qr(moved[:, order])[0][:, order.argsort()]
        basis = basis * torch.where((basis * start).sum(-2) < 0, -1.0, 1.0).to(dtype)
        result = basis.to(request.matrix.dtype).contiguous()
        return Computed(result, 0, request.damping, quotients.to(request.matrix.dtype))


@dataclass(frozen=True)
class Request:
    """A symmetric matrix and what is wanted of it; the optimizer batches requests of all layers.

    Attributes:
        matrix: (..., d, d), undamped.
        damping: >= 0.
        operation: what to compute.
        start: (d, d) where iterative operations begin, else ``None``.
    """

    matrix: Tensor = field(repr=False)
    damping: float
    operation: Operation = field(default_factory=Inverse)
    start: Tensor | None = field(default=None, repr=False)


def compute_many(requests: Sequence[Request]) -> list[Computed]:
    """One result per request, in order; requests with equal operations are computed together."""
    groups: list[tuple[Operation, list[int]]] = []
    for index, request in enumerate(requests):
        for operation, indices in groups:
            if operation == request.operation:
                indices.append(index)
                break
        else:
            groups.append((request.operation, [index]))
    results: list[Computed] = [Computed(None, 0)] * len(requests)
    for operation, indices in groups:
        found = operation.compute([requests[index] for index in indices])
        for index, result in zip(indices, found, strict=True):
            results[index] = result
    return results


def _noise(matrix: Tensor) -> Tensor:
    """sqrt(u) |M|_F, (...): far above the rounding errors of M's entries, far below what matters of its spectrum."""
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm * math.sqrt(torch.finfo(matrix.dtype).eps)


def _spectra(requests: Sequence[Request]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Eigenvalues (..., d), ascending, and eigenvectors (..., d, d) of every request, or ``None`` twice."""
    results: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(requests)
    for indices in stackable([request.matrix for request in requests]):
        found = [requests[index].matrix.to(factorisation_dtype(requests[index].matrix.dtype)) for index in indices]
        # The decomposition raises, or never returns, on what is not finite: such matrices are left out beforehand.
        finite = torch.stack([matrix.isfinite().all() for matrix in found]).tolist()
        kept = [(index, matrix) for index, matrix, good in zip(indices, found, finite, strict=True) if good]
        if not kept:
            continue
        values, vectors = _decomposition(stack([matrix for _, matrix in kept]))
        if values is None or vectors is None:
            for index, matrix in kept:
                results[index] = _in_double_precision(matrix)
            continue
        counts = [matrix[..., 0, 0].numel() for _, matrix in kept]
        pieces = zip(values.split(counts), vectors.split(counts), strict=True) if len(kept) > 1 else [(values, vectors)]
        for (index, matrix), (value, vector) in zip(kept, pieces, strict=True):
            results[index] = value.reshape(matrix.shape[:-1]), vector.reshape(matrix.shape)
    return results


def _decomposition(matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Eigenvalues and eigenvectors, or ``None`` twice where LAPACK gives up or, silently, answers with NaN."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None, None
    return (values, vectors) if bool(vectors.isfinite().all() & values.isfinite().all()) else (None, None)


def _in_double_precision(matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The second try: LAPACK's float32 decomposition fails on matrices with many zero rows (dead units and pixels)."""
    values, vectors = _decomposition(matrix.double())
    if values is None or vectors is None:
        return None, None
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
