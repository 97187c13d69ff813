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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .datafiles import DataError, LabelledImages, RemoteFile, checksum_of, data_folder, download, verify

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
class Checksums:
    """One file in its two forms: length in bytes and SHA-256, gzipped and unpacked."""

    packed_size: int
    packed: str
    size: int
    unpacked: str


@dataclass(frozen=True)
class ImageSet:
    """Where the four files of a data set are and how they are recognised.

    Args:
        title: name for messages.
        folder: folder of the set below a data folder.
        other_folders: further places below a data folder, ``.`` being the folder itself.
        mirrors: web folders that hold the gzipped files.
        files: checksums of the training images, training labels, test images and test labels.
    """

    title: str
    folder: str
    other_folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    files: tuple[Checksums, Checksums, Checksums, Checksums]


MNIST = ImageSet(
    title="MNIST",
    folder="mnist",
    other_folders=("MNIST/raw", "."),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    files=(
        Checksums(
            9912422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            47040016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        Checksums(
            28881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            60008,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        Checksums(
            1648877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            7840016,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        Checksums(
            4542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            10008,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
)
"""Ten handwritten digits, 60 000 training and 10 000 test images."""

FASHION = ImageSet(
    title="Fashion-MNIST",
    folder="fashion-mnist",
    other_folders=("fashion", "FashionMNIST/raw", "."),
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    files=(
        Checksums(
            26421880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            47040016,
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        Checksums(
            29515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            60008,
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        Checksums(
            4422102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            7840016,
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        Checksums(
            5148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            10008,
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
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
    train_images, train_labels, test_images, test_labels = (
        read_idx(_path(source, name, checksums, folder)) for name, checksums in zip(_NAMES, source.files, strict=True)
    )
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{source.title}: images of shape {images.shape} do not fit labels of {labels.shape}")
    return LabelledImages(train_images, train_labels, test_images, test_labels)


def _path(source: ImageSet, name: str, checksums: Checksums, folder: Path | None) -> Path:
    packed = RemoteFile(name + ".gz", source.mirrors, checksums.packed, checksums.packed_size)
    plain = RemoteFile(name, (), checksums.unpacked, checksums.size)
    places = [] if folder is None else [folder / below for below in (source.folder, *source.other_folders)]
    candidates = [(place / file.name, file) for place in places for file in (packed, plain)]
    for path, file in candidates:
        if path.is_file() and not (path.parent == folder and _belongs_to_another(source, path)):
            verify(path, file)
            return path
    return download(packed, source.folder, [path for path, _ in candidates])


def _belongs_to_another(source: ImageSet, path: Path) -> bool:
    """Tell whether a file that lies in the data folder itself is the other set's file of the same name."""
    others = [entry for known in (MNIST, FASHION) if known.title != source.title for entry in known.files]
    return checksum_of(path) in {checksum for entry in others for checksum in (entry.packed, entry.unpacked)}


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
