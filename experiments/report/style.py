"""The style in which figures are drawn: the house's file, and what a file of the user's own changes in it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib import style as styles

from ...errors import ArgumentError, UnknownNameError

__all__ = ["HOUSE", "drawing", "in_style", "read_style"]

HOUSE = Path(__file__).parent / "templates" / "osculate.mplstyle"
"""The house's style, a file of matplotlib to start from."""

_NEVER = ("backend", "backend_fallback", "interactive", "toolbar", "timezone")
"""Settings of matplotlib that are no matter of style."""

_inside: ContextVar[bool] = ContextVar("inside", default=False)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def drawing(file: Path | None = None) -> Iterator[None]:
    """Figures that are made and saved inside have the house's style, changed by a style file.

    Args:
        file: see :func:`read_style`; ``None``: the style of a context around this one, else the house's alone.

    Raises:
        ArgumentError: the file is no style.
    """
    if file is None and _inside.get():
        yield
        return
    own = {} if file is None else read_style(file)
    settings: Any = _settings(HOUSE) | own
    with mpl.rc_context(settings):
        token = _inside.set(True)
        try:
            yield
        finally:
            _inside.reset(token)


def in_style(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """What a function draws has the style of the :func:`drawing` it is called in, the house's outside of any."""

    @functools.wraps(function)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if _inside.get():
            return function(*args, **kwargs)
        with drawing():
            return function(*args, **kwargs)

    return styled


def read_style(file: Path) -> dict[str, Any]:
    """Settings of a style file of matplotlib, checked line by line.

    Args:
        file: lines ``name: value``; or the name of a style that matplotlib has, such as ``ggplot``.

    Raises:
        UnknownNameError: matplotlib has no setting of that name.
        ArgumentError: there is no such file, or a value is not one that the setting takes.
    """
    if not file.exists() and str(file) in styles.library:
        return {name: value for name, value in styles.library[str(file)].items() if name not in _NEVER}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"the style {str(file)!r} is neither a file of matplotlib's settings that can be read ({error}) nor one of "
            f"the styles that matplotlib has: {', '.join(sorted(styles.available)[:4])}, ..."
        ) from None
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, colon, value = (part.strip() for part in text.partition(":"))
        where = f"line {number} of the style {str(file)!r}"
        if not colon:
            raise ArgumentError(f"{where} is {text!r}; a line is 'name: value', such as 'font.size: 9'")
        if name not in mpl.rcParams:
            raise UnknownNameError(f"setting of matplotlib, in {where},", name, mpl.rcParams)
        try:
            mpl.RcParams({name: value.strip("\"'") if name != "axes.prop_cycle" else value})
        except (ValueError, KeyError) as error:
            raise ArgumentError(f"{where}: {name} cannot be {value!r} ({error})") from None
    return _settings(file)


def _settings(file: Path) -> dict[str, Any]:
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # what it would remark has been checked
    try:
        found = mpl.rc_params_from_file(file, fail_on_error=True, use_default_template=False)
    finally:
        log.setLevel(level)
    return {name: value for name, value in found.items() if name not in _NEVER}
