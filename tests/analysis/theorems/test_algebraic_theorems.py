"""Every theorem holds and its controls fail; known constants; a broken part of the library is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import osculate as osc
import pytest
import torch
from osculate.analysis import Setting, Theorem, verify
from osculate.analysis.theorems import (
    bfgs_bounds,
    convolution_factors,
    input_factor,
    layer_hessian,
    limited_memory,
    line_search,
    mini_blocks,
    quadratic_forms,
    secant_pairs,
    stochastic,
)
from osculate.analysis.theorems.limited_memory import limited_memory_bounds
from osculate.analysis.theorems.secant_pairs import guarantee
from osculate.preconditioners import linalg
from osculate.preconditioners.factors import bfgs
from osculate.preconditioners.pairs import damping as pairs
from torch import Tensor

FILES = (
    layer_hessian,
    secant_pairs,
    bfgs_bounds,
    limited_memory,
    input_factor,
    stochastic,
    convolution_factors,
    mini_blocks,
    quadratic_forms,
    line_search,
)
OWN: list[Theorem] = [theorem for file in FILES for theorem in file.THEOREMS]
BY_NAME = {theorem.name: theorem for theorem in OWN}


@pytest.mark.parametrize("theorem", OWN, ids=lambda theorem: theorem.name)
def test_it_holds_and_its_controls_fail(theorem: Theorem) -> None:
    verdict = verify(theorem, Setting())
    broken = [
        f"{entry.name}: {entry.measured} {entry.direction} {entry.bound}"
        for entry in (*verdict.evidence.assumptions, *verdict.evidence.inequalities)
        if not entry.holds
    ]
    assert verdict.status == "held", broken
    for control, evidence in zip(theorem.controls, verdict.controls, strict=True):
        assert evidence.refuted, f"the control passes: {control.claim}"


def test_all_of_them_are_in_the_catalogue_and_in_the_table() -> None:
    table = (Path(__file__).resolve().parents[3] / "docs" / "PAPERS.md").read_text()
    for theorem in OWN:
        assert osc.analysis.THEOREMS[theorem.name] is theorem
        assert f"| {theorem.name} |" in table


# -- known answers -----------------------------------------------------------------------------------------------------


def test_bounds_of_limited_memory_by_hand() -> None:
    assert limited_memory_bounds(1, 1.0, 1.0, 1.0) == (0.5, 2.0)
    assert limited_memory_bounds(2, 1.0, 0.5, 0.5) == (1 / 5, 16 + 2 * 5)
    assert limited_memory_bounds(1, 2.0, 0.5, 1.0) == (1 / 1.5, 2 * 2 + 2)


def test_guarantees_by_hand() -> None:
    low, high = torch.tensor([0.5, 4.0]), torch.tensor([2.0, 10.0])
    double = guarantee(osc.DoubleDamping(0.2), 0.5, low, high)
    assert torch.allclose(double.weighted, torch.tensor([5.0, 10.0]))
    assert torch.allclose(double.growth, torch.tensor([10.0, 1.25]))
    shifted = guarantee(osc.PowellThenLM(0.2), 0.5, low, high)
    assert torch.allclose(shifted.weighted, torch.tensor([6.0, 10.0]))
    with pytest.raises(osc.ArgumentError, match="one side"):
        guarantee(osc.PowellH(), 0.5, low, high)


# -- a library with a mistake ------------------------------------------------------------------------------------------


def _no_second_stage(self: Any, step: Tensor, change: Tensor, product: Tensor, damping: float) -> pairs.DampedPair:
    return osc.PowellH(self.mu1).damp(step, change, product, damping)


def _wrong_sign(inverse: Any, step: Tensor, change: Tensor, product: Tensor, accept: Tensor) -> None:
    linalg.bfgs_inverse_updates_(inverse, step, change, 1.01 * product, accept)


def _scaled(self: Any, state: Any, value: Tensor) -> Tensor:
    return _left(self, state, value) * (1 + 1e-7)


_left = osc.LBFGS.left


def _one_sided(self: Any, step: Tensor, change: Tensor, reference: Tensor) -> Tensor:
    return osc.CurvatureTest(self.tolerance).accepts(step, change, reference)


def _unsigned(self: Any, evidence: Any, signs: Tensor) -> Tensor:
    return osc.HessianRowSums().measure(evidence).diagonal() * signs


def _untouched(self: Any, state: Any, momentum: Any) -> Any:
    return momentum


@pytest.mark.parametrize(
    ("name", "target", "attribute", "mistake"),
    [
        ("T2", osc.DoubleDamping, "damp", _no_second_stage),
        ("T3", bfgs, "bfgs_inverse_updates_", _wrong_sign),
        ("T4", osc.TwoSidedCurvatureTest, "accepts", _one_sided),
        ("T5", osc.LBFGS, "left", _scaled),
        ("T6", bfgs, "bfgs_inverse_updates_", _wrong_sign),
        ("T9", osc.MiniBlock, "precondition", _untouched),
        ("T15", osc.SignedHessian, "signed", _unsigned),
    ],
)
def test_a_mistake_in_the_library_is_found(
    name: str, target: Any, attribute: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BY_NAME[name].check(Setting(1)).status == "held"
    monkeypatch.setattr(target, attribute, mistake)
    assert BY_NAME[name].check(Setting(1)).status == "violated"
