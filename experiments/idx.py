"""The IDX format of MNIST and Fashion-MNIST: a big-endian header, then the numbers, possibly gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .data.datafiles import DataError

__all__ = ["read_idx"]

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes that an IDX file holds, in the shape its header states.

    The header is two zero bytes, the type (8: unsigned byte), the number of dimensions, and each dimension as a
    four-byte big-endian number. A gzipped file is known by its first two bytes, whatever its name.

    Args:
        path: the file.

    Raises:
        DataError: the file is not of this format, is truncated, or is longer than its header says.
    """
    raw = _unpacked(path)
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path} is no IDX file of unsigned bytes: it starts with {raw[:4].hex()}, expected 0000 08")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path} is truncated: it ends inside its header, after {len(raw)} of {start} bytes")
    shape = tuple(int(size) for size in np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4))
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{path} is truncated or damaged: its header states {shape}, {math.prod(shape)} bytes, "
            f"but {len(raw) - start} bytes follow; put an intact copy in its place"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def _unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; put an intact copy in its place") from error
