"""A suite that cannot fail is worthless: for every contract a broken part that this contract catches, and no other."""

from typing import Any

import osculate as osc
import pytest
import torch
from broken_matrices import MATRICES
from broken_measures import MEASURES, Slopes
from broken_methods import HONEST, METHODS
from broken_rules import ADAPTED, RULES
from broken_structures import STRUCTURES, IndefiniteWhereRepeated, Squares, Undeclared
from osculate.framework.contracts import (
    CONTRACTS,
    ContractViolation,
    certify,
    require,
    require_close,
    require_equal,
    require_finite,
    require_same_state,
    require_symmetric,
)

BROKEN: dict[str, Any] = STRUCTURES | RULES | MEASURES | MATRICES | METHODS


def test_there_is_a_broken_part_for_every_contract() -> None:
    assert set(BROKEN) == {contract.name for contract in CONTRACTS}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_part_is_caught_by_its_contract_and_by_no_other(name: str) -> None:
    certificate = certify(BROKEN[name], name=name)
    assert not certificate.ok
    assert {row.contract: row.detail for row in certificate.violations}.keys() == {name}, certificate.violations
    with pytest.raises(ContractViolation, match=f"1 contract violated\n.*{name}"):
        certificate.require()


@pytest.mark.parametrize("part", [Squares(), Slopes(), HONEST], ids=["structure", "step size", "method"])
def test_the_parts_they_were_made_of_hold_everything(part: Any) -> None:
    certify(part).require()


@pytest.mark.parametrize("rule", ADAPTED, ids=lambda rule: type(rule).__name__)
def test_an_adapted_lambda_out_of_range_is_caught(rule: Any) -> None:
    assert [row.contract for row in certify(rule).violations] == ["damping-adapted"]


def test_a_matrix_that_is_indefinite_only_without_full_rank_is_caught() -> None:
    (row,) = certify(IndefiniteWhereRepeated()).violations
    assert row.contract == "positive-definite"
    assert "with every sample the same is -0.759973, but must be more than 0" in row.detail


def test_a_guard_without_all_its_verbs_is_told_which_are_missing() -> None:
    class Bare:
        attempts, shrink = 3, 0.5

        def accepts(self, state: Any, trial: Any) -> bool:
            return bool(trial.after < trial.before)

    rows = {row.contract: row.detail for row in certify(Bare()).violations}
    assert "it lacks needs, init, record; a guard has" in rows["guard-numbers"]


def test_a_damping_that_returns_a_tuple_is_told_of_side_damping() -> None:
    class AsATuple:
        def sides(self, value: float, positions: int, eigenvalues: Any = None) -> Any:
            return value, value, value

    rows = {row.contract: row.detail for row in certify(AsATuple()).violations}
    expected = "sides(0.0, 1) returns (0.0, 0.0, 0.0), but must return an osculate.SideDamping"
    assert expected in rows["damping-positive"] and "SideDamping" in rows["damping-purity"]


def test_the_undeclared_need_is_named() -> None:
    class Asks(Squares):
        def moment(self, statistics: Any) -> Any:
            statistics.input_rows()
            return super().moment(statistics)

    class Raw(Squares):
        def moment(self, statistics: Any) -> Any:
            extra = 1.0 if statistics.output_gradient is None else 2.0
            return [extra * value for value in super().moment(statistics)]

    for part in (Undeclared(), Asks()):
        (row,) = certify(part).violations
        assert row.contract == "declared-needs"
        assert "it reads Needs.INPUTS without declaring it: add it to needs (now Needs.VECTORS)" in row.detail
    assert "it then raises CompatibilityError: inputs of layer" in row.detail
    (row,) = certify(Raw()).violations
    assert "it reads raw gradients of the record" in row.detail


def test_like_is_the_same_zero_in_contracts_and_in_training() -> None:
    seen: list[torch.Tensor] = []

    class Remembers(Slopes):
        def init(self, count: int, like: torch.Tensor) -> Any:
            seen.append(like)
            return super().init(count, like)

    class ReadsWeights(Slopes):
        """Works in training if ``like`` is a weight, and nowhere else."""

        def init(self, count: int, like: torch.Tensor) -> Any:
            return super().init(like.shape[0] and count, like)

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2)).to(torch.bfloat16)
    certify(Remembers()).require()
    certified = len(seen)
    osc.build(osc.Method(step_size=Remembers(), defaults={"lr": 0.1}), model)
    assert 0 < certified < len(seen)
    assert {(like.shape, float(like)) for like in seen} == {(torch.Size([]), 0.0)}
    assert seen[-1].dtype == torch.float32  # of the evidence, not of the weights
    assert not certify(ReadsWeights()).ok
    with pytest.raises(IndexError):
        osc.build(osc.Method(step_size=ReadsWeights(), defaults={"lr": 0.1}), model)


def test_nothing_checked_is_not_ok() -> None:
    wrong = r"'dense-solve' is about a structure or a factor, and this is a damping; contracts about that: damping-pos"
    with pytest.raises(osc.ArgumentError, match=wrong):
        certify(osc.Split(), contracts=["dense-solve"])
    with pytest.raises(osc.ArgumentError, match="contracts is empty"):
        certify(osc.Split(), contracts=[])
    exempt = certify(osc.ConstantDamping(), contracts=["damping-product"])
    assert not exempt.ok and not exempt.violations
    with pytest.raises(ContractViolation, match=r"nothing was checked\n.*damping-product: does not declare splits"):
        exempt.require()
    assert not certify([]).ok
    several = certify([osc.ConstantDamping(), osc.Split()], contracts=["damping-product"])
    assert several.ok and [rows[0].subject for rows in several.unchecked] == ["ConstantDamping"]

    class ServesNothing(Squares):
        def serves(self, layer: Any) -> tuple[str, ...]:
            return ()

    idle = certify([ServesNothing(), Squares()])
    assert not idle.ok and not idle.violations
    with pytest.raises(ContractViolation, match=r"nothing was checked\nstructure ServesNothing, .*it serves no layer"):
        idle.require()


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
        ContractViolation,
        match=r"x is 2.5 at entry \(1,\), expected 2: they differ by 0.5, 1.25 times the 0.4 allowed",
    ):
        require_close("x", other, one, tolerance=0.1)
    with pytest.raises(ContractViolation, match=r"x is not bitwise the same: it is 2.5 at entry \(1,\), expected 2.0"):
        require_equal("x", other, one)
    with pytest.raises(ContractViolation, match=r"x has shape \(2,\)"):
        require_close("x", other[:2], one)
    with pytest.raises(ContractViolation, match=r"x has shape \(3,\) and torch.float64"):
        require_equal("x", other.double(), one)
    with pytest.raises(ContractViolation, match=r"x is not finite: it is nan at entry \(0,\)"):
        require_finite("x", one * torch.nan)
    with pytest.raises(ContractViolation, match="x/a is 1, expected 2"):
        require_same_state("x", {"a": 1}, {"a": 2})
    require_same_state("x", {"a": [one, float("nan")]}, {"a": [one, float("nan")]})
    lopsided = torch.tensor([[1.0, 2.0], [2.5, 4.0]])
    with pytest.raises(
        ContractViolation,
        match=r"x is not symmetric: entry \(0, 1\) is 2, but entry \(1, 0\) is 2.5: they differ by 0.5, 1.25 times",
    ):
        require_symmetric("x", lopsided, tolerance=0.1)
    require_symmetric("x", lopsided, tolerance=0.2)
    with pytest.raises(ContractViolation, match=r"x is no square matrix, its shape is \(2,\)"):
        require_symmetric("x", lopsided[0])
    with pytest.raises(ContractViolation, match="slope is 3, but must be less than 2"):
        require(False, "slope", value=3.0, bound=2.0, relation="less than")
    with pytest.raises(
        ContractViolation, match=r"x is 2, expected 1: they differ by 1, 1e\+08 times the 1e-08 allowed"
    ):
        require_close("x", torch.tensor(2.0), torch.tensor(1.0))
    violation = ContractViolation("x", value=3.0, bound=2.0)
    assert (violation.value, violation.bound, violation.ratio) == (3.0, 2.0, 1.5)
