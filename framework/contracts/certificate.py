"""Certifying: every contract of a part's kind, on every small network, as a table of what held and what did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import ArgumentError, near_misses
from . import (
    dampings,
    estimators,
    guards,
    invariances,
    likelihoods,
    matrices,
    methods,
    pairs,
    partitions,
    rules,
    signs,
    steps,
    structures,
)
from .cases import CASES, Case
from .contract import Contract, ContractViolation, NotApplicable
from .subjects import Subject, subjects_of, views

__all__ = ["CONTRACTS", "Certificate", "Row", "certify", "contracts_for"]

Status = Literal["held", "violated", "not applicable"]


CONTRACTS: tuple[Contract, ...] = (
    *structures.CONTRACTS,
    *invariances.CONTRACTS,
    *partitions.CONTRACTS,
    *matrices.CONTRACTS,
    *pairs.CONTRACTS,
    *dampings.CONTRACTS,
    *rules.CONTRACTS,
    *guards.CONTRACTS,
    *estimators.CONTRACTS,
    *steps.CONTRACTS,
    *signs.CONTRACTS,
    *likelihoods.CONTRACTS,
    *methods.CONTRACTS,
)
"""Every contract that ships, kind by kind."""


@dataclass(frozen=True)
class Row:
    """One contract on one subject.

    Attributes:
        subject: name of the part or method.
        kind: its kind.
        contract: name of the contract.
        status: ``"held"``, ``"violated"`` or ``"not applicable"``.
        detail: what was violated and where, or the declaration that exempts the part; empty if it held.
    """

    subject: str
    kind: str
    contract: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Certificate:
    """What :func:`certify` found.

    Attributes:
        rows: one per subject and contract.
    """

    rows: tuple[Row, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing was violated, something was checked, and no subject got past its whole suite unchecked."""
        checked = len(self.unchecked) < len({(row.kind, row.subject) for row in self.rows})
        whole = [rows for rows in self.unchecked if len(rows) == len(contracts_for(rows[0].kind))]
        return checked and not whole and not self.violations

    @property
    def unchecked(self) -> tuple[tuple[Row, ...], ...]:
        """The rows of every subject about which no contract had anything to say."""
        grouped: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            grouped.setdefault((row.kind, row.subject), []).append(row)
        return tuple(tuple(rows) for rows in grouped.values() if all(row.status == "not applicable" for row in rows))

    @property
    def violations(self) -> tuple[Row, ...]:
        """Rows of broken contracts."""
        return tuple(row for row in self.rows if row.status == "violated")

    def counts(self) -> dict[str, int]:
        """How many rows held, were violated, and were not applicable."""
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in ("held", "violated", "not applicable")}

    def summary(self) -> str:
        """One line."""
        subjects = len({(row.kind, row.subject) for row in self.rows})
        counts = self.counts()
        return (
            f"{_counted(subjects, 'subject')}, {_counted(len(self.rows), 'contract')}: {counts['held']} held, "
            f"{counts['violated']} violated, {counts['not applicable']} not applicable"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"ok": self.ok, "counts": self.counts(), "rows": [vars(row) for row in self.rows]}

    def require(self) -> None:
        """Raise if a contract is violated, or nothing was checked.

        Raises:
            ContractViolation: listing every violation; or every subject that no contract has checked, with the reason.
        """
        if self.ok:
            return
        lines = [f"{row.kind} {row.subject}, {row.contract}: {row.detail}" for row in self.violations]
        if lines:
            raise ContractViolation("\n".join([f"{_counted(len(lines), 'contract')} violated", *lines]))
        raise ContractViolation("\n".join(["nothing was checked", *self.silences()]))

    def silences(self) -> list[str]:
        """One line per subject that no contract has checked, with the reason that the first of them gives."""
        return [f"{rows[0].kind} {rows[0].subject}, {rows[0].contract}: {rows[0].detail}" for rows in self.unchecked]


def contracts_for(kind: str) -> tuple[Contract, ...]:
    """All contracts of a kind of part."""
    return tuple(contract for contract in CONTRACTS if kind in contract.kinds)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def certify(
    target: Any,
    *,
    name: str | None = None,
    contracts: Iterable[str] | None = None,
    cases: Sequence[Case] = CASES,
    device: str = "cpu",
    progress: Callable[[Subject, int, int], None] = lambda subject, done, total: None,
) -> Certificate:
    """Check everything a part promises.

    Args:
        target: a part, a ``Method``, a class or factory that needs no arguments, a module, or a collection of these;
            the package ``osculate`` stands for everything registered.
        name: as shown; default: from the object.
        contracts: names; default: all that apply to the kind.
        cases: small networks with data; default: the shipped ones.
        device: where the cases live.
        progress: called with (subject, index, total) before each subject.

    Returns:
        A table; nothing is raised for a broken contract, see :meth:`Certificate.require`.

    Raises:
        ArgumentError: if the target is no part, or a contract is unknown or about none of the kinds of the target.

    Example:
        >>> import osculate as osc
        >>> osc.contracts.certify(osc.DoubleDamping()).ok
        True
    """
    subjects = subjects_of(target, name)
    chosen = _chosen(contracts, {subject.kind for subject in subjects})
    placed = [case.to(device=device) for case in cases]
    rows: list[Row] = []
    for index, subject in enumerate(subjects):
        progress(subject, index, len(subjects))
        rows.extend(_rows(subject, chosen, placed))
    return Certificate(tuple(rows))


def _chosen(names: Iterable[str] | None, kinds: set[str]) -> tuple[Contract, ...]:
    if names is None:
        return CONTRACTS
    wanted = set(names)
    unknown = wanted - {contract.name for contract in CONTRACTS}
    if unknown:
        near = [entry for name in sorted(unknown) for entry in near_misses(name, [one.name for one in CONTRACTS])]
        applying = dict.fromkeys(entry.name for kind in sorted(kinds) for entry in contracts_for(kind))
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"about this: {', '.join(applying)}"
        raise ArgumentError(f"unknown contracts {sorted(unknown)}; {hint}")
    chosen = tuple(contract for contract in CONTRACTS if contract.name in wanted)
    for contract in chosen:
        if not kinds.intersection(contract.kinds):
            own = ", ".join(entry.name for kind in sorted(kinds) for entry in contracts_for(kind))
            raise ArgumentError(
                f"contract {contract.name!r} is about a {' or a '.join(contract.kinds)}, and this is a "
                f"{' and a '.join(sorted(kinds))}; contracts about that: {own}"
            )
    if not chosen:
        raise ArgumentError("contracts is empty: name at least one, or leave it out for all")
    return chosen


def _rows(subject: Subject, contracts: Sequence[Contract], cases: Sequence[Case]) -> Iterator[Row]:
    for contract in contracts:
        if subject.kind in contract.kinds:
            status, detail = _verdict(contract, subject, cases)
            yield Row(subject.name, subject.kind, contract.name, status, detail)


def _verdict(contract: Contract, subject: Subject, cases: Sequence[Case]) -> tuple[Status, str]:
    """Held if at least one case had something to say and none was violated."""
    held, reasons = False, [""]
    for part in views(subject):
        try:
            reason = contract.excuse(part)
        except Exception as error:  # e.g. a declaration that is missing
            return "violated", f"raised {type(error).__name__}: {error}"
        if reason is not None:
            reasons.append(reason)
            continue
        for case in cases:
            try:
                contract.check(part, case)
            except NotApplicable as silent:
                reasons.append(str(silent))
            except ContractViolation as violation:
                return "violated", f"on {case.name!r}: {violation}"
            except Exception as error:  # whatever a part raises is the finding
                return "violated", f"on {case.name!r}: raised {type(error).__name__}: {error}"
            else:
                held = True
    return ("held", "") if held else ("not applicable", reasons[-1])
