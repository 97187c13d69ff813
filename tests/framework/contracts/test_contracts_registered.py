"""Every registered part and method holds every contract that applies to it; a new one is tested once registered."""

from collections.abc import Callable
from typing import Any

import osculate as osc
import pytest
from osculate.framework.contracts import CONTRACTS, KINDS, Subject, certify, registered_subjects

SUBJECTS = registered_subjects()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: f"{subject.kind}: {subject.name}")
def test_it_holds_its_contracts(subject: Subject, record_property: Callable[[str, Any], None]) -> None:
    certificate = certify(subject)
    certificate.require()
    assert certificate.counts()["held"] > 0
    record_property("count: parts and methods certified", 1)
    for status, number in certificate.counts().items():
        record_property(f"count: contracts {status}", number)


def test_every_contract_is_held_by_some_registered_part() -> None:
    """A contract from which everybody is exempt says nothing."""
    kinds = {subject.kind for subject in SUBJECTS}
    assert kinds == set(KINDS) == {*osc.registry.parts(), "likelihood", "method"}
    for contract in CONTRACTS:
        parts = [subject.part for subject in SUBJECTS if subject.kind in contract.kinds and subject.kind != "factor"]
        assert any(contract.excuse(part) is None for part in parts), contract.name


def test_contracts_are_named_once_and_say_what_they_claim() -> None:
    names = [contract.name for contract in CONTRACTS]
    assert len(names) == len(set(names))
    assert all(
        contract.claim and contract.check.__doc__ and set(contract.kinds) <= set(KINDS) for contract in CONTRACTS
    )
