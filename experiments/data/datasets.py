"""MNIST and Fashion-MNIST as arrays: four checked files each, from a data folder or downloaded.

A data folder ``DIR`` may hold the files, gzipped or unpacked, in ``DIR/mnist`` (``DIR/fashion-mnist``), where
torchvision puts them (``DIR/MNIST/raw``, ``DIR/FashionMNIST/raw``), or in ``DIR`` itself.

Sources: MNIST, Y. LeCun, C. Cortes and C. J. C. Burges. Fashion-MNIST, H. Xiao, K. Rasul and R. Vollgraf,
arXiv:1708.07747.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .datafiles import DataError, LabelledImages, RemoteFile, checksum_of, data_folder, download, published, verify

__all__ = ["FASHION", "MNIST", "ImageSet", "load_images", "read_idx"]

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class ImageSet:
    """Where the four files of a data set are and how they are recognised.

    Args:
        title: name for messages.
        folder: folder of the set below a data folder.
        other_folders: further places below a data folder, ``.`` being the folder itself.
        files: by name, training images, training labels, test images and test labels, both gzipped and unpacked.
    """

    title: str
    folder: str
    other_folders: tuple[str, ...]
    files: Mapping[str, RemoteFile]


MNIST = ImageSet(
    title="MNIST",
    folder="mnist",
    other_folders=("MNIST/raw", "."),
    files=published(
        "mnist",
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
    ),
)
"""Ten handwritten digits, 60 000 training and 10 000 test images."""

FASHION = ImageSet(
    title="Fashion-MNIST",
    folder="fashion-mnist",
    other_folders=("fashion", "FashionMNIST/raw", "."),
    files=published(
        "fashion-mnist",
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
    ),
)
"""Ten kinds of clothing, 60 000 training and 10 000 test images."""


def load_images(source: ImageSet, data_dir: Path | None = None) -> LabelledImages:
    """Return the images and labels of a data set.

    Args:
        source: ``MNIST`` or ``FASHION``.
        data_dir: folder that may hold the files; None is what ``OSCULATE_DATA`` names, if anything.

    Raises:
        ArgumentError: the data folder does not exist.
        DataError: a file is damaged, or is missing and cannot be downloaded.
    """
    folder = data_folder(data_dir)
    train_images, train_labels, test_images, test_labels = (read_idx(_path(source, name, folder)) for name in _NAMES)
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{source.title}: images of shape {images.shape} do not fit labels of {labels.shape}")
    return LabelledImages(train_images, train_labels, test_images, test_labels)


def _path(source: ImageSet, name: str, folder: Path | None) -> Path:
    packed, plain = source.files[f"{name}.gz"], source.files[name]
    others = {
        file.checksum for known in (MNIST, FASHION) if known.title != source.title for file in known.files.values()
    }
    places = [] if folder is None else [folder / below for below in (source.folder, *source.other_folders)]
    candidates = [(place / file.name, file) for place in places for file in (packed, plain)]
    for path, file in candidates:
        # A file in the data folder itself may be the other set's file of the same name.
        if path.is_file() and not (path.parent == folder and f"sha256:{checksum_of(path)}" in others):
            verify(path, file)
            return path
    return download(packed, source.folder, [path for path, _ in candidates])


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes that an IDX file holds, in the shape its header states.

    The header is two zero bytes, the type (8: unsigned byte), the number of dimensions, and each dimension as a
    four-byte big-endian number. A gzipped file is known by its first two bytes, whatever its name.

    Args:
        path: the file.

    Raises:
        DataError: the file is not of this format, is truncated, or is longer than its header says.
    """
    raw = path.read_bytes()
    if raw.startswith(_GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked: {error}; put an intact copy in its place") from error
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
