"""Two real texts, as codes of characters: the reference of the Python language, and Shakespeare.

The reference is what ``help()`` shows, the module ``pydoc_data.topics`` of the running Python (PSF licence): nothing is
downloaded, but every version of Python has another text, so losses compare within one version only, and a run records
which it was. Shakespeare is a file of a million characters, looked for in the data folder or downloaded.

Characters are those of printable ASCII and the line feed. Quotes, dashes and dots of typographers become ASCII,
everything else a question mark.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .datafiles import DataError, data_folder, find, published

__all__ = ["CHARACTERS", "TEXTS", "Text", "TextPlan", "coded", "normalised", "read_text", "sequences"]

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""Every character that a text may have, in the order of the codes."""

_ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\t": " ", "\xa0": " ", "\r": None}
)
_FOLDER = "shakespeare"
_FILE = published(_FOLDER, ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",))[
    "input.txt"
]


@dataclass(frozen=True)
class TextPlan:
    """How many sequences a text is cut into.

    Args:
        train: training sequences, >= 1.
        held_out: validation sequences, and at least as many test sequences.
        block: sequences in a block that stays together when blocks are shuffled; 0 keeps the order of the text, so that
            its end is what is tested on.
    """

    train: int
    held_out: int
    block: int


TEXTS: Mapping[str, TextPlan] = MappingProxyType(
    {"python": TextPlan(6000, 448, 16), "shakespeare": TextPlan(12000, 500, 0)}
)
"""Full size of each text. Topics of the reference are in the order of the alphabet, so its blocks are shuffled."""


@dataclass(frozen=True)
class Text:
    """A text, normalised.

    Args:
        characters: of ``CHARACTERS`` alone.
        origin: what it is, with its SHA-256.
    """

    characters: str
    origin: Mapping[str, str]


def read_text(name: str, data_dir: Path | None = None) -> Text:
    """Return one of ``TEXTS``.

    Args:
        name: ``python`` or ``shakespeare``.
        data_dir: folder that may hold ``shakespeare/input.txt``; None is what ``OSCULATE_DATA`` names, if anything.

    Raises:
        ArgumentError: the data folder does not exist.
        DataError: the text is missing and cannot be downloaded, or damaged.
    """
    if name == "python":
        title, characters = f"pydoc_data.topics of Python {platform.python_version()}", _reference()
    else:
        title, characters = _FILE.identity, find(_FILE, _FOLDER, data_folder(data_dir)).read_text(encoding="utf-8")
    characters = normalised(characters)
    return Text(characters, {"text": title, "text_sha256": hashlib.sha256(characters.encode("ascii")).hexdigest()})


def normalised(text: str) -> str:
    """Return a text in characters of ``CHARACTERS``, question marks for those that have no counterpart."""
    known = set(CHARACTERS)
    return "".join(character if character in known else "?" for character in text.translate(_ASCII))


def coded(text: str) -> NDArray[np.int64]:
    """Return the code of each character, its place in ``CHARACTERS``."""
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 31
    return np.where(codes < 0, 0, codes)  # the line feed is 10


def sequences(text: Text, length: int, plan: TextPlan) -> tuple[NDArray[np.int64], ...]:
    """Return training, validation and test sequences (N, length + 1): inputs, and the targets one character later.

    Args:
        text: as read.
        length: of the inputs, >= 1.
        plan: numbers of sequences.

    Raises:
        DataError: the text is too short.
    """
    codes = coded(text.characters)
    whole = (len(codes) - 1) // length
    if whole < plan.train + 2 * plan.held_out:
        raise DataError(
            f"{text.origin['text']} has {len(codes)} characters, {whole} sequences of {length}, fewer than the "
            f"{plan.train + 2 * plan.held_out} of this problem; take size=small, or another text"
        )
    starts = np.arange(whole) * length
    if plan.block:
        blocks = np.random.RandomState(0).permutation(whole // plan.block)
        starts = starts[: whole // plan.block * plan.block].reshape(-1, plan.block)[blocks].ravel()
        train, valid, test = np.split(
            starts[: plan.train + 2 * plan.held_out], [plan.train, plan.train + plan.held_out]
        )
    else:
        first_tested = max(whole - whole // 10, plan.train + plan.held_out)
        train, valid, test = (
            starts[: plan.train],
            starts[plan.train : plan.train + plan.held_out],
            starts[first_tested:],
        )
    within = np.arange(length + 1)
    return tuple(codes[part[:, None] + within] for part in (train, valid, test))


def _reference() -> str:
    """The topics in the order of their names."""
    try:
        topics: Mapping[str, str] = import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"this Python has no text of its reference, pydoc_data.topics ({error}); take --problem-option "
            "text=shakespeare, or the problem 'char-transformer', whose text is generated"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))
