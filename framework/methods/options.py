"""Options of a registered method: what its parts refuse is said of the option that brought it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from ...checking import require_kind
from ...errors import ArgumentError, CompatibilityError

__all__ = ["composed"]

Composition = TypeVar("Composition")


def composed(name: str, factory: Callable[..., Composition], options: Mapping[str, Any]) -> Composition:
    """What a factory makes of its options.

    Args:
        name: of the method.
        factory: function whose keywords are the options.
        options: some of them, by name.

    Raises:
        ArgumentError: if a part refuses a value; the message begins with the option that it came by, where one option
            alone is to blame, and says what the option must be rather than the field of the part.
    """
    try:
        return factory(**options)
    except (ArgumentError, CompatibilityError) as error:
        if type(error) not in (ArgumentError, CompatibilityError):
            raise
        culprit = next((option for option in options if _fits(factory, options, option)), None)
        if culprit is None or culprit in str(error):
            raise
        _require_annotated(name, factory, culprit, options[culprit])
        raise type(error)(f"{culprit}={options[culprit]!r} of {name}: {error}") from None


def _fits(factory: Callable[..., Any], options: Mapping[str, Any], left_out: str) -> bool:
    """Whether all is well without one of the options."""
    try:
        factory(**{option: value for option, value in options.items() if option != left_out})
    except ArgumentError:
        return False
    return True


def _require_annotated(name: str, factory: Callable[..., Any], option: str, value: Any) -> None:
    """Check a value against the annotation of its option.

    Raises:
        ArgumentError: if it does not fit.
    """
    try:
        hint = get_type_hints(factory).get(option, Any)
    except (NameError, TypeError, AttributeError):
        return
    default = inspect.signature(factory).parameters[option].default
    require_kind(f"{option} of {name}", value, hint, f"the default is {default!r}")
