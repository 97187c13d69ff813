"""The cropped house numbers (SVHN): two MATLAB files of 32 x 32 digits.

Source: Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011, format 2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from .cifar import ColourImages
from .datafiles import DataError, RemoteFile, data_folder, find

__all__ = ["SVHN_TEST", "SVHN_TRAIN", "load_svhn"]

_FOLDER = "svhn"
_MIRRORS = ("http://ufldl.stanford.edu/housenumbers/",)
SVHN_TRAIN = RemoteFile("train_32x32.mat", _MIRRORS, md5="e26dedcc434d2e4c54c9b2d4a06d8373")
"""73 257 digits."""
SVHN_TEST = RemoteFile("test_32x32.mat", _MIRRORS, md5="eb5a983be6a315427106f1b164d9cef3")
"""26 032 digits."""


def load_svhn(
    data_dir: Path | None = None, files: tuple[RemoteFile, RemoteFile] = (SVHN_TRAIN, SVHN_TEST)
) -> ColourImages:
    """Return the images and labels; the label of a digit is the digit (the files say 10 for a zero).

    Args:
        data_dir: folder that may hold ``svhn/train_32x32.mat`` and so on; None is what ``OSCULATE_DATA`` names.
        files: with training and test images.

    Raises:
        ArgumentError: the data folder does not exist.
        DataError: a file is damaged, is not what its name says, or is missing and cannot be downloaded.
    """
    folder = data_folder(data_dir)
    train, test = (_read(find(file, _FOLDER, folder)) for file in files)
    return ColourImages(*train, *test)


def _read(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
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
