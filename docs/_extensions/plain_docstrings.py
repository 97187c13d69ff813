"""Docstrings of osculate are plain text with symbols: ``|s|``, ``theta*`` and ``h_`` mean themselves, not markup."""

import re
from typing import Any

import osculate

LITERAL = re.compile(r"(``.*?``|`[^`]*`)")
EMPHASIS = re.compile(r"(?<![\w*])\*(\w[^*\n]*?\w|\w)\*(?![\w*])")


def plain(line: str) -> str:
    """Escape what reStructuredText would take for markup, outside of literals and of ``*emphasis*``."""
    pieces = LITERAL.split(line)
    for index in range(0, len(pieces), 2):
        text = EMPHASIS.sub("\0\\1\1", pieces[index])
        text = re.sub(r"([|*])", r"\\\1", text)
        text = re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)
        pieces[index] = text.replace("\0", "*").replace("\1", "*")
    return "".join(pieces)


def process(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon reads the sections; code blocks are indented below ``::`` or begin with ``>>>``."""
    module = getattr(value, "__module__", None) or name
    if not str(module).startswith(osculate.__name__):
        return
    if what in ("attribute", "data", "property") and any(":" in line for line in lines[:1]):
        lines[:0] = ["..", ""]  # else napoleon takes what is before the colon for a type
    block: int | None = None
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None:
            if line.rstrip().endswith("::"):
                block = indent
            elif not line.lstrip().startswith((">>>", "...")):
                lines[index] = plain(line)


def unsigned(app: Any, what: str, name: str, value: Any, options: Any, *signature: Any) -> tuple[str, str] | None:
    """A protocol is not called: it has no signature."""
    return ("", "") if getattr(value, "_is_protocol", False) else None


def setup(app: Any) -> dict[str, bool]:
    """Registered before napoleon's own handler."""
    app.connect("autodoc-process-docstring", process, priority=100)
    app.connect("autodoc-process-signature", unsigned)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
