"""Every legal composition trains and equals its own dense reference; every illegal one is refused with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import combinations

import osculate as osc
import pytest
import torch
from osculate.framework.methods.compositions import CROSSED, DEALT, Composition
from small_nets import METHODS, NETS, batches, flat, make, train
from torch import nn

LEGAL = osc.registry.compatible_methods()
REFUSED = osc.registry.refused_compositions()
EXAMPLES = osc.registry.examples()
Record = Callable[[str, object], None]


def by_structure(entries: list[Composition]) -> dict[str, list[Composition]]:
    """Compositions by the label of their structure."""
    return {
        label: [entry for entry in entries if entry.labels["preconditioner"] == label]
        for label in dict.fromkeys(entry.labels["preconditioner"] for entry in entries)
    }


def trained(method: osc.Method, net: str = "mlp", steps: int = 4) -> torch.Tensor:
    """Parameters after some steps on a small net, float64."""
    torch.manual_seed(0)  # dropout
    model = make(net)
    optimizer = osc.build(method, model, likelihood="categorical")
    train(optimizer, model, batches(net, count=steps))
    return flat(model)


@pytest.mark.parametrize("structure", by_structure(LEGAL))
def test_every_legal_composition_equals_its_dense_reference(structure: str, record_property: Record) -> None:
    entries, failures = by_structure(LEGAL)[structure], []
    start = flat(make())
    for entry in entries:
        assert entry.method is not None
        actual, expected = trained(entry.method), trained(entry.method.reference())
        error = float((actual - expected).abs().max() / (expected - start).abs().max())
        moved = float((actual - start).abs().max())
        if not (error < 1e-7 and moved > 0 and bool(torch.isfinite(actual).all())):
            failures.append(f"{entry}: relative error of the displacement {error:.1e}, moved by {moved:.1e}")
    assert not failures, "\n".join(failures)
    record_property("count: compositions enumerated", len(entries))
    record_property("count: compositions trained and equal to their dense reference", len(entries))


@pytest.mark.parametrize("structure", by_structure(REFUSED))
def test_every_other_composition_is_refused_with_the_reason(structure: str, record_property: Record) -> None:
    entries = by_structure(REFUSED)[structure]
    for entry in entries:
        parts = {field: EXAMPLES[CROSSED[field]][label] for field, label in entry.labels.items()}
        with pytest.raises(osc.ArgumentError) as caught:
            osc.Method(**parts, defaults={"lr": 0.02, "damping": 0.3})
        message = str(caught.value)
        assert message == entry.refusal
        named = [type(parts[field]).__name__ in message for field in ("preconditioner", "curvature", "damping")]
        assert any(named), message
    record_property("count: compositions enumerated", len(entries))
    record_property("count: compositions refused at construction", len(entries))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_equals_its_dense_reference_on_every_net(name: str, net: str) -> None:
    method = osc.registry.method(name)
    if osc.Needs.PAIRS in method.needs and any(isinstance(module, nn.BatchNorm2d) for module in make(net).modules()):
        # The mean gradient in front of a BatchNorm is zero but for rounding, and so is the y of its secant pairs:
        # which of two equal inequalities damps such a pair is chance.
        return
    actual, expected, start = trained(method, net, 3), trained(method.reference(), net, 3), flat(make(net))
    error = float((actual - expected).abs().max() / (expected - start).abs().max())
    assert error < 1e-6, error  # AdaGrad divides such zeros by 1e-10


def test_there_are_hundreds() -> None:
    assert len(LEGAL) >= 100 and len(REFUSED) >= 100, (len(LEGAL), len(REFUSED))


def test_compositions_differ() -> None:
    labels = [str(entry) for entry in LEGAL]
    assert len(set(labels)) == len(labels)


def test_every_part_occurs_and_dealt_parts_meet_the_crossed_ones() -> None:
    fields = CROSSED | DEALT
    for field, kind in fields.items():
        assert {entry.labels[field] for entry in LEGAL} == set(EXAMPLES[kind]), field
    met = {
        frozenset({(one, entry.labels[one]), (other, entry.labels[other])})
        for entry in LEGAL
        for one, other in combinations(fields, 2)
    }
    missing = [
        (first, second)
        for one, other in combinations(fields, 2)
        if one in DEALT and other in DEALT
        for first in EXAMPLES[fields[one]]
        for second in EXAMPLES[fields[other]]
        if frozenset({(one, first), (other, second)}) not in met
    ]
    assert not missing, missing


def test_the_reference_is_not_the_method_itself() -> None:
    method = osc.registry.method("kfac")
    assert method.reference() != method
    part = method.reference().preconditioner
    assert dataclasses.is_dataclass(part) and type(part).__name__ == "DenseReference"


def test_a_wrong_product_is_seen() -> None:
    """The comparison can fail: a structure whose fast product differs from its dense matrix does not pass."""

    class Crooked(osc.Kronecker):
        def precondition(self, state: object, momentum: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            (result,) = super().precondition(state, momentum)
            return (result * (1 + 1e-5),)

    crooked = osc.Method(
        Crooked(osc.Covariance(), osc.Covariance()), osc.EmpiricalFisher(), defaults={"lr": 0.02, "damping": 0.3}
    )
    assert float((trained(crooked) - trained(crooked.reference())).abs().max()) > 1e-9
