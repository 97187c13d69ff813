"""Contracts of the rules for negative entries of a joint solution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...curvature.declarations import SignDeclarations, declared
from .cases import Case
from .contract import (
    contract,
    contracts_of,
    require_bound,
    require_close,
    require_finite,
    require_unchanged,
    undeclared,
)

__all__ = ["CONTRACTS"]

_LAYERS = 3


def _system(case: Case, key: int, *, coupled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """beta, M and r with M beta = r > 0; strongly coupled layers have a negative beta."""
    like = {"dtype": case.dtype, "device": case.device}
    coupling = torch.tensor([[1.0, 0.95, 0.1], [0.95, 1.0, 0.1], [0.1, 0.1, 1.0]], **like)  # type: ignore[arg-type]
    scale = case.randn(_LAYERS, key=key).abs() + 0.5
    matrix = coupling * torch.outer(scale, scale)
    solution = torch.tensor([2.0, -1.5 if coupled else 1.5, 0.7], **like) / scale  # type: ignore[arg-type]
    return solution, matrix, matrix @ solution


def _value(steps: Tensor, matrix: Tensor, right: Tensor) -> float:
    return float(0.5 * steps @ matrix @ steps - right @ steps)


@contract("sign-finite", "sign", "steps are finite, whatever is zero, and where the matrix has no minimum")
def sign_finite(rule: Any, case: Case) -> None:
    """No slope, no curvature, a negative eigenvalue."""
    solution, matrix, right = _system(case, 1, coupled=True)
    zero, indefinite = torch.zeros_like(matrix), matrix - 2.0 * torch.diag(matrix.diagonal())
    for form, slope in ((matrix, torch.zeros_like(right)), (zero, right), (indefinite, right)):
        require_finite("steps", rule.choose(solution.clone(), form.clone(), slope.clone()))


@contract(
    "sign-nonnegative",
    "sign",
    "no step goes against its direction",
    unless=lambda rule: "declares signed" if declared(rule, SignDeclarations).signed else None,
)
def sign_nonnegative(rule: Any, case: Case) -> None:
    """Where the solution has a negative entry."""
    require_bound("smallest step", rule.choose(*_system(case, 2, coupled=True)).min(), "at least", 0.0)


@contract("sign-minimum", "sign", "a solution without negative entries is taken as it is")
def sign_minimum(rule: Any, case: Case) -> None:
    """Three systems."""
    for key in range(3):
        solution, matrix, right = _system(case, key, coupled=False)
        require_close("steps", rule.choose(solution.clone(), matrix, right), solution)


@contract(
    "sign-descends",
    "sign",
    "the quadratic model falls at least as far as with steps r_l / (L M_ll)",
    unless=undeclared(SignDeclarations, "descends"),
)
def sign_descends(rule: Any, case: Case) -> None:
    """sum of r_l^2 / (2 L M_ll), also where the solution has a negative entry."""
    for key in range(3):
        solution, matrix, right = _system(case, key, coupled=True)
        found = _value(rule.choose(solution, matrix, right), matrix, right)
        bound = -float((right.square() / matrix.diagonal()).sum()) / (2 * _LAYERS)
        require_bound("change of the model", found, "at most", bound, slack=-1e-9 * bound)


@contract("sign-order", "sign", "the order of the layers does not matter")
def sign_order(rule: Any, case: Case) -> None:
    """Another order."""
    solution, matrix, right = _system(case, 4, coupled=True)
    order = torch.tensor([2, 0, 1], device=case.device)
    plain = rule.choose(solution.clone(), matrix.clone(), right.clone())
    require_close("steps", rule.choose(solution[order], matrix[order][:, order], right[order]), plain[order])


@contract("sign-purity", "sign", "solution, matrix and slopes stay bitwise as they were")
def sign_purity(rule: Any, case: Case) -> None:
    """All three."""
    given = _system(case, 5, coupled=True)
    with require_unchanged("solution, matrix or slopes", *given):
        rule.choose(*given)


CONTRACTS = contracts_of(globals())
