"""Reading the docstrings of methods and parts, so that the command line says what the code says.

Docstrings are written for the site, too; whatever of them reaches a screen goes through :func:`plain`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from docstring_parser.google import parse

from ... import registry
from ...framework.methods.parts import label

__all__ = ["Argument", "Description", "describe", "plain"]

_SECTION = re.compile(r"(Args|Arguments|Attributes|Returns|Yields|Raises|Example|Examples|Note):\n")
_ROLE = re.compile(r":(?:\w+:)?\w+:`([^`]*)`")
_TITLED = re.compile(r"(.+?)\s*<[^<>]*>", re.DOTALL)
_FENCE = re.compile(r"^```.*\n?", re.MULTILINE)
_LINK = re.compile(r"`([^`<]+?)\s*<([^`<>]*)>`__?")


@dataclass(frozen=True)
class Argument:
    """One keyword: its name, its default as a person would write it, and what it means (empty if nobody said)."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Description:
    """A docstring taken apart.

    Args:
        summary: its first paragraph, on one line.
        body: what follows until the first section; paragraphs and list items on one line each, formulas as they stand.
        arguments: the keywords of the signature, with what the section ``Args`` says about them.
        rest: the sentences behind the sections, such as the memory formula.
    """

    summary: str
    body: str
    arguments: tuple[Argument, ...]
    rest: str


def plain(text: str) -> str:
    """Text of a docstring as it is read on a screen: without Sphinx roles, links, fences and quotes of code.

    A role leaves the name that the site would show; one of a registered method's function leaves the method's name.
    """
    text = _ROLE.sub(lambda found: _shown(found[1]), _FENCE.sub("", text))
    return _LINK.sub(r"\1 (\2)", text).replace("`", "")


def _shown(target: str) -> str:
    """What a role with this text shows: its title, the last piece of ``~a.b.C``, else the name as it is."""
    titled = _TITLED.fullmatch(target)
    if titled:
        return titled[1]
    name = target.lstrip("!~.")
    if target.startswith("~"):
        name = name.rpartition(".")[2]
    return _method_names().get(name, name)


@functools.cache
def _method_names() -> dict[str, str]:
    """Registered names by those of the functions that make the methods."""
    return {entry.factory.__name__: name for name, entry in registry.methods().items()}


def describe(subject: Callable[..., Any]) -> Description:
    """Take apart the docstring of a function or class, in Google's style.

    Args:
        subject: its signature gives the names and defaults.
    """
    text = plain(inspect.getdoc(subject) or "")
    pieces = re.split(r"\n(?=\S)", text)  # an unindented line starts each, such as the heading of a section
    start = next((place for place, piece in enumerate(pieces) if _SECTION.match(piece)), len(pieces))
    behind = [piece for piece in pieces[start:] if not _SECTION.match(piece)]
    meanings = {entry.arg_name: entry.description or "" for entry in parse(text).params}
    summary, _, body = "\n".join(pieces[:start]).strip().partition("\n\n")
    arguments = tuple(
        Argument(name, _written(subject, entry), " ".join(meanings.get(name, "").split()))
        for name, entry in inspect.signature(subject).parameters.items()
        if entry.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    )
    return Description(" ".join(summary.split()), _flowed(body), arguments, _flowed("\n".join(behind)))


def _flowed(text: str) -> str:
    lines: list[str] = []
    for line in text.strip().splitlines():
        own = not line or line.startswith(("- ", "    "))
        if own or not lines or not lines[-1] or lines[-1].startswith("    "):
            lines.append(line)
        else:
            lines[-1] += f" {line.strip()}"
    return "\n".join(lines)


def _written(subject: Callable[..., Any], entry: inspect.Parameter) -> str:
    value = entry.default
    if dataclasses.is_dataclass(subject):  # the signature shows a place-holder for defaults that are made anew
        made = {field.name: field.default_factory for field in dataclasses.fields(subject)}.get(entry.name)
        value = made() if callable(made) else value
    if value is inspect.Parameter.empty:
        return "required"
    return label(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
