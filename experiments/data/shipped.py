"""Data sets that come with the package: handwritten digits and shellfish, both CC BY 4.0.

``shipped/README.md`` has authors, citations and licence. A file is unpacked, checked against its published checksum and
split into training and test samples by a permutation that depends on nothing: the same everywhere and for every seed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .datafiles import DataError, LabelledImages, published

__all__ = ["ABALONE_TEST", "DIGITS_TEST", "DIGIT_LEVELS", "load_abalone", "load_digits", "shipped_file"]

DIGIT_LEVELS = 16
"""The brightest pixel of a digit."""
DIGITS_TEST = 297
"""Of the 1797 digits those for tests."""
ABALONE_TEST = 877
"""Of the 4177 shellfish those for tests."""

_FOLDER = Path(__file__).with_name("shipped")
_SEXES = "MFI"
Entry = TypeVar("Entry", bound=np.generic)


def shipped_file(name: str, folder: Path = _FOLDER) -> bytes:
    """Return the content of a file of the package, unpacked and checked.

    Args:
        name: of the published file, without the ``.gz`` that it has here.
        folder: where it lies.

    Raises:
        DataError: it is missing or damaged, so that the package has to be installed again.
    """
    path, expected = folder / f"{name}.gz", published("shipped")[name]
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); install osculate again") from error
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if found != expected.checksum:
        raise DataError(
            f"{path} is damaged: unpacked it has {len(content)} bytes, expected {expected.size}; found {found}, "
            f"expected {expected.checksum}; install osculate again"
        )
    return content


def load_digits() -> LabelledImages:
    """Return 1500 training and 297 test images (N, 8, 8) of values 0 ... 16, with the digits they show."""
    lines = shipped_file("optdigits.tes").decode("ascii").split()
    table = np.array([line.split(",") for line in lines]).astype(np.uint8)
    train, test = _split(table, DIGITS_TEST)
    return LabelledImages(
        train[:, :-1].reshape(-1, 8, 8),
        train[:, -1],
        test[:, :-1].reshape(-1, 8, 8),
        test[:, -1],
        "297 held-out digits",
    )


def load_abalone() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return 3300 training and 877 test rows (N, 11): three indicators of the sex, seven measures, the rings."""
    lines = shipped_file("abalone.data").decode("ascii").splitlines()
    rows = [
        [float(sex == kind) for kind in _SEXES] + [float(value) for value in rest] for sex, *rest in csv.reader(lines)
    ]
    return _split(np.array(rows), ABALONE_TEST)


def _split(table: NDArray[Entry], test: int) -> tuple[NDArray[Entry], NDArray[Entry]]:
    """Training rows and the last ``test`` rows, shuffled by a generator whose stream numpy keeps for ever."""
    shuffled = table[np.random.RandomState(0).permutation(len(table))]
    return shuffled[:-test], shuffled[-test:]
