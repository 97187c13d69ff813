"""What stands for the Fisher matrix F of a full-batch least-squares problem, reduced to n x n matrices.

Each structure returns K = J (F + lambda I)^{-1} J' / n and the direction (F + lambda I)^{-1} J' e / n by Woodbury's
identity. With P parameters nothing of order P^2 is formed; Kronecker factors over the units are inverted through the
n T x n T products of their rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import ArgumentError, UnknownNameError
from .function_models import TwoLayerTanh
from .function_space import FunctionSpace, cholesky

__all__ = [
    "STRUCTURES",
    "FactoredFisher",
    "KernelBlocks",
    "PerInputBlocks",
    "PerOutputBlocks",
    "Solved",
    "Structure",
    "WholeFisher",
    "resolve_structure",
]


@dataclass(frozen=True)
class Solved:
    """One damped solve.

    Attributes:
        kernel: K, (n, n).
        direction: (F + lambda I)^{-1} grad L, (units, inputs, kernel).
    """

    kernel: Tensor
    direction: Tensor


class Structure(Protocol):
    """A structure of F."""

    def solve(self, space: FunctionSpace, theta: Tensor, residual: Tensor, damping: float) -> Solved:
        """K and the direction at theta, for e = ``residual`` (n,) and lambda = ``damping`` >= 0."""


def _solve_blocks(rows: Tensor, residual: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """For blocks J_b (B, n, s): sum_b J_b (J_b'J_b + shift)^{-1} J_b' and the (B, s) directions.

    Works on the smaller side; on that of the parameters, s x s, nothing is lost when G_b has not full rank.
    """
    if rows.shape[2] <= rows.shape[1]:
        matrix = rows.mT @ rows
        matrix.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor = cholesky(matrix)
        half = torch.linalg.solve_triangular(factor, rows.mT, upper=False).flatten(0, 1)
        return half.T @ half, torch.cholesky_solve((rows.mT @ residual).unsqueeze(2), factor).squeeze(2)
    gram = rows @ rows.mT
    dual, kernel = _dual(gram, residual, shift)
    return kernel, torch.einsum("bns,bn->bs", rows, dual)


def _dual(gram: Tensor, residual: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """For Gram matrices G_b (B, n, n): (G_b + shift)^{-1} e, (B, n), and sum_b G_b (G_b + shift)^{-1}."""
    damped = gram.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor = cholesky(damped)
    kernel = torch.cholesky_solve(gram, factor).sum(0)
    dual = torch.cholesky_solve(residual.expand(gram.shape[0], -1).unsqueeze(2), factor).squeeze(2)
    return dual, 0.5 * (kernel + kernel.T)


class _Complete:
    """Blocks that lie within one unit: every chunk of units is solved on its own."""

    def solve(self, space: FunctionSpace, theta: Tensor, residual: Tensor, damping: float) -> Solved:
        """One pass over the units."""
        kernel = theta.new_zeros(space.samples, space.samples)
        direction = torch.empty_like(theta)
        for low, high, jacobian in space.jacobians(theta):
            rows = self.rows(jacobian)
            part, solution = _solve_blocks(rows, residual, space.samples * damping)
            kernel += part
            direction[low:high] = solution.reshape(theta[low:high].shape)
        return Solved(kernel, direction)

    def rows(self, jacobian: Tensor) -> Tensor:
        """(n, chunk, inputs, kernel) as (blocks, n, size), blocks in the order of the weights."""
        raise NotImplementedError


@dataclass(frozen=True)
class PerOutputBlocks(_Complete):
    """One block per unit: all weights into a hidden neuron (the paper's dense blocks), or into an output channel."""

    def rows(self, jacobian: Tensor) -> Tensor:
        """Units."""
        return jacobian.flatten(2).transpose(0, 1)


@dataclass(frozen=True)
class KernelBlocks(_Complete):
    """One block per kernel, that is per pair of output and input channel (the paper's blocks for convolutions)."""

    def rows(self, jacobian: Tensor) -> Tensor:
        """Kernels."""
        return jacobian.flatten(1, 2).transpose(0, 1)


class _Spread:
    """Blocks that reach over all units: Gram matrices are summed first, directions follow in a second pass."""

    def solve(self, space: FunctionSpace, theta: Tensor, residual: Tensor, damping: float) -> Solved:
        """Two passes over the units."""
        blocks = self.rows(theta.unsqueeze(0)).shape[0]
        gram = theta.new_zeros(blocks, space.samples, space.samples)
        for _, _, jacobian in space.jacobians(theta):
            rows = self.rows(jacobian)
            gram.baddbmm_(rows, rows.mT)
        dual, kernel = _dual(gram, residual, space.samples * damping)
        direction = torch.empty_like(theta)
        for low, high, jacobian in space.jacobians(theta):
            direction[low:high] = self.combine(jacobian, dual)
        return Solved(kernel, direction)

    def rows(self, jacobian: Tensor) -> Tensor:
        """(n, chunk, inputs, kernel) as (blocks, n, part of size)."""
        raise NotImplementedError

    def combine(self, jacobian: Tensor, dual: Tensor) -> Tensor:
        """J_b' v_b of every block, (chunk, inputs, kernel)."""
        raise NotImplementedError


@dataclass(frozen=True)
class PerInputBlocks(_Spread):
    """One block per input: all weights out of it."""

    def rows(self, jacobian: Tensor) -> Tensor:
        """Inputs."""
        return jacobian.transpose(1, 2).flatten(2).transpose(0, 1)

    def combine(self, jacobian: Tensor, dual: Tensor) -> Tensor:
        """Each input with its own vector."""
        return torch.einsum("njik,in->jik", jacobian, dual)


@dataclass(frozen=True)
class WholeFisher(_Spread):
    """One block: exact natural gradient descent (arXiv:1905.10961)."""

    def rows(self, jacobian: Tensor) -> Tensor:
        """Everything."""
        return jacobian.flatten(1).unsqueeze(0)

    def combine(self, jacobian: Tensor, dual: Tensor) -> Tensor:
        """J' v."""
        return torch.einsum("njik,n->jik", jacobian, dual[0])


@dataclass(frozen=True)
class FactoredFisher:
    """K-FAC: A (x) G with sqrt(lambda T) and sqrt(lambda / T) on the factors; a comparison, no theorem covers it.

    A = mean_n sum_t x_t x_t', G = mean_{n,t} g_t g_t' (arXiv:1602.01407v2, section 3); damping as in PAPERS 1.6.
    """

    def solve(self, space: FunctionSpace, theta: Tensor, residual: Tensor, damping: float) -> Solved:
        """G is inverted through the n T x n T products of its rows: (G + c)^{-1} = (I - S'(SS' + nTc)^{-1} S) / c.

        Raises:
            ArgumentError: for a model without a layer, or without damping.
        """
        model = space.model
        if not isinstance(model, TwoLayerTanh):
            raise ArgumentError(f"Kronecker factors need a layer; {type(model).__name__} has none, take TwoLayerTanh")
        if not damping > 0.0:
            raise ArgumentError(f"damping must be > 0 for Kronecker factors, got {damping!r}")
        samples, positions = space.samples, model.positions
        outer = math.sqrt(damping / positions)
        rows = model.patches.flatten(2).flatten(0, 1)
        inputs = rows.T @ rows / samples
        inputs.diagonal().add_(math.sqrt(damping * positions))
        factor = cholesky(inputs)
        sums = self._sums(space, model, theta, residual, factor)
        gram = sums.outer.clone()
        gram.diagonal().add_(samples * positions * outer)
        small = cholesky(gram)
        reduced = torch.linalg.solve_triangular(small, sums.mixed.transpose(0, 1).flatten(1), upper=False)
        reduced = reduced.unflatten(1, (samples, -1)).transpose(0, 1).flatten(1)
        kernel = (sums.plain - reduced @ reduced.T) / (outer * samples)
        correction = torch.cholesky_solve(sums.gradient, small)
        direction = torch.empty_like(theta)
        for low, high, jacobian in space.jacobians(theta):
            gradient = torch.einsum("njq,n->jq", jacobian.flatten(2), residual) / samples
            outputs = model.output_gradients(theta[low:high], low).flatten(0, 1)
            solved = torch.cholesky_solve(gradient.T, factor).T - outputs.T @ correction
            direction[low:high] = (solved / outer).reshape(theta[low:high].shape)
        return Solved(kernel, direction)

    def _sums(
        self, space: FunctionSpace, model: TwoLayerTanh, theta: Tensor, residual: Tensor, factor: Tensor
    ) -> _Sums:
        """One pass: S S', S J A^{-1/2}, J A^{-1} J' and S grad A^{-1}."""
        rows, size = space.samples * model.positions, factor.shape[0]
        sums = _Sums(
            theta.new_zeros(rows, rows),
            theta.new_zeros(space.samples, rows, size),
            theta.new_zeros(space.samples, space.samples),
            theta.new_zeros(rows, size),
        )
        for low, high, jacobian in space.jacobians(theta):
            outputs = model.output_gradients(theta[low:high], low).flatten(0, 1)
            flat = jacobian.flatten(2)
            scaled = torch.linalg.solve_triangular(factor, flat.flatten(0, 1).T, upper=False).T.reshape(flat.shape)
            sums.outer.addmm_(outputs, outputs.T)
            sums.mixed.add_(torch.einsum("rj,njq->nrq", outputs, scaled))
            sums.plain.addmm_(scaled.flatten(1), scaled.flatten(1).T)
            gradient = torch.einsum("njq,n->jq", flat, residual) / space.samples
            sums.gradient.add_(outputs @ torch.cholesky_solve(gradient.T, factor).T)
        return sums


@dataclass
class _Sums:
    """Sums over units: (nT, nT), (n, nT, q), (n, n) and (nT, q)."""

    outer: Tensor
    mixed: Tensor
    plain: Tensor
    gradient: Tensor


STRUCTURES: dict[str, Structure] = {
    "per-output": PerOutputBlocks(),
    "per-input": PerInputBlocks(),
    "kernel": KernelBlocks(),
    "whole": WholeFisher(),
    "kfac": FactoredFisher(),
}


def resolve_structure(name: str) -> Structure:
    """A structure by name.

    Raises:
        UnknownNameError: for another name.
    """
    if name not in STRUCTURES:
        raise UnknownNameError("blocks", name, STRUCTURES)
    return STRUCTURES[name]
