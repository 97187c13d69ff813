"""32 x 32 colour images: CIFAR-10 and CIFAR-100 in their published binary layout, and the cropped house numbers (SVHN).

A CIFAR file has for each image label bytes, then 3072 bytes. The files are looked for below the data folder, as they
are or packed by xz, then the published archive, which is downloaded where nothing is found. A data folder with only the
first 1000 test images is used too, and says so. SVHN is two MATLAB files.

Sources: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009, and the page of the data sets.
Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011, format 2.
"""

from __future__ import annotations

import hashlib
import lzma
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from .datafiles import DataError, LabelledImages, RemoteFile, data_folder, download, find, first_file, published, verify

__all__ = ["CIFAR10", "CIFAR100", "SVHN_TEST", "SVHN_TRAIN", "CifarFiles", "load_cifar", "load_svhn"]

_PIXELS = 3 * 32 * 32
_MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)


@dataclass(frozen=True)
class CifarFiles:
    """The files of one set.

    Args:
        folder: of the set below a data folder.
        archive: the published one.
        inside: folder within the archive, which may also lie in a data folder.
        train: names of the files with training images, in order.
        test: name of the file with test images.
        partial_test: name of a file with the first test images only, and what to call them; None if there is none.
        label_bytes: bytes before each image; the last of them is the class.
        classes: number of classes.
        known: by name, the unpacked files whose checksums are known.
    """

    folder: str
    archive: RemoteFile
    inside: str
    train: tuple[str, ...]
    test: str
    partial_test: tuple[str, str] | None
    label_bytes: int
    classes: int
    known: Mapping[str, RemoteFile] = field(default_factory=dict)


CIFAR10 = CifarFiles(
    folder="cifar10",
    archive=RemoteFile("cifar-10-binary.tar.gz", _MIRRORS, "md5:c32a1d4ab5d03f1284b67883e8d87530"),
    inside="cifar-10-batches-bin",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    partial_test=("test_batch_first1000.bin", "first 1,000 test images"),
    label_bytes=1,
    classes=10,
    known=published("cifar10"),
)
"""Ten kinds of things, 50 000 training and 10 000 test images."""

CIFAR100 = CifarFiles(
    folder="cifar100",
    archive=RemoteFile("cifar-100-binary.tar.gz", _MIRRORS, "md5:03b5dce01913d631647c71ecec9e9cb8"),
    inside="cifar-100-binary",
    train=("train.bin",),
    test="test.bin",
    partial_test=None,
    label_bytes=2,
    classes=100,
)
"""A hundred kinds of things, 50 000 training and 10 000 test images; the class is the fine label."""

_SVHN_MIRRORS = ("http://ufldl.stanford.edu/housenumbers/",)
SVHN_TRAIN = RemoteFile("train_32x32.mat", _SVHN_MIRRORS, "md5:e26dedcc434d2e4c54c9b2d4a06d8373")
"""73 257 digits."""
SVHN_TEST = RemoteFile("test_32x32.mat", _SVHN_MIRRORS, "md5:eb5a983be6a315427106f1b164d9cef3")
"""26 032 digits."""


def load_cifar(files: CifarFiles, data_dir: Path | None = None, train: int | None = None) -> LabelledImages:
    """Return the images and labels of a set.

    Args:
        files: ``CIFAR10`` or ``CIFAR100``.
        data_dir: folder that may hold the files; None is what ``OSCULATE_DATA`` names, if anything.
        train: how many training images are wanted, >= 1: no more files are read than hold them; None is all.

    Raises:
        ArgumentError: the data folder does not exist.
        DataError: a file is damaged, is not what its name says, or is missing and cannot be downloaded.
    """
    folder = data_folder(data_dir)
    images: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.uint8]] = []
    for name in files.train:
        if train is None or sum(map(len, labels)) < train:
            batch = _records(_content(files, name, folder), files, name)
            images.append(batch[0])
            labels.append(batch[1])
    name, test_set = _test_file(files, folder)
    test = _records(_content(files, name, folder), files, name)
    return LabelledImages(np.concatenate(images)[:train], np.concatenate(labels)[:train], *test, test_set)


def _test_file(files: CifarFiles, folder: Path | None) -> tuple[str, str]:
    """Name of the file with test images, and what they are: all, unless only the first ones lie in the folder."""
    if files.partial_test is not None and folder is not None:
        complete = _present(files, files.test, folder) or _local_archive(files, folder)
        if complete is None and _present(files, files.partial_test[0], folder):
            return files.partial_test
    return files.test, "test set"


def _present(files: CifarFiles, name: str, folder: Path | None) -> Path | None:
    """Where a file lies, plain or packed."""
    places = (files.folder, files.inside, ".")
    return first_file(folder, [f"{below}/{name}{ending}" for below in places for ending in ("", ".xz")])


def _local_archive(files: CifarFiles, folder: Path | None) -> Path | None:
    return first_file(folder, [f"{files.folder}/{files.archive.name}", files.archive.name])


def _content(files: CifarFiles, name: str, folder: Path | None) -> bytes:
    path = _present(files, name, folder)
    if path is None:
        return _from_archive(files, name, folder)
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except lzma.LZMAError as error:
        raise DataError(f"{path} is truncated or no xz file: {error}; put an intact copy in its place") from error
    expected, found = files.known.get(name), f"sha256:{hashlib.sha256(content).hexdigest()}"
    if expected is not None and found != expected.checksum:
        raise DataError(
            f"{path} is damaged or another file of that name: unpacked it has {len(content)} bytes, found {found}, "
            f"expected {expected.checksum}; put an intact copy in its place, or remove it to have the set downloaded"
        )
    return content


def _from_archive(files: CifarFiles, name: str, folder: Path | None) -> bytes:
    path = _local_archive(files, folder)
    if path is None:
        searched = [] if folder is None else [folder / files.folder / name, folder / files.folder / (name + ".xz")]
        path = download(files.archive, files.folder, searched)
    else:
        verify(path, files.archive)
    with tarfile.open(path) as archive:
        try:
            member = archive.extractfile(f"{files.inside}/{name}")
        except KeyError:
            member = None
        if member is None:
            raise DataError(f"{path} has no file {files.inside}/{name}; put the published archive in its place")
        return member.read()


def _records(content: bytes, files: CifarFiles, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    length = files.label_bytes + _PIXELS
    if not content or len(content) % length:
        raise DataError(f"{name} has {len(content)} bytes, no multiple of the {length} of an image with its label")
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    labels = records[:, files.label_bytes - 1]
    if labels.max() >= files.classes:
        raise DataError(
            f"{name} has class {labels.max()}, expected 0 ... {files.classes - 1}; it is another set's file"
        )
    return records[:, files.label_bytes :].reshape(-1, 3, 32, 32), labels


def load_svhn(
    data_dir: Path | None = None, files: tuple[RemoteFile, RemoteFile] = (SVHN_TRAIN, SVHN_TEST)
) -> LabelledImages:
    """Return the images and labels; the label of a digit is the digit (the files say 10 for a zero).

    Args:
        data_dir: folder that may hold ``svhn/train_32x32.mat`` and so on; None is what ``OSCULATE_DATA`` names.
        files: with training and test images.

    Raises:
        ArgumentError: the data folder does not exist.
        DataError: a file is damaged, is not what its name says, or is missing and cannot be downloaded.
    """
    folder = data_folder(data_dir)
    train, test = (_digits(find(file, "svhn", folder)) for file in files)
    return LabelledImages(*train, *test)


def _digits(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        found = loadmat(path, variable_names=["X", "y"])
        images, labels = found["X"], found["y"].ravel()
    except (ValueError, KeyError, TypeError, NotImplementedError, OSError) as error:
        raise DataError(f"{path} is no MATLAB file with X and y: {type(error).__name__}: {error}") from error
    if (
        images.shape[:3] != (32, 32, 3)
        or images.shape[3:] != labels.shape
        or not 1 <= labels.min() <= labels.max() <= 10
    ):
        raise DataError(
            f"{path} holds images {images.shape} and labels {labels.shape}, not (32, 32, 3, N) and 1 ... 10"
        )
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), (labels % 10).astype(np.uint8)
