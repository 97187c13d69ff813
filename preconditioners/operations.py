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
from .linalg import RETRIES, Computed, factorisation_dtype, fetch, inverse_of_many, stack, stackable

__all__ = [
    "AbsoluteInverse",
    "Eigenvectors",
    "Inverse",
    "InverseRoot",
    "Operation",
    "PowerIteration",
    "Request",
    "compute_many",
    "flops",
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
        """One eigendecomposition per group; the smallest eigenvalues of all matrices are looked at together."""
        results = [Computed(None, RETRIES, request.damping) for request in requests]
        found = [
            (index, self._without_rounding(values), vectors)
            for index, (values, vectors) in enumerate(_spectra(requests))
            if values is not None and vectors is not None
        ]
        lowest = fetch([values.min() for _, values, _ in found])
        for (index, values, vectors), low in zip(found, lowest, strict=True):
            results[index] = self._finish(requests[index], values, vectors, low)
        return results

    @staticmethod
    def _without_rounding(values: Tensor) -> Tensor:
        tolerance = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
        return torch.where(values < -tolerance, values, values.clamp(min=0.0))

    def _finish(self, request: Request, values: Tensor, vectors: Tensor, lowest: float) -> Computed:
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
        """One product and one QR per request; a matrix that is not finite gives ``None``. One synchronisation."""
        moved = [self._moved(request) for request in requests]
        finite = _finite(moved)
        return [
            self._one(request, value) if good else Computed(None, RETRIES, request.damping)
            for request, value, good in zip(requests, moved, finite, strict=True)
        ]

    def _moved(self, request: Request) -> Tensor:
        assert request.start is not None
        dtype = factorisation_dtype(request.matrix.dtype)
        start, matrix = request.start.to(dtype), request.matrix.to(dtype)
        moved = matrix @ start
        moved.addcmul_(start, torch.linalg.matrix_norm(matrix), value=self.shift * _unit(matrix))
        return moved

    def _one(self, request: Request, moved: Tensor) -> Computed:
        assert request.start is not None
        start = request.start.to(moved.dtype)
        quotients = (start * moved).sum(-2)
        order = quotients.argsort(descending=True)
        basis = torch.linalg.qr(moved[:, order])[0][:, order.argsort()]
        basis = torch.where((basis * start).sum(-2) < 0, -basis, basis)
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


_FLOPS = {Inverse: 1.0, PowerIteration: 5.0, Eigenvectors: 9.0, InverseRoot: 11.0, AbsoluteInverse: 11.0}
"""In units of d^3: Cholesky 1/3 and inverse 2/3; a product, QR and Q; tridiagonal form, eigenvalues and vectors about 9
(G. H. Golub and C. F. Van Loan, Matrix Computations, 4th edition, sections 4.2, 5.2, 8.3); two for a product more."""


def flops(request: Request) -> float:
    """About how many floating-point operations a request takes; an operation of a third party counts as the dearest."""
    *batch, size, _ = request.matrix.shape
    return _FLOPS.get(type(request.operation), 11.0) * math.prod(batch) * float(size) ** 3


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
    return _with_own_memory(results)


def _with_own_memory(results: list[Computed]) -> list[Computed]:
    """Slices of a batch as matrices of their own: products with a slice round otherwise than with a loaded copy."""
    slices = [
        index
        for index, result in enumerate(results)
        if result.value is not None and result.value.untyped_storage().nbytes() > result.value.nbytes
    ]
    values = [value for index in slices if (value := results[index].value) is not None]
    if values:
        copies = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]
        torch._foreach_copy_(copies, values)
        for index, copy in zip(slices, copies, strict=True):
            results[index] = replace(results[index], value=copy)
    return results


def _noise(matrix: Tensor) -> Tensor:
    """sqrt(u) |M|_F, (...): far above the rounding errors of M's entries, far below what matters of its spectrum."""
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm * _unit(matrix)


def _unit(matrix: Tensor) -> float:
    """sqrt(u)."""
    return math.sqrt(torch.finfo(matrix.dtype).eps)


def _finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors are finite throughout: their largest entries, fetched at once."""
    return [math.isfinite(norm) for norm in fetch([torch.linalg.vector_norm(value, math.inf) for value in tensors])]


_Spectrum = tuple[Tensor | None, Tensor | None]


def _spectra(requests: Sequence[Request]) -> list[_Spectrum]:
    """Eigenvalues (..., d), ascending, and eigenvectors (..., d, d) of every request, or ``None`` twice."""
    found = [request.matrix.to(factorisation_dtype(request.matrix.dtype)) for request in requests]
    # The decomposition raises, or never returns, on what is not finite: such matrices are left out beforehand.
    kept = [index for index, good in enumerate(_finite(found)) if good]
    groups = [[kept[place] for place in group] for group in stackable([found[index] for index in kept])]
    decomposed = _checked([stack([found[index] for index in group]) for group in groups])
    results: list[_Spectrum] = [(None, None)] * len(requests)
    again: list[int] = []
    for group, (values, vectors) in zip(groups, decomposed, strict=True):
        if values is None or vectors is None:
            again += group
            continue
        counts = [math.prod(found[index].shape[:-2]) for index in group]
        pieces = (
            zip(values.split(counts), vectors.split(counts), strict=True) if len(group) > 1 else [(values, vectors)]
        )
        for index, (value, vector) in zip(group, pieces, strict=True):
            results[index] = value.reshape(found[index].shape[:-1]), vector.reshape(found[index].shape)
    # LAPACK's float32 decomposition fails on matrices with many zero rows (dead units and pixels).
    for index, (values, vectors) in zip(again, _checked([found[index].double() for index in again]), strict=True):
        if values is not None and vectors is not None:
            results[index] = values.to(found[index].dtype), vectors.to(found[index].dtype)
    return results


def _checked(matrices: Sequence[Tensor]) -> list[_Spectrum]:
    """Decompositions, or ``None`` twice where LAPACK gives up or, silently, answers with NaN."""
    found = [_decomposition(matrix) for matrix in matrices]
    sound = _finite([part for pair in found if pair is not None for part in pair])
    results: list[_Spectrum] = []
    for pair in found:
        if pair is None:
            results.append((None, None))
            continue
        results.append(pair if all(sound[:2]) else (None, None))
        sound = sound[2:]
    return results


def _decomposition(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return values, vectors
