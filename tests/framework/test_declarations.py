"""Declarations of parts: defaults, parts that only have the verbs, and wrappers that forward."""

from __future__ import annotations

import osculate as osc
import pytest
from osculate.curvature.declarations import DampingDeclarations, StepSizeDeclarations, declared
from osculate.curvature.estimators import WithPairs
from osculate.framework.contracts.certificate import certify
from osculate.stepsize.signs import Unrestricted


@pytest.mark.parametrize("wrapper", [osc.RelativeBound, osc.KLClip])
def test_a_bound_around_a_signed_rule_is_signed(wrapper: type) -> None:
    """Else the contracts hold it to steps >= 0, which the inner rule never promised."""
    rule = wrapper(osc.JointLayerwise(sign=Unrestricted()))
    assert declared(rule, StepSizeDeclarations).signed
    certify(rule).require()


def test_pairs_beside_a_matrix_in_units_of_the_loss() -> None:
    part = WithPairs(osc.BatchMean())
    assert part.per_sample is False
    certify(part).require()


def test_parts_that_only_have_the_verbs_declare_by_attribute_or_default() -> None:
    class Bare:
        recalls = True

    found = declared(Bare(), StepSizeDeclarations)
    assert found.recalls and not found.signed
    assert not declared(osc.Split(), DampingDeclarations).adapts
    assert declared(osc.LevenbergMarquardt(), DampingDeclarations).adapts
    assert declared(osc.Scheduled(), DampingDeclarations).scheduled
