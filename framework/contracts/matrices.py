"""Contracts of what works on single matrices: operations, spectra, moments, scales, skip rules, initial matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics
from ...preconditioners.operations import Request
from ...preconditioners.structures.identity import Identity
from .cases import Case
from .contract import (
    ContractViolation,
    NotApplicable,
    contract,
    contracts_of,
    require,
    require_bound,
    require_close,
    require_equal,
    require_finite,
    require_symmetric,
    require_unchanged,
)
from .structures import given_tensors
from .workbench import Workbench, estimator_for

__all__ = ["CONTRACTS"]

_DAMPING = 0.1


def _requests(rule: Any, case: Case) -> list[Request]:
    """Matrices of two orders, one of them twice, each with where an iteration would start."""
    sizes = ((3, 1), (5, 2), (3, 3))
    return [Request(case.spd(size, 50.0, key), _DAMPING, rule, case.spd(size, 1.0, key + 9)) for size, key in sizes]


@contract("operation-batch", "operation", "what is computed of a matrix does not depend on its company")
def operation_batch(rule: Any, case: Case) -> None:
    """Three requests together, and one by one."""
    for index, found in enumerate(rule.compute(_requests(rule, case))):
        (alone,) = rule.compute([_requests(rule, case)[index]])
        require_close(f"result {index} of three", found.value, alone.value)


@contract("operation-purity", "operation", "the matrices stay bitwise as they were")
def operation_purity(rule: Any, case: Case) -> None:
    """And so do the starts."""
    requests = _requests(rule, case)
    matrices, starts = (
        [entry.matrix for entry in requests],
        [entry.start for entry in requests if entry.start is not None],
    )
    with require_unchanged("a matrix", *matrices), require_unchanged("where an iteration starts", *starts):
        rule.compute(requests)


@contract("operation-nonfinite", "operation", "a matrix that is not finite gives no value, and the others theirs")
def operation_nonfinite(rule: Any, case: Case) -> None:
    """NaN in the second of three."""
    whole, requests = rule.compute(_requests(rule, case)), _requests(rule, case)
    requests[1] = replace(requests[1], matrix=torch.full_like(requests[1].matrix, math.nan))
    found = rule.compute(requests)
    require(found[1].value is None, "a matrix of NaNs has a result")
    for index in (0, 2):
        require(found[index].value is not None, f"result {index} is missing beside a matrix of NaNs")
        require_close(f"result {index} beside a matrix of NaNs", found[index].value, whole[index].value)


@contract("spectrum-inverse", "spectrum", "what the operation computes is the inverse of the damped matrix")
def spectrum_inverse(rule: Any, case: Case) -> None:
    """For a positive definite matrix."""
    matrix = case.spd(4, 50.0, 1)
    (found,) = rule.operation.compute([Request(matrix.clone(), _DAMPING, rule.operation)])
    product = rule.damped(matrix.clone(), _DAMPING) @ found.value
    require_close("damped matrix times computed inverse", product, torch.eye(4).to(product))


@contract("spectrum-definite", "spectrum", "the damped matrix is symmetric positive definite")
def spectrum_definite(rule: Any, case: Case) -> None:
    """For a singular matrix, and for an indefinite one where ``takes_indefinite`` says so."""
    vector = case.randn(4, key=2)
    matrices = [torch.outer(vector, vector)]
    if rule.takes_indefinite:
        matrices.append(case.spd(4, 50.0, 1) - 2.0 * torch.eye(4).to(vector))
    for matrix in matrices:
        damped = rule.damped(matrix, _DAMPING)
        require_symmetric("the damped matrix", damped)
        require_bound("smallest eigenvalue of the damped matrix", torch.linalg.eigvalsh(damped)[0], "more than", 0.0)


def _measured(rule: Any, case: Case) -> list[LayerStatistics]:
    bench = Workbench(Identity(), case, estimator=estimator_for(rule.needs))
    return [entry for entry in bench.measure().values() if entry.layer.is_matrix]


def _bases(entry: LayerStatistics, case: Case) -> tuple[Tensor, Tensor]:
    rows, columns = entry.layer.matrix_shape
    inner, outer = (torch.linalg.qr(case.randn(size, size, key=3))[0] for size in (columns, rows))
    return inner, outer


@contract("moments-trace", "moments", "a change of basis keeps the sum of the squares")
def moments_trace(rule: Any, case: Case) -> None:
    """In the original coordinates and in random orthogonal ones; no square is negative."""
    for entry in _measured(rule, case):
        inner, outer = _bases(entry, case)
        plain = rule.squares(entry, torch.eye(len(inner)).to(inner), torch.eye(len(outer)).to(outer))
        turned = rule.squares(entry, inner, outer)
        require_finite("squares in the basis", plain, turned)
        require_bound("smallest square", torch.minimum(plain.min(), turned.min()), "at least", 0.0)
        require_close(f"sum of squares of layer {entry.layer.name!r} in another basis", turned.sum(), plain.sum())


@contract("moments-purity", "moments", "statistics and bases stay bitwise as they were")
def moments_purity(rule: Any, case: Case) -> None:
    """While squares are measured and matrices gathered."""
    for entry in _measured(rule, case):
        inner, outer = _bases(entry, case)
        with require_unchanged(f"what is measured of layer {entry.layer.name!r}", inner, outer, *given_tensors(entry)):
            rule.squares(entry, inner, outer)
            rule.accumulate(torch.zeros_like(inner), torch.zeros_like(outer), entry, 0.5, 0.5)


def _shared(case: Case) -> list[LayerStatistics]:
    bench = Workbench(Identity(), case, estimator=estimator_for(Needs.INPUTS | Needs.ROOTS))
    return [entry for entry in bench.measure().values() if entry.layer.is_matrix]


@contract("sharing-one-position", "sharing", "with one call and one position both moments are plain means over samples")
def sharing_one_position(rule: Any, case: Case) -> None:
    """Of layers without groups."""
    found = False
    for entry, other in zip(_shared(case), _shared(case), strict=True):
        if other.positions > 1 or other.layer.groups > 1:
            continue
        assert other.roots is not None
        expected = (other.input_rows(), 1.0), other.roots
        for side, (rows, scale), (plain, factor) in zip(
            ("inputs", "outputs"), (rule.inputs(entry), rule.outputs(entry)), expected, strict=True
        ):
            moment = factor**2 * plain.T @ plain / other.samples
            require_close(f"moment of the {side} of layer {other.layer.name!r}", scale * rows.T @ rows, moment)
        found = True
    if not found:
        raise NotApplicable("no layer with one position")


@contract("sharing-purity", "sharing", "statistics stay bitwise as they were")
def sharing_purity(rule: Any, case: Case) -> None:
    """While the rows of both sides are taken."""
    for entry in _shared(case):
        with require_unchanged(f"what is measured of layer {entry.layer.name!r}", *given_tensors(entry)):
            rule.inputs(entry)
            rule.outputs(entry)


@contract("scale-positive", "update scale", "the factor of an update is a finite number > 0")
def scale_positive(rule: Any, case: Case) -> None:
    """For tall, square and wide matrices."""
    for rows, columns in ((1, 1), (1, 64), (64, 1), (8, 8), (512, 32)):
        factor = rule.factor(rows, columns)
        fits = 0.0 < factor < math.inf
        require(fits, f"the factor of a {rows} x {columns} matrix is {factor:g}, but must be finite and more than 0")


@contract("skip-negative", "skip rule", "a pair without positive curvature is never used")
def skip_negative(rule: Any, case: Case) -> None:
    """s'y < 0, and y = 0."""
    step, reference = case.randn(4, key=4), case.randn(4, key=5)
    for change in (-step, torch.zeros_like(step)):
        accepted = rule.accepts(step.clone(), change, reference.clone())
        require(not bool(accepted), f"a pair with s'y = {float(torch.dot(step, change)):.3g} was accepted")


@contract("skip-flag", "skip rule", "the verdict is a 0-dimensional bool on the pair's device")
def skip_flag(rule: Any, case: Case) -> None:
    """For a good pair."""
    step = case.randn(4, key=4)
    accepted = rule.accepts(step, step.clone(), 1e-3 * step)
    fits = isinstance(accepted, Tensor) and accepted.dtype == torch.bool and accepted.ndim == 0
    require(fits and accepted.device == step.device, f"the verdict is {accepted!r}")


@contract("skip-mapped", "skip rule", "a rule takes many pairs at once, with batch axes in front")
def skip_mapped(rule: Any, case: Case) -> None:
    """Good and bad pairs together as one by one."""
    step, reference = case.randn(4, key=4), 1e-3 * case.randn(4, key=5)
    changes = torch.stack([step, -step, 1e-9 * step, reference])
    given = (step.expand(4, 4), changes, reference.expand(4, 4))
    try:
        mapped = rule.accepts(*given)
    except Exception as error:  # whatever it is, training would meet it in training
        raise ContractViolation(f"testing stacked pairs raises {type(error).__name__}: {error}") from error
    alone = torch.stack([rule.accepts(*(value[index] for value in given)) for index in range(4)])
    require_equal("verdicts on mapped pairs", mapped, alone)


@contract("initial-scale-positive", "initial scale", "H_0 is positive definite, before the first pair and after any")
def initial_scale_positive(rule: Any, case: Case) -> None:
    """Usual pairs, tiny and huge ones, and those whose squares leave the range of the precision."""
    require(0.0 < rule.initial < math.inf, f"gamma is {rule.initial!r} before the first pair, must be finite and > 0")
    step = case.randn(4, key=4)
    for length, curvature in ((1.0, 1.0), (1.0, 1e-12), (1.0, 1e12), (1e-200, 1.0), (1e200, 1.0)):
        found = rule.scale(length * step, length * curvature * step)
        fits = found.ndim == 0 and found.dtype == step.dtype and found.device == step.device
        require(fits, f"gamma is {found!r}, not a number in {step.dtype} on the pair's device")
        require_finite("gamma", found)
        require_bound("gamma", found, "more than", 0.0)


@contract("initial-scale-length", "initial scale", "a pair c times as long gives the same H_0")
def initial_scale_length(rule: Any, case: Case) -> None:
    """c = 2^10, so that scaling itself does not round."""
    step, other = case.randn(4, key=4), case.randn(4, key=5)
    change = step + 0.1 * other
    require_close("gamma", rule.scale(1024.0 * step, 1024.0 * change), rule.scale(step.clone(), change.clone()))


CONTRACTS = contracts_of(globals())
