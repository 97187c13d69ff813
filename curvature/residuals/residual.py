"""Blocks of residuals, as the user returns them, and the loss that they make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ...checking import require_fields
from ...errors import ArgumentError, LossWarning, require_interval
from .penalty import HalfSquare, Penalty

__all__ = ["Residual", "ResidualBlock", "ResidualClosure", "read_residuals", "total_loss"]


@dataclass(frozen=True)
class Residual:
    """One block of residuals with its place in the loss, weight / rows * sum over entries of rho(entry).

    Args:
        values: (rows, ...), with their graph; anything behind the first axis belongs to the same row (the components of
            a system of equations).
        weight: > 0, of the block: half its mean square counts so often in the loss.
        penalty: rho, what an entry costs; half its square, unless outliers should count less.
    """

    values: Tensor
    weight: float = 1.0
    penalty: Penalty = field(default_factory=HalfSquare)

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("weight of a block of residuals", self.weight, 0.0, float("inf"), closed="()")


ResidualClosure = Callable[[], Mapping[str, Any]]
"""A function without arguments that evaluates the residuals: by name a tensor (rows, ...) or a :class:`Residual`."""


@dataclass(frozen=True)
class ResidualBlock:
    """One block, read.

    Attributes:
        name: as the user calls it.
        values: (rows, components), with their graph.
        factor: weight / rows, what every entry's cost is multiplied with.
        penalty: what an entry costs.
    """

    name: str
    values: Tensor
    factor: float
    penalty: Penalty

    def loss(self) -> Tensor:
        """Its part of the loss, 0-dimensional."""
        return self.factor * self.penalty.value(self.values).sum()

    def converted(self, dtype: torch.dtype) -> Self:
        """The same block in the precision of the parameters: targets are often read in another."""
        return replace(self, values=self.values.to(dtype))

    def curvatures(self) -> Tensor:
        """(rows, components) second derivative of the loss by each residual, >= 0, without a graph.

        Where no residual of the block has one (all of them cost like outliers), the matrix would be zero and nothing
        would say how far to go: then the curvature of the parabola through the same value and slope that lies above
        the penalty, rho'(r) / r.
        """
        values = self.values.detach()
        found = self.penalty.curvature(values)
        if not bool((found > 0.0).any()):
            found = torch.where(values == 0.0, found, self.penalty.slope(values) / values)
        return self.factor * found


def read_residuals(found: Any) -> list[ResidualBlock]:
    """What a closure returned, checked.

    Raises:
        ArgumentError: for what is no mapping of names to residuals, an empty one, a block without rows or of another
            dtype; it names the block, the value and the way out.
    """
    if isinstance(found, Tensor | Residual):
        raise ArgumentError(
            f"a closure of residuals must return them by name, got {_described(found)}; "
            "return {'interior': r1, 'boundary': r2}, the residuals themselves and not their squares or mean"
        )
    if not isinstance(found, Mapping) or not found:
        raise ArgumentError(
            f"a closure of residuals must return a dictionary of at least one block, got {_described(found)}; "
            "return {'interior': r1, 'boundary': r2}"
        )
    return [_read(name, value) for name, value in found.items()]


def _described(found: Any) -> str:
    return f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)[:80]


def _read(name: Any, value: Any) -> ResidualBlock:
    residual = value if isinstance(value, Residual) else Residual(value) if isinstance(value, Tensor) else None
    if not isinstance(name, str) or residual is None:
        raise ArgumentError(
            f"block {name!r} of the residuals must be a tensor or an osculate.Residual under a name, got "
            f"{_described(value)}"
        )
    values = residual.values
    if not values.ndim or not values.numel():
        raise ArgumentError(
            f"block {name!r} of the residuals has shape {tuple(values.shape)}; it needs one row per point, and at "
            "least one: leave the block out where there is nothing to fit, and give one number as tensor.reshape(1)"
        )
    if values.ndim == 2 and values.shape[0] == values.shape[1] > 3:
        warnings.warn(
            f"block {name!r} of the residuals has shape {tuple(values.shape)}, as (N, 1) minus (N,) has, which pairs "
            "every point with every other; if these are components of a system, return them as (rows, components, 1)",
            LossWarning,
            stacklevel=2,
        )
    if not values.is_floating_point():
        raise ArgumentError(f"block {name!r} of the residuals is {values.dtype}; return floating-point residuals")
    return ResidualBlock(name, values.reshape(len(values), -1), residual.weight / len(values), residual.penalty)


def total_loss(blocks: Sequence[ResidualBlock]) -> Tensor:
    """The loss, 0-dimensional."""
    return torch.stack([block.loss() for block in blocks]).sum()
