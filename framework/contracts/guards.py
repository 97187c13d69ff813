"""Contracts of guards."""

from __future__ import annotations

import math
from typing import Any

from ...stepsize.guard import Trial
from .cases import Case
from .contract import NotApplicable, contract, contracts_of, require, require_same_state
from .workbench import saved_copy

__all__ = ["CONTRACTS"]


_VERBS = ("attempts", "shrink", "needs", "init", "accepts", "record")


@contract("guard-numbers", "guard", "attempts is an integer >= 0, and a step that is tried again is shorter")
def guard_numbers(rule: Any, case: Case) -> None:
    """0 < shrink < 1 where there are attempts; and all verbs of a guard are there."""
    missing = [name for name in _VERBS if not hasattr(rule, name)]
    require(not missing, f"it lacks {', '.join(missing)}; a guard has {', '.join(_VERBS)}")
    attempts = rule.attempts
    require(isinstance(attempts, int) and attempts >= 0, f"attempts is {attempts!r}")
    require(attempts == 0 or 0.0 < rule.shrink < 1.0, f"shrink is {rule.shrink!r}, but must be in (0, 1)")


def _passive(rule: Any) -> str | None:
    return None if rule.attempts else "attempts = 0: every step stays"


def _accepts(rule: Any, before: float, after: float) -> bool:
    """The verdict of a guard that has seen nothing yet on a whole step that promised a decrease of 0.5."""
    return bool(rule.accepts(rule.init(), Trial(before, after, slope=-0.5)))


@contract("guard-nonfinite", "guard", "a loss that is not finite is refused", unless=_passive)
def guard_nonfinite(rule: Any, case: Case) -> None:
    """Infinity and NaN."""
    for after in (math.inf, math.nan):
        require(not _accepts(rule, 1.0, after), f"a loss of {after} after the step was accepted")


@contract("guard-descent", "guard", "a step that lowers the loss enough stays")
def guard_descent(rule: Any, case: Case) -> None:
    """From 1 to 0.01, and from -1 to -2."""
    for before, after in ((1.0, 0.01), (-1.0, -2.0)):
        require(_accepts(rule, before, after), f"a step from loss {before:g} to {after:g} was refused")


@contract("guard-monotone", "guard", "if a loss is accepted, so is every lower one")
def guard_monotone(rule: Any, case: Case) -> None:
    """On a grid around the loss before the step."""
    accepted = [_accepts(rule, 1.0, 0.05 * index) for index in range(80)]
    require(accepted == sorted(accepted, reverse=True), "a higher loss was accepted where a lower one was refused")


def _seen_by(rule: Any) -> Any:
    """State of a guard after a few steps that it took."""
    state = rule.init()
    for index in range(4):
        trial = Trial(1.0 - 0.1 * index, 0.9 - 0.1 * index, slope=-0.2)
        if rule.accepts(state, trial):
            rule.record(state, trial)
    return state


def _verdicts(rule: Any, state: Any) -> list[bool]:
    """Of losses around the present one."""
    return [bool(rule.accepts(state, Trial(0.6, 0.02 * index, slope=-0.1))) for index in range(60)]


@contract("guard-purity", "guard", "asking for a verdict changes neither the verdict nor the state")
def guard_purity(rule: Any, case: Case) -> None:
    """After a few steps that stayed."""
    state = _seen_by(rule)
    kept = None if state is None else dict(state.to_dict())
    first = _verdicts(rule, state)
    require(_verdicts(rule, state) == first, "the same losses were judged otherwise when they were asked again")
    if kept is not None:
        require_same_state("the state after asking for verdicts", state.to_dict(), kept)


@contract("guard-save-load-continue", "guard", "a saved and loaded state judges as the one that was saved")
def guard_save_load(rule: Any, case: Case) -> None:
    """Through a file, loaded with ``weights_only=True``; then it takes one step more."""
    state, resumed = _seen_by(rule), rule.init()
    if state is None:
        raise NotApplicable("it keeps no state")
    resumed.load_dict(saved_copy(state.to_dict()))
    for later in (None, Trial(0.6, 0.5, slope=-0.1)):
        if later is not None:
            rule.record(state, later)
            rule.record(resumed, later)
        require(_verdicts(rule, resumed) == _verdicts(rule, state), "losses are judged otherwise after loading")
        require_same_state("the loaded state", resumed.to_dict(), state.to_dict())


CONTRACTS = contracts_of(globals())
