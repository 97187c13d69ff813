"""Declarations of parts: defaults, parts that only have the verbs, and wrappers that forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import osculate as osc
import pytest
import torch
from measuring import close
from osculate.curvature import Needs
from osculate.curvature.declarations import (
    AverageDeclarations,
    CouplingDeclarations,
    DampingDeclarations,
    Declarations,
    EstimatorDeclarations,
    FactorDeclarations,
    FormDeclarations,
    MomentumDeclarations,
    PairDampingDeclarations,
    SignDeclarations,
    StepSizeDeclarations,
    StructureDeclarations,
    declared,
)
from osculate.curvature.estimators import WithPairs
from osculate.framework.contracts.certificate import certify
from osculate.framework.methods.parts import KINDS
from osculate.preconditioners import Factor, NoState, ScalingLaw, Schedule
from osculate.preconditioners.structures.reference import DenseReference
from osculate.stepsize.signs import Unrestricted
from torch import Tensor, nn

BASES: dict[str, type[Declarations]] = {
    "curvature": EstimatorDeclarations,
    "quadratic form": FormDeclarations,
    "structure": StructureDeclarations,
    "factor": FactorDeclarations,
    "damping": DampingDeclarations,
    "pair damping": PairDampingDeclarations,
    "average": AverageDeclarations,
    "momentum": MomentumDeclarations,
    "step size": StepSizeDeclarations,
    "coupling": CouplingDeclarations,
    "sign": SignDeclarations,
}
"""Kinds of part that may declare something."""


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


@pytest.mark.parametrize("kind", BASES)
def test_every_part_inherits_the_base_of_its_kind(kind: str) -> None:
    """ByLayer is a table of structures and declares nothing of its own."""
    missing = [cls.__name__ for cls in KINDS[kind].values() if not issubclass(cls, BASES[kind])]
    assert missing == (["ByLayer"] if kind == "structure" else [])


def test_what_follows_from_the_verbs_is_asked_of_the_part_itself() -> None:
    class Refines:
        def refine(self, state: Any, observation: Any) -> None:
            """Measures."""

    class Steps:
        def at(self, value: float, step: int) -> float:
            return value

        def sides(self, value: float, positions: int) -> None:
            """Splits."""

    assert declared(Refines(), StructureDeclarations).refines
    found = declared(Steps(), DampingDeclarations)
    assert found.scheduled and not found.adapts


def test_a_field_may_have_the_name_of_a_declaration() -> None:
    """Its default is the dataclass's own business: the declaration's would make an optional field of it."""

    @dataclass(frozen=True)
    class Own(FactorDeclarations):
        pairs: str
        linear: bool
        size: int = 3

    part = Own("rule", False)
    assert (part.pairs, part.linear, part.definite) == ("rule", False, True)
    with pytest.raises(TypeError, match="pairs"):
        Own()  # type: ignore[call-arg]


def test_derived_declarations_do_not_outlive_a_copy_with_other_fields() -> None:
    part = osc.Kronecker(osc.Covariance(), osc.Covariance())
    assert part.scaling == ScalingLaw(2.0, outputs=2.0) and part.pairs is None

    other = replace(part, outputs=osc.BFGS())
    assert other.scaling is None and other.pairs == osc.DoubleDamping()
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert copied == other and copied.scaling is None and copied.linear


def test_a_reference_declares_what_its_structure_does_but_for_its_own_state() -> None:
    reference = DenseReference(osc.Dense(osc.Absolute()))
    assert reference.takes_indefinite and reference.scaling == ScalingLaw(2.0, whole=2.0)
    assert reference.numbers is None and reference.bounds is None


class Halves:
    """A structure that only has the verbs, with one of them for many blocks; it counts how it was asked."""

    needs = Needs.NOTHING
    schedule = Schedule()
    joint = False
    linear = False

    def __init__(self) -> None:
        self.asked: list[str] = []

    def serves(self, layer: Any) -> tuple[str, ...]:
        return tuple(layer.parameters)

    def init(self, layer: Any, parameters: Any) -> NoState:
        return NoState()

    def update(self, state: Any, observation: Any, average: Any = None) -> None:
        self.asked.append("update")

    def matrices(self, state: Any, damping: Any) -> tuple[()]:
        return ()

    def install(self, state: Any, results: Any) -> None:
        """Nothing."""

    def precondition(self, state: Any, momentum: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.asked.append("one")
        return self.precondition_many([state], [momentum])[0]

    def precondition_many(self, states: Sequence[Any], momenta: Sequence[tuple[Tensor, ...]]) -> list[Any]:
        self.asked.append("many")
        return [tuple(0.5 * value for value in momentum) for momentum in momenta]

    def observe_step(self, state: Any, before: Any, after: Any, damping: Any) -> dict[str, Tensor]:
        return {}

    def to_dense(self, state: Any, layer: Any, damping: Any) -> Tensor:
        raise NotImplementedError


class Quarters(Halves):
    """Replaces the verb for one block, and goes on from the inherited one."""

    def precondition(self, state: Any, momentum: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(0.5 * value for value in super().precondition(state, momentum))


class InheritedQuarters(osc.Diagonal):
    """The same on a part of this library."""

    def precondition(self, state: Any, momentum: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(0.25 * value for value in super().precondition(state, momentum))


def _moved(part: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = osc.build(osc.Method(part, momentum=osc.NoMomentum()), model, lr=1.0)
    model(torch.ones(5, 3, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    return [new.detach() - old for new, old in zip(model.parameters(), before, strict=True)]


def test_verbs_for_many_blocks_hold_unless_the_verb_for_one_was_replaced() -> None:
    plain, halves, quarters = _moved(osc.Identity()), Halves(), Quarters()
    for moved, whole in zip(_moved(halves), plain, strict=True):
        close(moved, 0.5 * whole, 1e-14)
    assert halves.asked == ["update", "update", "many"]
    for moved, whole in zip(_moved(quarters), plain, strict=True):
        close(moved, 0.25 * whole, 1e-14)
    assert quarters.asked == ["update", "update", "one", "many", "one", "many"]
    for moved, whole in zip(_moved(InheritedQuarters()), _moved(osc.Diagonal()), strict=True):
        close(moved, 0.25 * whole, 1e-14)


def test_a_factor_that_only_has_the_verbs_is_taken_in_once() -> None:
    class Proxy:
        def __init__(self, factor: Factor) -> None:
            self._factor = factor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._factor, name)

        def observe_step(self, *arguments: Any) -> Any:
            return self._factor.observe_step(*arguments)

    part = osc.Kronecker(Proxy(osc.HessianActionBFGS()), Proxy(osc.BFGS()))  # type: ignore[arg-type]
    own = osc.Kronecker(osc.HessianActionBFGS(), osc.BFGS())
    assert part.factors[0] is part.factors[0] and own.factors == (own.inputs, own.outputs)
    assert part.pairs == own.pairs and part.without_eigenvalues() == ("Proxy",) and part.scaling is None
    assert own.factors[1].together == {"observe_many"} and not part.factors[1].together
