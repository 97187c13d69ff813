"""What ``osculate verify`` found, as plain values, a table of inequalities, and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ...analysis.theorem import Evidence, Inequality, Verdict

__all__ = ["counts", "inequality_rows", "passed", "verdict_values"]

_MEASURED = ("name", "measured", "direction", "bound", "margin", "tolerance", "instances", "holds")


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether nothing is violated and every control fails, as it must."""
    return all(verdict.status != "violated" and verdict.control_fails for verdict in verdicts)


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many theorems held, were violated, did not apply; how many have a control that passes."""
    found = {status: sum(v.status == status for v in verdicts) for status in ("held", "violated", "assumption not met")}
    return found | {"controls that pass": sum(not verdict.control_fails for verdict in verdicts)}


def inequality_rows(verdict: Verdict) -> Iterator[dict[str, Any]]:
    """One row per inequality of the check and of its controls.

    ``role`` is ``claim``, ``assumption`` or ``control N``; ``status`` that of the theorem, for a control ``fails`` (as
    it must) or ``passes``.
    """
    name, status = verdict.theorem.name, verdict.status
    for role, entries in (("claim", verdict.evidence.inequalities), ("assumption", verdict.evidence.assumptions)):
        for entry in entries:
            yield {"theorem": name, "role": role, "status": status} | _inequality(entry)
    for index, control in enumerate(verdict.controls, 1):
        outcome = "fails" if control.refuted else "passes"
        for entry in control.inequalities:
            yield {"theorem": name, "role": f"control {index}", "status": outcome} | _inequality(entry)


def _inequality(entry: Inequality) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in _MEASURED}


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {
        "status": evidence.status,
        "inequalities": [_inequality(entry) for entry in evidence.inequalities],
        "assumptions": [_inequality(entry) for entry in evidence.assumptions],
        "constants": dict(evidence.constants),
        "plots": [asdict(plot) for plot in evidence.plots],
    }


def verdict_values(verdict: Verdict) -> dict[str, Any]:
    """Everything about one theorem, ready for JSON."""
    theorem = verdict.theorem
    controls = zip(theorem.controls, verdict.controls, strict=True)
    return {
        "name": theorem.name,
        "claim": theorem.claim,
        "equation": theorem.equation,
        "source": theorem.source,
        "status": verdict.status,
        "control_fails": verdict.control_fails,
        "seconds": verdict.seconds,
        "closest": _inequality(verdict.evidence.closest),
        "evidence": _evidence(verdict.evidence),
        "controls": [
            {"claim": control.claim, "fails": evidence.refuted} | _evidence(evidence) for control, evidence in controls
        ],
    }
