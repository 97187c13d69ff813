"""Figures as pictures inside a page, whose colours the page can change: legible on white and on black."""

from __future__ import annotations

import colorsys
import io
import re
import zlib
from collections.abc import Iterable
from html import escape

from matplotlib.figure import Figure

from .style import in_style

__all__ = ["DARK", "contrast", "dark_colours", "figure_svg"]

DARK = "#15171b"
"""What a dark page is written on."""

_CONTRAST = 4.5
_GREY = 0.06

_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_ENLARGED = 1.2
"""On a screen letters are read from further away than on paper."""


@in_style
def figure_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element without a background, every colour in it a variable ``--cRRGGBB`` of the page.

    Args:
        figure: pictures in it (maps) keep their colours.
        name: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    box = re.search(r'<svg[^>]*? viewBox="([^"]*)"[^>]*>', text)
    assert box is not None
    inner = text[box.end() :]
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = re.sub(r"(?<![\d.])([1-9]\d*\.\d\d)\d+", r"\1", inner)  # not what letters are scaled by
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    # Only what is referred to keeps its name, which no other picture of the page has.
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", inner))
    prefix = f"f{zlib.crc32(name.encode()):x}-"
    inner = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", inner)
    inner = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", inner)
    inner = _COLOUR.sub(lambda found: f"var(--c{found[0][1:]}, {found[0]})", inner)
    width = _ENLARGED * figure.get_figwidth()
    return f'<svg role="img" aria-label="{escape(name)}" viewBox="{box[1]}" style="width: {width:.2f}in">{inner}'


def dark_colours(pictures: Iterable[str]) -> dict[str, str]:
    """For a dark page: each colour of these pictures by its variable, as light as it takes, of the same hue.

    Args:
        pictures: of :func:`figure_svg`.
    """
    found = sorted({match for picture in pictures for match in re.findall(r"var\(--c([0-9a-f]{6})", picture)})
    return {f"--c{colour}": _dark(colour) for colour in ["000000", *(c for c in found if c != "000000")]}


def _dark(colour: str) -> str:
    """Greys change places, a little within the ends; other colours keep their hue and are raised to a contrast."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4))
    hue, light, strength = colorsys.rgb_to_hls(red, green, blue)
    if max(red, green, blue) - min(red, green, blue) < _GREY:
        return _written(hue, 0.90 - 0.78 * light, strength)
    while contrast(_written(hue, light, strength), DARK) < _CONTRAST and light < 1:
        light += 0.01
    return _written(hue, light, strength)


def _written(hue: float, light: float, strength: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, min(1.0, light), strength))


def contrast(one: str, other: str) -> float:
    """Ratio of the luminances of two colours ``#rrggbb``, from 1 to 21, as the web's guidelines define it."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
