"""Mistakes of a first afternoon are refused where they are made."""

from dataclasses import dataclass

import osculate as osc
import pytest
import torch
from osculate.experiments.runs.config import parse_options
from torch import nn


@pytest.mark.parametrize("field", ["damping", "step_size", "momentum", "guard", "curvature", "preconditioner"])
def test_a_number_in_the_place_of_a_part_is_named(field):
    with pytest.raises(osc.ArgumentError, match=f"{field} of Method must be a part"):
        osc.Method(**{field: 0.1})


def test_a_class_without_parentheses_is_named():
    with pytest.raises(osc.ArgumentError, match="parentheses"):
        osc.Method(preconditioner=osc.Identity)


def test_unknown_defaults_are_named():
    with pytest.raises(osc.ArgumentError, match="dampling"):
        osc.Method(defaults={"lr": 1.0, "dampling": 0.1})


def test_parameters_instead_of_the_model_are_named():
    with pytest.raises(osc.ArgumentError, match="pass the model itself"):
        osc.build("sgdm", nn.Linear(2, 2).parameters())


def test_a_structure_instead_of_a_method_is_named():
    with pytest.raises(osc.ArgumentError, match="Method"):
        osc.build(osc.Identity(), nn.Linear(2, 2))


def test_a_misspelt_layer_kind_is_named_with_the_near_miss():
    method = osc.Method(osc.ByLayer({"linear": osc.Identity()}))
    with pytest.raises(osc.UnknownNameError, match="Linear"):
        osc.build(method, nn.Sequential(nn.Linear(2, 2)))


@dataclass(frozen=True)
class Proposes(osc.ConstantStep):
    value: object = None

    def propose(self, state, evidence):
        return self.value


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(float("nan"), osc.NumericalError, "not finite"), (torch.ones(3), osc.ArgumentError, "one per layer")],
)
def test_step_sizes_that_make_no_sense_write_nothing(value, error, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = osc.build(osc.Method(step_size=Proposes(value)), model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.ones(4, 2)).sum().backward()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_guard_can_be_switched_off_from_the_command_line():
    assert osc.registry.method("kbfgs", **parse_options(["growth=inf"])).guard == osc.NoGuard()
