"""What a part is given is checked where it is given: every field of a dataclass against its own annotation.

One mechanism for all parts. A number must be a number (not a truth value), a name one of the names of its
``Literal``, a part an object with every member of the protocol that annotates the field, each taking the arguments that
the protocol gives it. Ranges are the part's own business (:mod:`.errors`). Parts inside parts are checked too, so that
a part without checks of its own is covered as soon as it enters a :class:`Method`.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from .errors import ArgumentError

__all__ = ["fits_protocol", "require_fields", "require_kind"]


def require_fields(part: Any) -> None:
    """Check every field of a dataclass, and of the dataclasses in its fields, against the annotations.

    Raises:
        ArgumentError: naming the field, what it was given, what it must be, and what would do.
    """
    for owner, path, entry in _entries(part, type(part).__name__):
        cls: Any = type(owner)
        hint = _hints(cls).get(entry.name)
        if hint is None:
            continue
        value = getattr(owner, entry.name)
        trouble = _trouble(value, hint)
        if trouble is not None:
            raise ArgumentError(
                f"{entry.name} of {path} must be {trouble}, got {_shown(value)}{_way_out(entry, value)}"
            )


def require_kind(name: str, value: Any, kind: Any, way_out: str) -> None:
    """Check one value against an annotation: a protocol, a class, ``float``, ``int | None``, ``Literal[...]``, ...

    Args:
        name: what it is called.
        value: what was given.
        kind: the annotation.
        way_out: end of the message.

    Raises:
        ArgumentError: if it does not fit.
    """
    trouble = _trouble(value, kind)
    if trouble is not None:
        raise ArgumentError(f"{name} must be {trouble}, got {_shown(value)}; {way_out}")


def fits_protocol(value: Any, protocol: type) -> str | None:
    """Why a value is no instance of a protocol (a phrase for a message), or ``None`` if it is one."""
    if isinstance(value, type):
        return "(an object, not a class)"
    lacking = [name for name in _members(protocol) if not hasattr(value, name)]
    if lacking:
        # A number or a name is no attempt at a part, of which the verbs are the news.
        no_attempt = len(lacking) == len(_members(protocol)) and type(value).__module__ == "builtins"
        return "" if no_attempt else f"with {', '.join(map(repr, lacking))}"
    for name, verb in _members(protocol).items():
        if verb is not None and not _takes(getattr(value, name), verb):
            own = ", ".join(list(inspect.signature(verb).parameters)[1:])
            return f"whose {name!r} can be called as {name}({own})"
    return None


def _entries(part: Any, path: str) -> Iterator[tuple[Any, str, dataclasses.Field[Any]]]:
    """Every field of a dataclass and then those of the parts in them, with the path to their owner."""
    entries = [entry for entry in dataclasses.fields(part) if entry.init and hasattr(part, entry.name)]
    for entry in entries:
        yield part, path, entry
    for entry in entries:
        value = getattr(part, entry.name)
        inner = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, item in inner:
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                where = entry.name if key is None else f"{entry.name}[{key!r}]"
                yield from _entries(item, f"{type(item).__name__} ({where} of {path})")


@cache
def _hints(cls: type) -> Mapping[str, Any]:
    """Annotations of a class; none where they name what cannot be looked up (a class inside a function)."""
    try:
        return get_type_hints(cls)
    except (NameError, TypeError, AttributeError):
        return {}


def _trouble(value: Any, hint: Any) -> str | None:
    """What the value must be, as a phrase; ``None`` if it is."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _trouble_with_all(value, arguments)
    if origin is Literal:
        return None if any(value is entry or value == entry for entry in arguments) else _listed(map(repr, arguments))
    if origin is tuple and Ellipsis not in arguments:
        fits = isinstance(value, tuple | list) and len(value) == len(arguments)
        fits = fits and all(_trouble(entry, kind) is None for entry, kind in zip(value, arguments, strict=True))
        return None if fits else f"a tuple of {len(arguments)} entries, each {_trouble(object(), arguments[0])}"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return _trouble_in_mapping(value, *arguments)
    if hint in _PLAIN or origin is Callable:
        accepts, phrase = _PLAIN[Callable if origin is Callable else hint]
        return None if accepts(value) else phrase
    if hint is type(None):
        return None if value is None else "None"
    if inspect.isclass(hint) and origin is None:
        if getattr(hint, "_is_protocol", False):
            why = fits_protocol(value, hint)
            return None if why is None else f"a part of the kind {hint.__name__} {why}".rstrip()
        return None if isinstance(value, hint) else f"a {hint.__name__}"
    return None


def _trouble_with_all(value: Any, kinds: tuple[Any, ...]) -> str | None:
    found = [_trouble(value, kind) for kind in kinds]
    return None if None in found else _listed(entry for entry in found if entry is not None)


def _trouble_in_mapping(value: Any, keys: Any, kind: Any) -> str | None:
    if not isinstance(value, Mapping):
        return "a dictionary"
    for key, entry in value.items():
        why = _trouble(key, keys)
        if why is not None:
            instead = f", e.g. {key.__name__!r}" if isinstance(key, type) else ""
            return f"a dictionary whose keys are each {why}{instead}, not {_shown(key)}"
        why = _trouble(entry, kind)
        if why is not None:
            return f"a dictionary whose entry {key!r} is {why}, not {_shown(entry)}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    float: (_is_number, "a number"),
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer"),
    str: (lambda value: isinstance(value, str), "a name"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    Callable: (lambda value: callable(value) and not isinstance(value, type), "a function"),
    Any: (lambda value: True, "anything"),
}


@cache
def _members(protocol: type) -> Mapping[str, Callable[..., Any] | None]:
    """Public members of a protocol: its functions, and ``None`` for attributes and properties."""
    found: dict[str, Callable[..., Any] | None] = {}
    for base in reversed(protocol.__mro__):
        if base not in (object, Protocol) and getattr(base, "_is_protocol", False):
            names = [*vars(base), *inspect.get_annotations(base)]
            found |= {name: vars(base).get(name) for name in names if not name.startswith("_")}
    return {name: verb if inspect.isfunction(verb) else None for name, verb in found.items()}


def _takes(verb: Any, expected: Callable[..., Any]) -> bool:
    """Whether a verb can be called with the arguments that the protocol's has no default for."""
    return callable(verb) and _binds(getattr(verb, "__func__", verb), hasattr(verb, "__func__"), expected)


@cache
def _binds(function: Callable[..., Any], bound: bool, expected: Callable[..., Any]) -> bool:
    required = [entry for entry in inspect.signature(expected).parameters.values() if entry.default is entry.empty]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return True
    try:
        signature.bind(*required[0 if bound else 1 :])
    except TypeError:
        return False
    return True


def _listed(phrases: Any) -> str:
    return " or ".join(dict.fromkeys(phrases))


def _shown(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}... ({type(value).__name__})"


def _way_out(entry: dataclasses.Field[Any], value: Any) -> str:
    """An example that would do."""
    if isinstance(value, type):
        return f"; a class needs its parentheses: {value.__name__}()"
    if entry.default_factory is not dataclasses.MISSING:
        return f"; for example {entry.name}={entry.default_factory()!r}, the default"
    if entry.default is not dataclasses.MISSING:
        return f"; the default is {entry.default!r}"
    return "; 'osculate methods --parts' lists the parts by kind"
