"""Pages that need nothing but a browser: tables that sort and search, pictures inside the file.

The pages are templates in ``templates/``; what is put into them is escaped there, so that no name can break a page.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["render"]


def render(template: str, filters: Mapping[str, Callable[..., object]], **values: object) -> str:
    """A whole page.

    Args:
        template: file in ``templates/``.
        filters: functions that this template calls beside those of every page.
        values: what it shows.
    """
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters |= {"inline": _inline, "plain": _plain, "sort_key": _sort_key, **filters}
    return pages.get_template(template).render(values)


def _inline(content: bytes, kind: str) -> str:
    """Address of content that is part of the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _plain(value: Any) -> str:
    """A value of a table of pairs; nested ones are joined."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _sort_key(value: float) -> str:
    """What the page's script sorts by: infinite values come last, what is not a number counts as empty."""
    if value != value:
        return ""
    return {float("inf"): "Infinity", -float("inf"): "-Infinity"}.get(value, repr(value))
