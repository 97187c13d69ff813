"""Parts written as text, and methods with some of their parts exchanged: what study files are made of.

A text such as ``"Kronecker(Covariance(), BFGS(pairs=PowellH()))"`` is read by Python's own parser and built from the
registered parts alone; nothing in it is executed. A place in a method is written as its dotted path
(``preconditioner.outputs.pairs``), or any tail of it that names one place (``pairs``); ``*`` stands for anything.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ...errors import ArgumentError, UnknownNameError
from ...preconditioners import Schedule
from .method import Method
from .parts import parts

__all__ = ["is_part_text", "places", "read_part", "with_parts"]

_WORDS = {"inf": math.inf}


def is_part_text(value: object) -> bool:
    """Whether a value is text that names a part: parts begin with a capital letter, as classes do."""
    return isinstance(value, str) and value[:1].isupper()


def read_part(text: str) -> Any:
    """Build a part from text.

    Args:
        text: a registered part with or without arguments, e.g. ``"Split"`` or ``"PowellThenLM(mu1=0.3)"``.

    Example:
        >>> read_part("BFGS(pairs=PowellH)")
        BFGS(pairs=PowellH(mu1=0.2), average=ZeroStartAverage(decay=0.9), skip=CurvatureTest(minimum=0.0001))

    Raises:
        UnknownNameError: a name is no registered part; near misses are listed.
        ArgumentError: the text is not of this form, or a part refuses its arguments.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ArgumentError(f"a part reads Name or Name(argument, name=value), got {text!r} ({error.msg})") from None
    classes = {name: cls for table in parts().values() for name, cls in table.items()}
    return _built(tree.body, classes | {"Schedule": Schedule}, text)


def places(method: Method) -> dict[str, Any]:
    """Every place in a method that can be exchanged, by dotted path, with what is there now."""
    return {".".join(path): value for path, value in _walk(method, ())}


def with_parts(method: Method, changes: Mapping[str, Any], defaults: Mapping[str, float] | None = None) -> Method:
    """Return the method with other parts, or other numbers inside its parts.

    All changes are made before the new method is composed, so that they are checked together.

    Args:
        method: the base; it stays unchanged.
        changes: from places to what comes there: text for :func:`read_part`, a part, or a number.
        defaults: ``lr``, ``damping`` and ``weight_decay`` of the new method that differ from the base's: other parts
            may need other numbers.

    Raises:
        UnknownNameError: a place does not exist; near misses are listed.
        ArgumentError: a place names several, or two changes meet; or the parts refuse each other.
    """
    known = places(method)
    chosen: dict[tuple[str, ...], Any] = {}
    for place, value in changes.items():
        for path in _found(place, known):
            chosen[tuple(path.split("."))] = read_part(value) if is_part_text(value) else value
    for outer in chosen:
        inside = [inner for inner in chosen if inner[: len(outer)] == outer and inner != outer]
        if inside:
            raise ArgumentError(f"{'.'.join(outer)} is exchanged as a whole, and {'.'.join(inside[0])} inside it too")
    if defaults:
        chosen["defaults",] = {**method.defaults, **defaults}
    result: Method = _replaced(method, chosen)
    return result


def _found(place: str, known: Mapping[str, Any]) -> list[str]:
    if place in known:
        return [place]
    found = [path for path in known if fnmatchcase(path, place) or fnmatchcase(path, f"*.{place}")]
    if not found:
        raise UnknownNameError("part of this method:", place, {path.rpartition(".")[2] for path in known})
    if len(found) > 1 and "*" not in place:
        raise ArgumentError(
            f"{place!r} names {len(found)} places of this method: {', '.join(found)}; write one of them, or *.{place} "
            "for all"
        )
    return found


def _walk(node: Any, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in _entries(node).items():
        path = (*prefix, name)
        if path != ("defaults",):
            yield path, value
            yield from _walk(value, path)


def _entries(node: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {entry.name: getattr(node, entry.name) for entry in dataclasses.fields(node) if entry.init}
    if isinstance(node, Mapping):
        return {str(name): value for name, value in node.items()}
    return {}


def _replaced(node: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:
    if () in changes:
        return changes[()]
    heads = dict.fromkeys(path[0] for path in changes)
    entries = _entries(node)
    new = {
        head: _replaced(entries[head], {path[1:]: value for path, value in changes.items() if path[0] == head})
        for head in heads
    }
    if isinstance(node, Mapping):
        return {**node, **new}
    return dataclasses.replace(node, **new)


def _built(node: ast.expr, classes: Mapping[str, type], text: str) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.Name(id=name):
            return _part(name, (), {}, classes)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_built(operand, classes, text)
        case ast.Tuple(elts=items):
            return tuple(_built(item, classes, text) for item in items)
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            pairs = zip(keys, values, strict=True)
            return {key.value: _built(value, classes, text) for key, value in pairs if isinstance(key, ast.Constant)}
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(entry.arg for entry in keywords):
            named = {str(entry.arg): _built(entry.value, classes, text) for entry in keywords}
            return _part(name, tuple(_built(item, classes, text) for item in args), named, classes)
    raise ArgumentError(f"a part reads Name or Name(argument, name=value), got {ast.unparse(node)!r} in {text!r}")


def _part(name: str, args: tuple[Any, ...], named: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    if name not in classes:
        raise UnknownNameError("part", name, classes)
    fields = list(inspect.signature(classes[name]).parameters)
    for key in named:
        if key not in fields:
            raise UnknownNameError(f"argument of {name}:", key, fields)
    try:
        return classes[name](*args, **named)
    except TypeError as error:
        raise ArgumentError(f"{name} cannot be built: {error}") from error
