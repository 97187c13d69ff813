"""A suite that cannot fail is worthless: for every contract a broken part that this contract catches, and no other."""

from typing import Any

import osculate as osc
import pytest
import torch
from broken_matrices import MATRICES
from broken_measures import MEASURES, Slopes
from broken_methods import HONEST, METHODS
from broken_rules import RULES
from broken_structures import STRUCTURES, Squares
from osculate.framework.contracts import (
    CONTRACTS,
    ContractViolation,
    certify,
    require_close,
    require_equal,
    require_finite,
    require_same_state,
)

BROKEN: dict[str, Any] = STRUCTURES | RULES | MEASURES | MATRICES | METHODS


def test_there_is_a_broken_part_for_every_contract() -> None:
    assert set(BROKEN) == {contract.name for contract in CONTRACTS}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_part_is_caught_by_its_contract_and_by_no_other(name: str) -> None:
    certificate = certify(BROKEN[name], name=name)
    assert not certificate.ok
    assert {row.contract: row.detail for row in certificate.violations}.keys() == {name}, certificate.violations
    with pytest.raises(ContractViolation, match=f"1 contracts violated\n.*{name}"):
        certificate.require()


@pytest.mark.parametrize("part", [Squares(), Slopes(), HONEST], ids=["structure", "step size", "method"])
def test_the_parts_they_were_made_of_hold_everything(part: Any) -> None:
    certify(part).require()


def test_a_factor_is_tried_on_each_of_its_sides() -> None:
    class OneSided(osc.Covariance):
        def left(self, state: Any, value: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().left(state, value)

    assert [row.contract for row in certify(OneSided()).violations] == ["dense-solve"]


def test_a_part_that_raises_is_a_violation_with_the_error() -> None:
    class Raises(osc.PerOutput):
        def split(self, values: Any) -> torch.Tensor:
            raise KeyError("lost")

    rows = certify(Raises()).violations
    assert rows and all("raised KeyError: 'lost'" in row.detail for row in rows)


def test_a_violation_names_entry_values_bound_and_ratio() -> None:
    one = torch.tensor([1.0, 2.0, 4.0])
    other = torch.tensor([1.0, 2.5, 4.0])
    with pytest.raises(
        ContractViolation, match=r"x: entry \(1,\) is 2.5, expected 2; error: 0.5, bound 0.4, ratio 1.25"
    ):
        require_close("x", other, one, tolerance=0.1)
    with pytest.raises(ContractViolation, match=r"x is not bitwise the same: entry \(1,\) is 2.5, expected 2.0"):
        require_equal("x", other, one)
    with pytest.raises(ContractViolation, match=r"x has shape \(2,\)"):
        require_close("x", other[:2], one)
    with pytest.raises(ContractViolation, match=r"x has shape \(3,\) and torch.float64"):
        require_equal("x", other.double(), one)
    with pytest.raises(ContractViolation, match=r"x is not finite: entry \(0,\) is nan"):
        require_finite("x", one * torch.nan)
    with pytest.raises(ContractViolation, match="x/a is 1, expected 2"):
        require_same_state("x", {"a": 1}, {"a": 2})
    require_same_state("x", {"a": [one, float("nan")]}, {"a": [one, float("nan")]})
    violation = ContractViolation("x", value=3.0, bound=2.0)
    assert (violation.value, violation.bound, violation.ratio) == (3.0, 2.0, 1.5)
