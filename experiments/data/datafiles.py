"""Files of published data sets: found in a folder or downloaded, and always checked before they are read.

A file is looked for below the data folder (an argument, else the environment variable ``OSCULATE_DATA``); only where
it is not there it is downloaded, into a cache folder of the user. A file that is there but damaged is an error, never
replaced in silence: the folder is the user's own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ...errors import ArgumentError, OsculateError

__all__ = [
    "DATA_VARIABLE",
    "DataError",
    "LabelledImages",
    "RemoteFile",
    "cache_folder",
    "checksum_of",
    "data_folder",
    "download",
    "find",
    "first_file",
    "published",
    "verify",
]

DATA_VARIABLE = "OSCULATE_DATA"
_TIMEOUT_SECONDS = 30


class DataError(OsculateError):
    """A data file is missing, damaged, or not what its name says."""


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, ...) and labels (N,) as unsigned bytes, in the published order; ``test_set`` names the test's."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    test_set: str = "test set"


@dataclass(frozen=True)
class RemoteFile:
    """One published file.

    Args:
        name: file name.
        mirrors: web folders that hold it, ending in ``/``, tried in this order.
        checksum: its checksum with the name of its algorithm in front, such as ``md5:...``; None where the published
            file's is unknown, so that the reader checks the content.
        size: its length in bytes, for messages; None if unknown.
    """

    name: str
    mirrors: tuple[str, ...]
    checksum: str | None = None
    size: int | None = None

    @property
    def identity(self) -> str:
        """Name, length and checksum in words."""
        size = f"{self.size} bytes, " if self.size is not None else ""
        return f"{self.name!r} ({size}{(self.checksum or 'sha256:unknown').replace(':', ' ')})"


def published(subfolder: str, mirrors: tuple[str, ...] = ()) -> dict[str, RemoteFile]:
    """Return the files of a data set whose checksums are known, by name.

    Args:
        subfolder: folder of the data set below a data folder.
        mirrors: see ``RemoteFile``.
    """
    files = {}
    for line in Path(__file__).with_name("checksums.txt").read_text(encoding="ascii").splitlines()[1:]:
        sha256, size, place = line.split()
        folder, _, name = place.partition("/")
        if folder == subfolder:
            files[name] = RemoteFile(name, mirrors, f"sha256:{sha256}", int(size))
    return files


def cache_folder() -> Path:
    """Return the user's own folder for downloads and generated data; it need not exist."""
    return Path(pooch.os_cache("osculate"))


def data_folder(data_dir: Path | None) -> Path | None:
    """Return the folder to look in: ``data_dir``, else what ``OSCULATE_DATA`` names, else None.

    Raises:
        ArgumentError: the folder does not exist.
    """
    named = os.environ.get(DATA_VARIABLE)
    folder = data_dir if data_dir is not None else Path(named) if named else None
    if folder is not None and not folder.is_dir():
        origin = "the data folder" if data_dir is not None else f"the data folder of {DATA_VARIABLE}"
        raise ArgumentError(f"{origin} must be an existing folder, got {str(folder)!r}; leave it out to download")
    return folder


def first_file(folder: Path | None, names: Iterable[str]) -> Path | None:
    """Return the first of some files, named by their paths below a folder, that is there; None without a folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None) if folder else None


def checksum_of(path: Path, algorithm: str = "sha256") -> str:
    """Return the checksum of a file in hexadecimal digits, by an algorithm of ``hashlib``."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def verify(path: Path, file: RemoteFile) -> None:
    """Check a file against its published checksum, where that is known.

    Args:
        path: the file.
        file: what it should be; its length tells a truncated file from one that was changed.

    Raises:
        DataError: the checksum differs; the message names the path and both checksums.
    """
    algorithm, _, expected = (file.checksum or "").partition(":")
    found = checksum_of(path, algorithm) if expected else ""
    if found == expected:
        return
    length = path.stat().st_size
    known = f", expected {file.size} bytes" if file.size is not None else ""
    truncated = file.size is not None and length < file.size
    state = "truncated" if truncated else "damaged or another file of that name"
    raise DataError(
        f"{path} is {state}: it has {length} bytes{known}; {algorithm} found {found}, expected {expected}; "
        "delete it to have it downloaded, or put an intact copy in its place"
    )


def download(file: RemoteFile, subfolder: str, searched: Iterable[Path] = ()) -> Path:
    """Return the file from the cache folder, downloaded there first if need be.

    Args:
        file: what to get; a cached file with another checksum is fetched again.
        subfolder: folder of the data set, below the cache folder and below a user's data folder.
        searched: places where the file was looked for before, for the message.

    Raises:
        DataError: no mirror delivered the file.
    """
    folder = cache_folder() / subfolder
    failures: list[str] = []
    for mirror in file.mirrors:
        try:
            fetched = pooch.retrieve(
                mirror + file.name,
                file.checksum,
                file.name,
                folder,
                downloader=pooch.HTTPDownloader(timeout=_TIMEOUT_SECONDS),
            )
            return Path(fetched)
        except (OSError, ValueError) as error:  # no network, no such page, folder not writable; wrong checksum
            reason = (str(error).splitlines() or [""])[0][:200]
            failures.append(f"  {mirror + file.name}: {type(error).__name__}: {reason}")
    places = [f"  {path}" for path in searched] or [f"  (no data folder given; none in {DATA_VARIABLE})"]
    raise DataError(
        "\n".join(
            [
                f"data file {file.identity} is missing; looked for it at",
                *places,
                f"and failed to download it to {folder}:",
                *failures,
                f"put it into DIR/{subfolder}/ and pass --data-dir DIR (or set {DATA_VARIABLE}=DIR), or take the "
                "problem 'curves-autoencoder', which generates its data",
            ]
        )
    )


def find(file: RemoteFile, subfolder: str, folder: Path | None) -> Path:
    """Return the file from a data folder, checked where its checksum is known, or else from the cache folder.

    Args:
        file: what to get.
        subfolder: folder of the data set, looked into before the data folder itself.
        folder: data folder; None where there is none.

    Raises:
        DataError: the file that is there is damaged, or there is none and no mirror delivered it.
    """
    names = [f"{subfolder}/{file.name}", file.name]
    path = first_file(folder, names)
    if path is None:
        return download(file, subfolder, [folder / name for name in names] if folder is not None else [])
    verify(path, file)
    return path
