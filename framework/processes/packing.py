"""Symmetric matrices on their way between processes: half of their entries."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["packed_size", "rows_are_fewer", "symmetric_packed", "symmetric_unpacked"]


def packed_size(order: int) -> int:
    """Numbers that a symmetric matrix of this order travels as: d (d + 1) / 2, one row more where d is odd."""
    even = order + order % 2
    return even * (even + 1) // 2


def rows_are_fewer(numbers: int, order: int, count: int, everyone: bool) -> bool:
    """Whether rows cost fewer bytes on their way than their second moment.

    To one owner either is sent once. To everybody rows go P - 1 times; a sum comes back to all for twice the cost.

    Args:
        numbers: of the rows of one process.
        order: of the moment.
        count: number of processes P.
        everyone: whether all of them get it.
    """
    return numbers * (count / 2 if everyone else 1) <= packed_size(order)


def symmetric_packed(matrix: Tensor) -> Tensor:
    """Flat, without the entries that follow by symmetry.

    The matrix falls into quarters of order h. The lower left one goes as it is; the lower triangle of the upper left
    and the upper triangle of the lower right lie together in one (h + 1) x h rectangle. No table of indices is needed.

    Args:
        matrix: (d, d) symmetric.
    """
    order = matrix.shape[0]
    if order % 2:
        matrix = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    half = matrix.shape[0] // 2
    rectangle = matrix.new_zeros(half + 1, half)
    rectangle[1:] = matrix[:half, :half].tril()
    rectangle[:half] += matrix[half:, half:].triu()
    return torch.cat([matrix[half:, :half].reshape(-1), rectangle.reshape(-1)])


def symmetric_unpacked(packed: Tensor, order: int) -> Tensor:
    """The matrix again.

    Args:
        packed: flat, see :func:`symmetric_packed`.
        order: d.
    """
    half = (order + 1) // 2
    result = packed.new_empty(2 * half, 2 * half)
    corner = packed[: half * half].view(half, half)
    rectangle = packed[half * half :].view(half + 1, half)
    first, last = rectangle[1:].tril(), rectangle[:half].triu()
    result[half:, :half] = corner
    result[:half, half:] = corner.T
    result[:half, :half] = first + first.tril(-1).T
    result[half:, half:] = last + last.triu(1).T
    return result[:order, :order]
