"""How well a structure approximates the curvature it stands for, layer by layer, on any checkpoint.

For one block of parameters let C be the structure's damped matrix (``to_dense``), T = B + lambda I the damped exact
matrix, B the Gauss-Newton matrix (for the likelihoods that ship: the Fisher matrix) or the Hessian of one mini-batch.
Everything is computed in float64 in the model's evaluation mode. Small blocks are dense; of large ones only products
are formed: ``scipy``'s Lanczos iterations for extreme eigenvalues, random signs for Frobenius norms, and conjugate
gradients for directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from ...curvature.declarations import StructureDeclarations, declared
from ...errors import ArgumentError, OsculateError, require_positive_integer
from ...framework.optimizer.blocks import Block, describe
from ...framework.optimizer.second_order import SecondOrder
from ...preconditioners.damping.split import SideDamping
from ...preconditioners.operations import compute_many
from ...preconditioners.structures.identity import Identity
from ...preconditioners.structures.kronecker import Kronecker
from .exact_blocks import Probe, Target, block_gradient, exact_block, flat_direction, flat_map, in_double
from .spectra import SymmetricOperator, conjugate_gradients, cosine, signs

__all__ = ["BlockQuality", "Effort", "ExactBlock", "measure_approximation"]


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Args:
        dense: blocks up to this many parameters are treated as dense matrices, >= 1.
        probes: random vectors behind each Frobenius norm of larger ones, >= 1.
        tolerance: relative accuracy of their eigenvalues and directions, > 0.
        restarts: how often an eigenvalue that 60 Lanczos steps do not find to that accuracy is pursued, >= 0. With 0,
            norms and condition numbers of larger blocks are lower bounds, close ones as a rule.
        largest: blocks with more parameters are left out, >= 1; ``None``: none is.
    """

    dense: int = 600
    probes: int = 12
    tolerance: float = 1e-3
    restarts: int = 0
    largest: int | None = None

    def __post_init__(self) -> None:
        require_positive_integer("dense", self.dense)
        require_positive_integer("probes", self.probes)

    def extremes(
        self, operator: SymmetricOperator, metric: tuple[SymmetricOperator, SymmetricOperator] | None = None
    ) -> tuple[float, float]:
        """Smallest and largest eigenvalue, as :meth:`SymmetricOperator.extremes`."""
        return operator.extremes(metric, self.tolerance, self.restarts, self.dense)


@dataclass(frozen=True)
class BlockQuality:
    """What was measured of one block. A number that makes no sense for it is ``nan``.

    Attributes:
        block: its key.
        part: the structure.
        target: ``"ggn"`` or ``"hessian"``.
        parameters: how many.
        how: ``"dense"`` or ``"products"``.
        damping: lambda of T.
        lowest: smallest eigenvalue of the undamped B.
        highest: its largest.
        error_operator: |C - T| / |T|, operator norm.
        error_frobenius: the same in the Frobenius norm.
        scale: the c that brings c C closest to T in the Frobenius norm.
        error_scaled: |c C - T| / |T|, Frobenius norm: what is left when the learning rate corrects the scale.
        cosine: between C^-1 g and T^-1 g, g the gradient of the mini-batch.
        cosine_gradient: between g and T^-1 g: what no preconditioner gets.
        condition_before: of T.
        condition_after: of C^-1/2 T C^-1/2.
    """

    block: str
    part: str
    target: str
    parameters: int
    how: str
    damping: float
    lowest: float
    highest: float
    error_operator: float = math.nan
    error_frobenius: float = math.nan
    scale: float = math.nan
    error_scaled: float = math.nan
    cosine: float = math.nan
    cosine_gradient: float = math.nan
    condition_before: float = math.nan
    condition_after: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


_STANDARD = Effort()


def measure_approximation(
    optimizer: SecondOrder,
    probe: Probe,
    *,
    targets: Sequence[Target] = ("ggn", "hessian"),
    damping: float | None = None,
    effort: Effort = _STANDARD,
    known: dict[tuple[str, tuple[str, ...], str], ExactBlock] | None = None,
) -> list[BlockQuality]:
    """Measure every block of an optimizer as it stands; nothing of it is changed.

    Inverses that the method renews on a schedule are renewed for the measurement, so that the structure answers for
    the statistics it has now, not for its last refresh.

    Args:
        optimizer: with its model at the checkpoint, and the statistics it has gathered.
        probe: the mini-batch that defines the exact curvature.
        targets: which exact matrices.
        damping: lambda of T, > 0; ``None``: what the optimizer damps a whole matrix with, and a thousandth of the
            largest eigenvalue where that is zero.
        effort: how much is spent.
        known: exact matrices of the same model on the same probe, from an earlier call with the same dictionary; what
            is computed now is added.

    Raises:
        ArgumentError: for a target, a damping or an optimizer that is none.
    """
    if not isinstance(optimizer, SecondOrder):
        raise ArgumentError(f"osculate.build makes the optimizers that can be measured, got {type(optimizer).__name__}")
    if isinstance(targets, str) or not targets or not set(targets) <= set(get_args(Target)):
        raise ArgumentError(f"targets must be a sequence of 'ggn' and 'hessian', got {targets!r}; e.g. targets=['ggn']")
    if damping is not None and not 0.0 < damping < math.inf:
        raise ArgumentError(f"damping must be a finite number > 0, got {damping!r}; None takes the optimizer's own")
    twin, exact = in_double(optimizer), probe.double()
    memory = {} if known is None else known
    found = []
    for block in twin.blocks:
        sides = twin.sides(block)
        if sum(parameter.numel() for parameter in block.parameters) > (effort.largest or math.inf):
            continue
        if block.part.schedule.inverses is not None:  # quasi-Newton matrices are inverted once, at the start
            requests = block.part.matrices(block.state, sides)
            if requests:
                block.part.install(block.state, compute_many(requests))
        for target in targets:
            key = (block.layer.name, block.names, target)
            if key not in memory:
                memory[key] = _exact(twin, block, exact, target, effort)
            found.append(_measure(block, sides, memory[key], target, damping, effort))
    return found


@dataclass(frozen=True)
class ExactBlock:
    """Exact curvature of one block, without damping: matrix, extreme eigenvalues, and the gradient."""

    matrix: SymmetricOperator
    lowest: float
    highest: float
    gradient: Tensor


def _exact(twin: SecondOrder, block: Block, probe: Probe, target: Target, effort: Effort) -> ExactBlock:
    matrix = exact_block(twin, block, probe, target)
    if matrix.size <= effort.dense:
        matrix = _of_matrix(matrix.dense())
    return ExactBlock(matrix, *effort.extremes(matrix), block_gradient(twin, block, probe))


def _measure(
    block: Block, sides: SideDamping, exact: ExactBlock, target: Target, damping: float | None, effort: Effort
) -> BlockQuality:
    matrix, lowest, highest = exact.matrix, exact.lowest, exact.highest
    dense = matrix.size <= effort.dense
    shift = sides.whole if damping is None else damping
    shift = shift or 1e-3 * max(abs(lowest), abs(highest))
    start = BlockQuality(
        block.key, describe(block.part), target, matrix.size, "dense" if dense else "products", shift, lowest, highest
    )
    truth = matrix.shifted(shift)
    numbers: dict[str, Any] = _directions(block, truth, exact.gradient, lowest + shift, effort)
    definite = lowest + shift > 0.0
    if definite:
        numbers["condition_before"] = (highest + shift) / (lowest + shift)
    structure = _structure(block, sides, dense, matrix, effort)
    if structure is not None:
        numbers |= _errors(structure[0], truth, max(abs(lowest + shift), abs(highest + shift)), effort)
        if definite:
            low, high = effort.extremes(truth, structure)
            numbers["condition_after"] = high / low if low > 0.0 else math.inf
    return replace(start, **numbers)


def _of_matrix(matrix: Tensor) -> SymmetricOperator:
    return SymmetricOperator(matrix.shape[0], lambda v: matrix @ v, matrix.device, lambda rows: rows @ matrix)


def _structure(
    block: Block, sides: SideDamping, dense: bool, like: SymmetricOperator, effort: Effort
) -> tuple[SymmetricOperator, SymmetricOperator] | None:
    """C and its inverse; ``None`` for a structure that is no positive definite matrix."""
    if not declared(block.part, StructureDeclarations).linear:
        return None
    if dense:
        own = _own_matrix(block, sides)
        factor, failed = torch.linalg.cholesky_ex(own)
        return None if bool(failed) else (_of_matrix(own), _of_matrix(torch.cholesky_inverse(factor)))
    inverse = SymmetricOperator(like.size, lambda v: flat_direction(block, v), like.device)
    return _product(block, sides, inverse, effort), inverse


def _own_matrix(block: Block, sides: SideDamping) -> Tensor:
    """(size, size) C of the block itself, out of that of its layer where the structure serves only some parameters."""
    like, size = block.parameters[0], sum(parameter.numel() for parameter in block.parameters)
    if isinstance(block.part, Identity):  # made in its own size: the layer may be far too large for one
        return torch.eye(size, dtype=torch.float64, device=like.device)
    matrix = block.part.to_dense(block.state, block.seen, sides).double()
    if matrix.shape[0] == size:
        return matrix
    marks = [torch.full((p.numel(),), name in block.names) for name, p in block.layer.parameters.items()]
    chosen = torch.cat(marks).nonzero().flatten().to(matrix.device)
    return matrix[chosen][:, chosen]


def _product(block: Block, sides: SideDamping, inverse: SymmetricOperator, effort: Effort) -> SymmetricOperator:
    """Products with C: from both factors of a Kronecker structure, else by solving with C^-1."""
    part = block.part
    if not isinstance(part, Kronecker):
        return SymmetricOperator(
            inverse.size,
            lambda v: conjugate_gradients(inverse, v, tolerance=0.1 * effort.tolerance, limit=200),
            inverse.device,
        )
    rows, columns = block.seen.matrix_shape
    state: Any = block.state
    outer = _inverted(part.outputs.left(state.outputs, _eye(rows, inverse)))
    inner = _inverted(part.inputs.right(state.inputs, _eye(columns, inverse)))
    product = partial(flat_map, block, lambda storage: (outer @ storage[0] @ inner,))
    return SymmetricOperator(inverse.size, product, inverse.device)


def _eye(size: int, like: SymmetricOperator) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=like.device)


def _inverted(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(0.5 * (matrix + matrix.T)))


def _errors(structure: SymmetricOperator, truth: SymmetricOperator, norm: float, effort: Effort) -> dict[str, float]:
    """Operator and Frobenius norms of C - T relative to T, and the best multiple of C."""
    if truth.size <= effort.dense:
        approximate, exact = structure.dense(), truth.dense()
        top = float(torch.linalg.eigvalsh(approximate - exact).abs().max() / norm)
    else:
        top = (structure - truth).norm(effort.tolerance, effort.restarts) / norm
        drawn = signs(truth, effort.probes, torch.Generator().manual_seed(0))
        approximate = torch.stack([structure.product(vector) for vector in drawn])
        exact = torch.stack([truth.product(vector) for vector in drawn])
    length = torch.linalg.vector_norm(exact)
    scale = float((approximate * exact).sum() / approximate.square().sum())
    return {
        "error_operator": top,
        "error_frobenius": float(torch.linalg.vector_norm(approximate - exact) / length),
        "scale": scale,
        "error_scaled": float(torch.linalg.vector_norm(scale * approximate - exact) / length),
    }


def _directions(
    block: Block, truth: SymmetricOperator, gradient: Tensor, lowest: float, effort: Effort
) -> dict[str, float]:
    """Angles to the exact damped direction; none where T is not positive definite."""
    if not lowest > 0.0 or not bool(gradient.any()):
        return {}
    if truth.size <= effort.dense:
        factor = torch.linalg.cholesky(truth.dense())
        exact = torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
    else:
        try:
            exact = conjugate_gradients(truth, gradient, tolerance=0.1 * effort.tolerance, limit=500)
        except OsculateError:
            return {}
    own = flat_direction(block, gradient)
    return {"cosine": cosine(own, exact), "cosine_gradient": cosine(gradient, exact)}
