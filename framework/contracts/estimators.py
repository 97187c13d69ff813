"""Contracts of curvature estimators and quadratic forms."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import EstimatorDeclarations, FormDeclarations, declared
from ...curvature.records.needs import Needs
from ...curvature.records.statistics import LayerStatistics
from .cases import Batch, Case
from .contract import (
    ContractViolation,
    NotApplicable,
    contract,
    contracts_of,
    require,
    require_bound,
    require_close,
    require_equal,
    require_symmetric,
    require_unchanged,
    undeclared,
)
from .measuring import MeasuredCase, curvature_of, exact_fisher, exact_hessian

__all__ = ["CONTRACTS"]

_SIGMAS = 6.0
_REPEATS = 200
_DRAWS = 96


def _no_matrix(part: Any) -> str | None:
    return None if part.provides & (Needs.VECTORS | Needs.MATRIX) else "provides no whole curvature matrix"


def _no_vectors(part: Any) -> str | None:
    return None if Needs.VECTORS in part.provides else "provides no gradient vectors"


def _no_dense_matrix(part: Any) -> str | None:
    return None if Needs.MATRIX in part.provides else "provides no dense matrix"


def _sampled(part: Any) -> str | None:
    draws = part.needs_likelihood and not declared(part, EstimatorDeclarations).exact
    return "draws labels from the model (needs_likelihood, not exact)" if draws else None


def _matrices(part: Any, case: Case, batches: list[Batch], **options: Any) -> dict[str, Tensor]:
    measured = MeasuredCase(case).statistics(part, batches, **options)
    return {name: curvature_of(entry)[0] for name, entry in measured.items()}


def _compare(what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    require(set(actual) == set(expected), f"{what}: statistics of layers {sorted(actual)}, expected {sorted(expected)}")
    for name, value in expected.items():
        require_close(f"curvature of layer {name!r} {what}", actual[name], value)


@contract("estimator-provides", "curvature", "what an estimator declares to provide is there")
def estimator_provides(part: Any, case: Case) -> None:
    """Of every layer of the network."""
    fields = {Needs.INPUTS: "inputs", Needs.ROOTS: "roots", Needs.VECTORS: "vectors"}
    fields |= {Needs.MATRIX: "matrix", Needs.PAIRS: "mean_gradient", Needs.CHANGES: "gradients"}
    for name, entry in MeasuredCase(case).statistics(part, [case.batch()]).items():
        for need, field in fields.items():
            missing = need in part.provides and getattr(entry, field, None) is None
            require(not missing, f"{field} of layer {name!r} is missing, although {need} is declared")


@contract(
    "estimator-consistent",
    "curvature",
    "rows at the pre-activations and gradient vectors stand for the same matrix",
    unless=(_no_vectors, lambda part: None if Needs.ROOTS in part.provides else "provides no rows"),
)
def estimator_consistent(part: Any, case: Case) -> None:
    """The bias block of layers with one position: the second moment of the rows."""
    found = False
    for name, entry in MeasuredCase(case).statistics(part, [case.batch()]).items():
        if not entry.layer.has_bias or entry.positions != 1 or entry.roots is None:
            continue
        rows, factor = entry.roots
        size = rows.shape[1]
        moment = factor**2 * rows.T @ rows / (entry.samples * entry.positions)
        require_close(f"bias block of layer {name!r}", curvature_of(entry)[0][-size:, -size:], moment)
        found = True
    if not found:
        raise NotApplicable("no layer with a bias and one position")


@contract(
    "estimator-permuted-samples",
    "curvature",
    "the order of the samples does not matter",
    unless=(_no_matrix, _sampled),
)
def estimator_permuted(part: Any, case: Case) -> None:
    """The matrix that the vectors stand for."""
    inputs, targets = case.batch()
    order = case.order()
    plain = _matrices(part, case, [(inputs, targets)])
    _compare("with permuted samples", _matrices(part, case, [(inputs[order], targets[order])]), plain)


@contract(
    "estimator-mean-versus-sum",
    "curvature",
    "a summed loss gives the same curvature per sample as its mean",
    unless=(
        _no_matrix,
        lambda part: (
            None
            if declared(part, EstimatorDeclarations).per_sample
            else "declares per_sample = False: units of the loss"
        ),
    ),
)
def estimator_mean_versus_sum(part: Any, case: Case) -> None:
    """The matrix that the vectors stand for."""
    total = _matrices(part, case, [case.batch()], reduction="sum")
    _compare("with a summed loss", total, _matrices(part, case, [case.batch()]))


def _tensors(entry: LayerStatistics) -> dict[str, Tensor]:
    found = {name: value for name, value in vars(entry).items() if isinstance(value, Tensor)}
    for name in ("gradients", "sampled_parameter_gradients"):
        found |= {f"{name}[{index}]": value for index, value in enumerate(getattr(entry, name) or ())}
    return found


@contract(
    "estimator-matrix",
    "curvature",
    "the dense matrix is the one that the vectors stand for",
    unless=(_no_vectors, _no_dense_matrix),
)
def estimator_matrix(part: Any, case: Case) -> None:
    """Of every layer."""
    for name, entry in MeasuredCase(case).statistics(part, [case.batch()]).items():
        assert entry.matrix is not None
        require_close(f"dense matrix of layer {name!r}", entry.matrix(), curvature_of(entry)[0])


@contract(
    "estimator-definite",
    "curvature",
    "the dense matrix is symmetric and has no negative eigenvalue",
    unless=(_no_dense_matrix, lambda part: None if part.definite else "declares definite = False"),
)
def estimator_definite(part: Any, case: Case) -> None:
    """Of every layer, to rounding."""
    for name, entry in MeasuredCase(case).statistics(part, [case.batch()]).items():
        assert entry.matrix is not None
        matrix = entry.matrix()
        require_symmetric(f"the dense matrix of layer {name!r}", matrix)
        eigenvalues = torch.linalg.eigvalsh(matrix)
        least, slack = float(eigenvalues[0]), 1e-10 * float(eigenvalues.abs().max())
        require_bound(f"smallest eigenvalue of layer {name!r}", least, "at least", -slack)


@contract("estimator-purity", "curvature", "filling a record leaves what was recorded as it was")
def estimator_purity(part: Any, case: Case) -> None:
    """Also building the vectors; twice gives the same."""
    measured = MeasuredCase(case)
    for name, entry in measured.statistics(part, [case.batch()]).items():
        kept = {key: value.clone() for key, value in _tensors(entry).items()}
        filled = part.fill(entry)
        first = [value.clone() for value in filled.vectors()] if filled.vectors is not None else []
        for key, value in _tensors(entry).items():
            require_equal(f"{key} of layer {name!r}", value, kept[key])
        for one, two in zip(filled.vectors() if first else [], first, strict=True):
            require_equal(f"vectors of layer {name!r} built again", one, two)


@contract(
    "estimator-fisher",
    "curvature",
    "on average the matrix is the Fisher information",
    unless=lambda part: (
        None if declared(part, EstimatorDeclarations).estimates == "fisher" else "does not declare estimates = 'fisher'"
    ),
)
def estimator_fisher(part: Any, case: Case) -> None:
    """Within six standard errors, over many copies of three samples."""
    measured, (inputs, targets) = MeasuredCase(case), case.batch(0, 3)
    many = (inputs.repeat(_REPEATS, *[1] * (inputs.ndim - 1)), targets.repeat(_REPEATS, *[1] * (targets.ndim - 1)))
    statistics = measured.statistics(part, [many])
    for layer in (entry.layer for entry in statistics.values()):
        found, error = curvature_of(statistics[layer.name])
        error = torch.zeros_like(error) if declared(part, EstimatorDeclarations).exact else error
        expected = exact_fisher(case, (inputs, targets), layer)
        _require_mean(f"curvature of layer {layer.name!r}", found, expected, error)


def _require_mean(what: str, found: Tensor, expected: Tensor, error: Tensor) -> None:
    allowed = _SIGMAS * error + 1e-8 * expected.abs().max()
    ratios = (found - expected).abs() / allowed
    worst = float(ratios.max())
    if not worst <= 1.0:
        index = tuple(torch.nonzero(ratios == ratios.max())[0].tolist()) if math.isfinite(worst) else ()
        where = f" at entry {index}: {float(found[index]):.6g}, exact {float(expected[index]):.6g};" if index else ","
        raise ContractViolation(
            f"{what} is not the exact one on average{where} the distance is {worst:.3g} times the {_SIGMAS:g} standard "
            "errors allowed",
            value=worst,
            bound=1.0,
        )


@contract("form-symmetric", "quadratic form", "one symmetric matrix over all layers")
def form_symmetric(part: Any, case: Case) -> None:
    """(L, L)."""
    measured = MeasuredCase(case)
    found, count = measured.form(part, measured.directions()), len(measured.layers)
    require(tuple(found.shape) == (count, count), f"{count} layers, but a matrix of shape {tuple(found.shape)}")
    require_symmetric("the matrix of the forms", found)


@contract("form-quadratic", "quadratic form", "directions c times as long have forms c^2 times as large")
def form_quadratic(part: Any, case: Case) -> None:
    """c = 4, with the same labels and signs."""
    measured = MeasuredCase(case)
    directions = measured.directions()
    longer = {name: tuple(4.0 * value for value in values) for name, values in directions.items()}
    require_close("forms", measured.form(part, longer), 16.0 * measured.form(part, directions))


@contract(
    "form-definite",
    "quadratic form",
    "no direction has negative curvature",
    unless=undeclared(FormDeclarations, "definite"),
)
def form_definite(part: Any, case: Case) -> None:
    """Smallest eigenvalue."""
    measured = MeasuredCase(case)
    eigenvalues = torch.linalg.eigvalsh(measured.form(part, measured.directions()))
    least, slack = float(eigenvalues[0]), 1e-10 * float(eigenvalues.abs().max())
    require_bound("smallest eigenvalue of the forms", least, "at least", -slack)


@contract(
    "form-expectation",
    "quadratic form",
    "on average the forms are those of the stated matrix",
    unless=lambda part: None if declared(part, FormDeclarations).estimates else "states no matrix that it estimates",
)
def form_expectation(part: Any, case: Case) -> None:
    """``estimates`` is ``"fisher"`` or ``"hessian"``; the diagonal, within six standard errors over many draws."""
    measured = MeasuredCase(case)
    directions = measured.directions()
    draws = torch.stack([measured.form(part, directions, seed=seed).diagonal() for seed in range(_DRAWS)])
    if part.estimates == "hessian":
        expected = exact_hessian(case, case.batch(), directions, measured.layers).diagonal()
    else:
        flat = [torch.cat([value.flatten() for value in directions[layer.name]]) for layer in measured.layers]
        fishers = [exact_fisher(case, case.batch(), layer) for layer in measured.layers]
        expected = torch.stack([vector @ fisher @ vector for vector, fisher in zip(flat, fishers, strict=True)])
    _require_mean("the layers' own forms", draws.mean(0), expected, draws.std(0) / _DRAWS**0.5)


@contract("form-purity", "quadratic form", "directions stay bitwise as they were")
def form_purity(part: Any, case: Case) -> None:
    """Of every layer."""
    measured = MeasuredCase(case)
    directions = measured.directions()
    with ExitStack() as stack:
        for name, values in directions.items():
            stack.enter_context(require_unchanged(f"the direction of layer {name!r}", *values))
        measured.form(part, directions, copy=False)


CONTRACTS = contracts_of(globals())
