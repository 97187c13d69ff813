"""Exceptions: one base class, so that callers can catch everything osculate raises on purpose.

Every message says what is wrong, the value, the rule, and the way out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

__all__ = [
    "OTHER_WORDS",
    "ArgumentError",
    "ClosureRequiredError",
    "CompatibilityError",
    "FallbackWarning",
    "LossWarning",
    "NumericalError",
    "OsculateError",
    "ProcessError",
    "UnknownNameError",
    "near_misses",
    "require_finite_nonnegative",
    "require_interval",
    "require_positive_integer",
]

_LETTERS_OF_A_BEGINNING = 3
"""Fewer letters begin too many names."""


OTHER_WORDS = {
    **dict.fromkeys(("learning_rate", "step_size"), ("lr",)),
    **dict.fromkeys(("wd", "l2"), ("weight_decay",)),
    **dict.fromkeys(("tikhonov", "regularization", "regularisation"), ("damping",)),
    **dict.fromkeys(("reduction",), ("loss_reduction",)),
    **dict.fromkeys(("update_freq", "precondition_frequency", "inv_update_steps"), ("inverses_every",)),
    **dict.fromkeys(("factor_update_steps", "cov_update_freq"), ("statistics_every",)),
}
"""What other libraries call a setting, and what it is called here, in both of them with underscores."""


class OsculateError(Exception):
    """Base class of all errors raised on purpose by osculate."""


class ArgumentError(OsculateError, ValueError):
    """An argument is outside its valid range."""


class UnknownNameError(ArgumentError):
    """A name is not in a table; the message lists the near misses, or else all names.

    Args:
        kind: of thing.
        name: that is not known.
        known: all names.
        see_also: where all are explained, without a full stop.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], see_also: str = ""):
        names = sorted(known)
        near = near_misses(str(name), names)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names)}"
        if see_also:
            hint += f"{'' if near else '.'} {see_also}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


def _joined(name: str) -> str:
    return name.lower().replace("-", "_")


def near_misses(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """What other libraries call ``name`` otherwise, or known names like it.

    Those are up to three that are spelled much like it, the nearest first, and those that begin with it.

    Args:
        name: as somebody typed it.
        known: what it may have been meant for.
        cutoff: in (0, 1]; 1 takes equal names only.
    """
    lower = {entry.lower(): entry for entry in known}
    meant = [entry for entry in lower.values() if entry.replace("-", "_") in OTHER_WORDS.get(_joined(name), ())]
    if meant:
        return meant
    near = difflib.get_close_matches(name.lower(), sorted(lower), n=3, cutoff=cutoff)
    if cutoff < 1 and len(name) >= _LETTERS_OF_A_BEGINNING:
        near += [entry for entry in sorted(lower) if entry.startswith(name.lower()) and entry not in near]
    return [lower[entry] for entry in near]


class CompatibilityError(ArgumentError):
    """Two parts do not fit together; found when the method is composed, before any step."""


class ClosureRequiredError(OsculateError, TypeError):
    """A method that evaluates the loss itself was stepped without a closure."""


class NumericalError(OsculateError, ArithmeticError):
    """A computation broke down (non-finite loss, matrix that is not positive definite); nothing was written."""


class ProcessError(OsculateError, RuntimeError):
    """Another process of a run has died, hangs, or has refused the step; the message names it."""


class LossWarning(UserWarning):
    """What was assumed of the loss, because its gradient does not tell."""


class FallbackWarning(UserWarning):
    """Much of a model is served by a method's fallback, or a layer is because its forward is not the one it seems."""


def require_interval(name: str, value: float, low: float, high: float, *, closed: str = "[)") -> None:
    """Check that ``value`` lies between ``low`` and ``high``; ``closed`` is one of ``[] [) (] ()``.

    Raises:
        ArgumentError: if it does not, or if it is not a number.
    """
    inside = isinstance(value, int | float)
    if inside:
        inside_low = value >= low if closed[0] == "[" else value > low
        inside_high = value <= high if closed[1] == "]" else value < high
        inside = inside_low and inside_high
    if not inside:
        raise ArgumentError(f"{name} must lie in {closed[0]}{low:g}, {high:g}{closed[1]}, got {value!r}")


def require_finite_nonnegative(name: str, value: float) -> None:
    """Check that ``value`` is a finite number >= 0.

    Raises:
        ArgumentError: if it is not.
    """
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{name} must be a finite number >= 0, got {value!r}")


def require_positive_integer(name: str, value: int) -> None:
    """Check that ``value`` is an integer >= 1.

    Raises:
        ArgumentError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name} must be an integer >= 1, got {value!r}")
