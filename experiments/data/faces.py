"""FACES-like images: 25 x 25 patches of rotated faces, made from the 400 Olivetti faces.

Made after the recipe that Hinton and Salakhutdinov (Science 313, 2006, supporting text) state for the FACES set:
rotations between -90 and 90 degrees, crops, subsampling by 1.4 to 1.8; every pixel shifted to mean zero and the whole
set scaled by one number to an average pixel variance of one; thirty people to train on, ten others to test on. The
random draws, the interpolation and the number of images are ours: this is NOT the FACES benchmark, and losses are not
comparable with published ones.

Source of the photographs: AT&T Laboratories Cambridge, 1992-1994; in the 64 x 64 form of S. Roweis, one MATLAB file.
The file is recognised by its content, not by a checksum: copies that were saved again, all with the same images, are
common, and the checksum of the one published is not known to us.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...errors import require_positive_integer
from .datafiles import DataError, RemoteFile, checksum_of, data_folder, find

__all__ = ["augment", "load_face_patches", "read_olivetti"]

OLIVETTI = RemoteFile("olivettifaces.mat", ("https://cs.nyu.edu/~roweis/data/",))
PEOPLE, TRAIN_PEOPLE, IMAGES_PER_PERSON = 40, 30, 10
SIDE, PATCH = 64, 25
_FOLDER = "olivetti"
_MOST_DEGREES = 90.0
_SCALES = (1.4, 1.8)  # pixels of the photograph per pixel of the patch
_MOST_SHIFT = 3.0  # of the patch's centre from the photograph's, along each axis, in its pixels
_CHUNK = 2000  # patches sampled at a time


def load_face_patches(patches_per_face: int, seed: int = 0, data_dir: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return training and test patches as rows of 625 pixels; N = 300 and M = 100 times ``patches_per_face``.

    Training patches (N, 625) are of the first 30 people; each pixel's mean is 0, the mean of the pixels' variances 1.
    Test patches (M, 625) are of the last 10 people, shifted and scaled alike.

    Args:
        patches_per_face: patches cut from each photograph, >= 1.
        seed: decides all cuts, >= 0.
        data_dir: folder that may hold ``olivetti/olivettifaces.mat`` or the file itself; None is what
            ``OSCULATE_DATA`` names, if anything.

    Raises:
        ArgumentError: a number is out of range, or the data folder does not exist.
        DataError: the file is damaged, or is missing and cannot be downloaded.
    """
    require_positive_integer("patches_per_face", patches_per_face)
    faces = torch.from_numpy(read_olivetti(find(OLIVETTI, _FOLDER, data_folder(data_dir))).astype(np.float32) / 255)
    boundary = TRAIN_PEOPLE * IMAGES_PER_PERSON
    train = augment(faces[:boundary], patches_per_face, np.random.default_rng((seed, 0)))
    test = augment(faces[boundary:], patches_per_face, np.random.default_rng((seed, 1)))
    mean = train.mean(dim=0)
    deviation = (train - mean).square().mean().sqrt()
    return (train - mean) / deviation, (test - mean) / deviation


def augment(faces: Tensor, patches_per_face: int, rng: np.random.Generator) -> Tensor:
    """Return random patches, (F * patches_per_face, 625), those of one face together.

    Args:
        faces: (F, 64, 64).
        patches_per_face: >= 1.
        rng: draws angle, scale and shift of each patch, uniformly.

    Cost: about 0.05 ms per patch on one core.
    """
    index = torch.arange(len(faces)).repeat_interleave(patches_per_face)
    angle, scale, shift_x, shift_y = rng.uniform(
        (-_MOST_DEGREES, _SCALES[0], -_MOST_SHIFT, -_MOST_SHIFT),
        (_MOST_DEGREES, _SCALES[1], _MOST_SHIFT, _MOST_SHIFT),
        size=(len(index), 4),
    ).T[:, :, None, None]
    steps = np.arange(PATCH) - (PATCH - 1) / 2
    x, y = steps[None, None, :], steps[None, :, None]
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    columns = scale * (cosine * x - sine * y) + shift_x
    rows = scale * (sine * x + cosine * y) + shift_y
    half = (SIDE - 1) / 2
    # (N, 25, 25, 2): x and y in [-1, 1] from the centres of the outermost pixels
    grids = torch.from_numpy(np.stack([columns, rows], axis=-1) / half).to(torch.float32)
    parts = [
        functional.grid_sample(faces[some].unsqueeze(1), grid, padding_mode="border", align_corners=True)
        for some, grid in zip(torch.split(index, _CHUNK), torch.split(grids, _CHUNK), strict=True)
    ]
    return torch.cat(parts).flatten(1)


def read_olivetti(path: Path) -> NDArray[np.uint8]:
    """Return the 400 photographs, (400, 64, 64) unsigned bytes, ten of each person in a row.

    The file holds a matrix ``faces`` of shape (4096, 400); a column is one photograph, stored column by column.

    Raises:
        DataError: the file cannot be read, or does not hold 400 different images of bytes.
    """
    try:
        matrix = np.asarray(scipy.io.loadmat(path, variable_names=["faces"])["faces"])
    except Exception as error:  # a damaged file makes the reader fail in many ways
        raise DataError(_damaged(path, f"cannot be read ({type(error).__name__}: {error})")) from error
    expected = (SIDE * SIDE, PEOPLE * IMAGES_PER_PERSON)
    if matrix.shape != expected or matrix.dtype.kind not in "uif":
        raise DataError(_damaged(path, f"holds 'faces' of shape {matrix.shape} and type {matrix.dtype}"))
    pixels = matrix.astype(np.uint8)
    if not np.array_equal(pixels, matrix) or int(pixels.max()) < 128:
        raise DataError(_damaged(path, f"holds values in [{matrix.min()}, {matrix.max()}], or fractions"))
    distinct = len(np.unique(pixels.T, axis=0))
    if distinct != expected[1]:
        raise DataError(_damaged(path, f"holds {distinct} different images"))
    return np.ascontiguousarray(pixels.T.reshape(-1, SIDE, SIDE).transpose(0, 2, 1))


def _damaged(path: Path, state: str) -> str:
    return (
        f"{path} {state}; expected a MATLAB file with 'faces', 4096 x 400 whole numbers in 0..255, 400 different "
        f"images; its sha256 is {checksum_of(path)}; delete it to have it downloaded, or put an intact copy in its "
        "place"
    )
