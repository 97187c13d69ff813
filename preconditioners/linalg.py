"""The one linear-algebra module: every factorisation of the package goes through it.

Cholesky only. LU (``torch.linalg.inv``, ``solve``) on batches of matrices of order 256 and more hangs with two CPU
threads; see https://github.com/pytorch/pytorch/issues/142815. Functions whose name ends in ``_`` write into their
first argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "RETRIES",
    "Computed",
    "accumulate_gram_",
    "accumulate_homogeneous_gram_",
    "add_to_diagonal",
    "bfgs_inverse_update_",
    "bfgs_inverse_updates_",
    "factorisation_dtype",
    "fetch",
    "has_bfloat16_units",
    "inner_product",
    "inverse_of_many",
    "newton_schulz",
    "newton_schulz_of_many",
    "pack",
    "pack_homogeneous",
    "stack",
    "stackable",
    "triangular_inverse",
    "unpack",
]

_STACK_LIMIT = 64
"""Matrices up to this order are stacked across layers; larger ones gain nothing from a batched call."""

RETRIES = 4
"""How often a failed factorisation is tried again with ten times the damping."""

_SHORT = 4096
"""Vectors up to this length are padded to a common one; more would be wasted than launches saved."""

_FEW = 4
"""So many vectors cost no more one by one than as the rows of a matrix."""

_PANEL = 256
"""Width of the column panels of a symmetric product; one triangle of panels is computed."""


def factorisation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision statistics are factorised in float32; everything else in its own type."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the products of all entries of two tensors of one shape; without a temporary where both are contiguous."""
    if left.is_contiguous() and right.is_contiguous():
        return torch.dot(left.view(-1), right.view(-1))
    return torch.sum(left * right)


def pack(vectors: Sequence[Tensor]) -> Tensor:
    """(n, d) rows from n vectors, padded with zeros to the longest: two operations."""
    lengths = [vector.shape[0] for vector in vectors]
    longest = max(lengths)
    if min(lengths) < longest:
        zeros = vectors[0].new_zeros(longest)
        tails = {length: zeros[length:] for length in set(lengths)}
        pieces: list[Tensor] = []
        for vector, length in zip(vectors, lengths, strict=True):
            pieces += (vector, tails[length]) if length < longest else (vector,)
        vectors = pieces
    return torch.cat(list(vectors)).view(-1, longest)


def pack_homogeneous(vectors: Sequence[Tensor], extended: Sequence[bool]) -> Tensor:
    """(L, d) rows from L vectors, with a 1 behind those that are to be extended, and then zeros: two operations."""
    lengths = [vector.shape[0] + more for vector, more in zip(vectors, extended, strict=True)]
    longest = max(lengths)
    tail = torch.eye(1, longest + 1, dtype=vectors[0].dtype, device=vectors[0].device)[0]  # a 1 and zeros
    pieces: list[Tensor] = []
    for vector, more in zip(vectors, extended, strict=True):
        first = 0 if more else 1
        pieces += (vector, tail[first : first + longest - vector.shape[0]])
    return torch.cat(pieces).view(-1, longest)


def unpack(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The vectors in a matrix of padded rows, as views."""
    width = rows.shape[1]
    return [row if size == width else row[:size] for row, size in zip(rows.unbind(0), sizes, strict=True)]


def inner_products(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> list[Tensor]:
    """Inner products of n pairs of tensors, rounded alike on every device; short vectors are multiplied together.

    On a device the products of tensors that are not contiguous are formed together too.
    """
    short = [i for i, v in enumerate(lefts) if v.dim() == 1 and v.shape[0] <= _SHORT]
    values: list[Tensor | None] = [None] * len(lefts)
    if len(short) > _FEW:
        rows = pack([lefts[index] for index in short] + [rights[index] for index in short])
        products = (rows[: len(short)] * rows[len(short) :]).sum(1)
        for index, value in zip(short, products.unbind(0), strict=True):
            values[index] = value
    rest = [index for index, value in enumerate(values) if value is None]
    distinct = {id(v): v for index in rest for v in (lefts[index], rights[index])}
    flat = {key: value.view(-1) for key, value in distinct.items() if value.is_contiguous()}
    apart: list[int] = []
    for index in rest:
        one, other = flat.get(id(lefts[index])), flat.get(id(rights[index]))
        if one is not None and other is not None:
            values[index] = torch.dot(one, other)
        else:
            apart.append(index)
    if apart and lefts[0].is_cuda:
        large = torch._foreach_mul([lefts[index] for index in apart], [rights[index] for index in apart])
        for index, product in zip(apart, large, strict=True):
            values[index] = product.sum()
    else:
        for index in apart:
            values[index] = torch.sum(lefts[index] * rights[index])
    return [value for value in values if value is not None]


def add_to_diagonal(matrix: Tensor, value: float) -> Tensor:
    """A copy of (..., d, d) ``matrix`` with ``value`` added to every diagonal entry."""
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(value)
    return result


def accumulate_gram_(matrix: Tensor, rows: Tensor, keep: float, add: float) -> None:
    """``matrix <- keep * matrix + add * rows' rows``, computing each product of column panels once.

    Args:
        matrix: (d, d) symmetric, written in place; may be a view.
        rows: (n, d).
        keep: factor on the old matrix.
        add: factor on the new product.

    Cost: n d (d + panel width) flops instead of 2 n d^2.
    """
    size = matrix.shape[0]
    panels = max(1, min(4, size // _PANEL))
    if panels == 1 or rows.is_cuda:  # on a GPU one large product beats several small ones
        matrix.addmm_(rows.T, rows, beta=keep, alpha=add)
        return
    edges = [round(size * index / panels) for index in range(panels + 1)]
    for index in range(panels):
        low, high = edges[index], edges[index + 1]
        block = matrix[low:high, low:]
        block.addmm_(rows[:, low:high].T, rows[:, low:], beta=keep, alpha=add)
        if high < size:
            matrix[high:, low:high] = block[:, high - low :].T


def accumulate_homogeneous_gram_(matrix: Tensor, rows: Tensor, keep: float, add: float) -> None:
    """The same for rows with a trailing 1, which are not built where that would cost more than it saves.

    Args:
        matrix: (d + 1, d + 1).
        rows: (n, d).
        keep: factor on the old matrix.
        add: factor on the new product.
    """
    size = rows.shape[1]
    if rows.is_cuda or size < _PANEL:  # launches weigh more than the copy
        accumulate_gram_(matrix, torch.cat([rows, _ones(rows.shape[0], rows.dtype, rows.device)], 1), keep, add)
        return
    mean, total = rows.mean(0), float(rows.shape[0])
    accumulate_gram_(matrix[:size, :size], rows, keep, add)
    border = matrix[size, :size]
    border.mul_(keep).add_(mean, alpha=add * total)
    matrix[:size, size] = border
    matrix[size, size].mul_(keep).add_(add * total)


@lru_cache(maxsize=16)
def _ones(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, 1), the same one for all layers and steps: read only."""
    with torch.inference_mode(False):
        return torch.ones(count, 1, dtype=dtype, device=device)


def bfgs_inverse_update_(inverse: Tensor, step: Tensor, change: Tensor, product: Tensor, accept: Tensor) -> None:
    """BFGS update of an inverse approximation H in place, one rank-two product.

    ``H <- H + (rho^2 y'Hy + rho) s s' - rho (s (Hy)' + (Hy) s')``, ``rho = 1 / s'y`` (PAPERS 1.2).

    Args:
        inverse: (d, d) H, symmetric.
        step: (d,) s.
        change: (d,) y.
        product: (d,) Hy.
        accept: 0-dimensional bool; where it is false, or the update would not be finite, H stays as it is. No
            synchronisation: the decision is arithmetic.
    """
    bfgs_inverse_updates_([inverse], *(value.unsqueeze(0) for value in (step, change, product, accept)))


def bfgs_inverse_updates_(
    inverses: Sequence[Tensor], steps: Tensor, changes: Tensor, products: Tensor, accept: Tensor
) -> None:
    """:func:`bfgs_inverse_update_` of L matrices, whose vectors are rows (L, d) padded with zeros."""
    rho = torch.linalg.vecdot(steps, changes).reciprocal()
    half = 0.5 * rho * (1.0 + rho * torch.linalg.vecdot(changes, products))
    others = half.unsqueeze(-1) * steps - rho.unsqueeze(-1) * products
    both = torch.stack([steps, others], -2)
    size = torch.linalg.vector_norm(both, torch.inf, -1).prod(-1)
    drop = ~(accept & (size < torch.inf))  # a NaN is not smaller either
    both.masked_fill_(drop.view(-1, 1, 1), 0.0)
    width, pairs = both.shape[-1], zip(both.mT.unbind(0), both.flip(-2).unbind(0), strict=True)
    for inverse, (left, right) in zip(inverses, pairs, strict=True):
        order = inverse.shape[0]
        if order < width:
            left, right = left[:order], right[:, :order]
        inverse.addmm_(left, right)


def triangular_inverse(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular (p, p) matrix with a non-zero diagonal, by substitution."""
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    result: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return result


def newton_schulz(
    matrix: Tensor, coefficients: tuple[float, float, float], iterations: int, epsilon: float, dtype: torch.dtype | None
) -> Tensor:
    """All singular values of a matrix pushed towards 1 by an odd quintic polynomial, without a decomposition.

    ``X <- a X + (b X X' + c (X X')^2) X`` from ``X / |X|_F``, on the side of the smaller Gram matrix.

    Args:
        matrix: (rows, columns), not modified.
        coefficients: (a, b, c).
        iterations: >= 1.
        epsilon: > 0, smallest Frobenius norm that is divided by: a zero matrix stays zero.
        dtype: in which the products run; ``None``: the matrix's own.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    value = matrix.to(dtype or matrix.dtype)
    value = value.T if tall else value
    value = value / value.norm().clamp(min=epsilon)
    for _ in range(iterations):
        gram = value @ value.T
        value = torch.addmm(value, torch.addmm(gram, gram, gram, beta=b, alpha=c), value, beta=a)
    return (value.T if tall else value).to(matrix.dtype)


def newton_schulz_of_many(
    matrices: Sequence[Tensor],
    coefficients: tuple[float, float, float],
    iterations: int,
    epsilon: float,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """:func:`newton_schulz` of each of many matrices; those of one shape, transposed or not, in one batched product.

    Args:
        matrices: each (rows, columns), not modified.
        coefficients: (a, b, c).
        iterations: >= 1.
        epsilon: > 0.
        dtype: in which the products run; ``None``: each matrix's own.
    """
    groups: dict[tuple[int, int, torch.dtype, torch.device], list[int]] = {}
    for index, matrix in enumerate(matrices):
        key = (min(matrix.shape), max(matrix.shape), matrix.dtype, matrix.device)
        groups.setdefault(key, []).append(index)
    results = list(matrices)
    for indices in groups.values():
        if len(indices) == 1:
            results[indices[0]] = newton_schulz(matrices[indices[0]], coefficients, iterations, epsilon, dtype)
            continue
        tall = [matrices[index].shape[0] > matrices[index].shape[1] for index in indices]
        wide = [matrices[i].T if turned else matrices[i] for i, turned in zip(indices, tall, strict=True)]
        value = _quintic(torch.stack(wide).to(dtype or wide[0].dtype), coefficients, iterations, epsilon)
        for index, turned, part in zip(indices, tall, value.to(wide[0].dtype).unbind(), strict=True):
            results[index] = part.T if turned else part
    return results


def _quintic(value: Tensor, coefficients: tuple[float, float, float], iterations: int, epsilon: float) -> Tensor:
    """The iteration on a batch (n, rows, columns) of matrices with rows <= columns."""
    a, b, c = coefficients
    value = value / torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(iterations):
        gram = value @ value.mT
        value = torch.baddbmm(value, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), value, beta=a)
    return value


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32, instead of imitating them.

    A processor has such units where it names them and torch's oneDNN, which uses them, was built in.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    named = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch before 2.10: unknown
    return bool(named.get("avx512_bf16") or named.get("amx_bf16"))


@dataclass(frozen=True)
class Computed:
    """What one matrix operation found; see :mod:`.operations`.

    Attributes:
        value: (..., d, d), or ``None`` if every retry failed: then the last good one is kept.
        rescues: how many times the damping had to be raised tenfold.
        damping: the damping it was computed with, rescues included.
        spectrum: (..., d) eigenvalues of the undamped matrix, in the order of the columns of ``value``; only from
            operations whose point is the eigenvectors.
    """

    value: Tensor | None
    rescues: int
    damping: float = 0.0
    spectrum: Tensor | None = None


def inverse_of_many(matrices: Sequence[Tensor], dampings: Sequence[float]) -> list[Computed]:
    """Inverses of ``matrix + damping I`` for symmetric positive semi-definite matrices.

    Small matrices of one order are stacked, across requests, and inverted by one batched call. A factorisation that
    fails is tried again with ten times the damping, up to four times; one synchronisation per group and try.

    Args:
        matrices: each (..., d, d), undamped, not modified.
        dampings: one number > 0 per request.
    """
    results = [Computed(None, RETRIES, damping) for damping in dampings]
    failed = list(range(len(matrices)))
    for attempt in range(RETRIES + 1):
        raised = [damping * 10.0**attempt for damping in dampings]
        pieces = [_Factors.of(matrices, raised, [failed[k] for k in group]) for group in _groups(matrices, failed)]
        good = _succeeded(pieces)
        for piece in pieces:
            for index, inverse in piece.inverses(good):
                results[index] = Computed(inverse.to(matrices[index].dtype), attempt, raised[index])
        failed = [index for index in failed if index not in good]
        if not failed:
            break
    return results


def stack(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices (..., d, d) of one order as one batch; a single one stays as it is."""
    order = matrices[0].shape[-1]
    return matrices[0] if len(matrices) == 1 else torch.cat([entry.reshape(-1, order, order) for entry in matrices])


def stackable(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices that one batched call may take together: one order (small), dtype and device."""
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for index, matrix in enumerate(matrices):
        order = matrix.shape[-1]
        key = (order if order <= _STACK_LIMIT else -index - 1, matrix.dtype, matrix.device)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def fetch(values: Sequence[Tensor]) -> list[float]:
    """Numbers of many small tensors, joined flat: one synchronisation per device, where each alone would take one."""
    places: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        places.setdefault(value.device, []).append(index)
    found: list[list[float]] = [[]] * len(values)
    for indices in places.values():
        numbers = torch.cat([values[index].detach().reshape(-1) for index in indices]).tolist()
        for index in indices:
            count = values[index].numel()
            found[index], numbers = numbers[:count], numbers[count:]
    return [number for part in found for number in part]


def _groups(matrices: Sequence[Tensor], indices: Sequence[int]) -> list[list[int]]:
    return stackable([matrices[index] for index in indices])


@dataclass(frozen=True)
class _Factors:
    """Cholesky factors of some requests, computed together; nobody has looked yet whether they exist.

    Attributes:
        indices: of the requests.
        shapes: of their matrices.
        factor: (count, d, d), or the shape of the only request.
        info: what LAPACK says of each.
    """

    indices: list[int]
    shapes: list[torch.Size]
    factor: Tensor
    info: Tensor

    @staticmethod
    def of(matrices: Sequence[Tensor], dampings: Sequence[float], indices: list[int]) -> _Factors:
        """Factorise M + damping I of the requests ``indices``."""
        stacked = stack([add_to_diagonal(matrices[index], dampings[index]) for index in indices])
        factor, info = torch.linalg.cholesky_ex(stacked.to(factorisation_dtype(stacked.dtype)))
        return _Factors(indices, [matrices[index].shape for index in indices], factor, info)

    def counts(self) -> list[int]:
        """How many matrices each request has."""
        return [math.prod(shape[:-2]) for shape in self.shapes]

    def verdict(self) -> Tensor:
        """(count,) the traces of the factors; LAPACK does not notice an infinite pivot, its trace does."""
        trace: Tensor = self.factor.diagonal(dim1=-2, dim2=-1).sum(-1)
        return trace

    def inverses(self, good: set[int]) -> list[tuple[int, Tensor]]:
        """Inverses of the requests that succeeded; where all did, in one call."""
        if good.issuperset(self.indices):
            whole = _row_major_inverse(self.factor)
            parts = whole.split(self.counts()) if len(self.indices) > 1 else (whole,)
            return [(i, v.reshape(shape)) for i, v, shape in zip(self.indices, parts, self.shapes, strict=True)]
        parts = self.factor.split(self.counts()) if len(self.indices) > 1 else (self.factor,)
        pairs = zip(self.indices, parts, self.shapes, strict=True)
        return [(i, _row_major_inverse(value.reshape(shape))) for i, value, shape in pairs if i in good]


def _row_major_inverse(factor: Tensor) -> Tensor:
    """Inverse from a lower Cholesky factor. LAPACK writes columns; the transpose of a symmetric matrix is free.

    Row-major, so that a loaded copy multiplies with the same rounding as the original.
    """
    return torch.cholesky_inverse(factor).mT.contiguous()


def _succeeded(pieces: Sequence[_Factors]) -> set[int]:
    """Requests all of whose matrices were factorised. All verdicts are fetched at once, after all is launched."""
    verdicts = fetch([value for piece in pieces for value in (piece.info, piece.verdict())])
    good: set[int] = set()
    position = 0
    for piece in pieces:
        total = sum(piece.counts())
        infos, traces = verdicts[position : position + total], verdicts[position + total : position + 2 * total]
        position += 2 * total
        fine = [info == 0 and math.isfinite(trace) for info, trace in zip(infos, traces, strict=True)]
        for index, count in zip(piece.indices, piece.counts(), strict=True):
            if all(fine[:count]):
                good.add(index)
            fine = fine[count:]
    return good
