"""CURVES-like images: a thin bright stroke through three random points on 28 x 28 pixels.

A generated stand-in for the CURVES set of Hinton and Salakhutdinov (Science 313, 2006), whose file is not shipped:
the same size and kind of image, not the same images, so losses are not comparable with published ones.

A stroke is the parabola p(t), t in [0, 1], with p(0), p(1/2), p(1) the three points. A pixel's brightness is

    min(1, c * integral over the stroke of exp(-|x - p|^2 / (2 w^2)) ds),

with w the stroke's half width and c such that a straight stroke just saturates at its centre line, times a margin.
The Gaussian is a product of one factor per axis, so all pixels of an image are one small matrix product over sample
points of the stroke: anti-aliased, and no loop over images. Brightness is rounded to 256 levels, as in a file.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import require_positive_integer
from .datafiles import cache_folder

__all__ = ["generate_curves", "load_curves"]

SIDE = 28
_VERSION = 1  # of the recipe; part of the name of cached files
_BLOCK = 1000  # images drawn from one generator
_CANDIDATES = 4  # triples drawn for each image that is kept; about half have points far enough apart
_MARGIN_PIXELS = 4.0  # between the points and the border
_LEAST_DISTANCE = 5.0  # between two points, in pixels: no dots
_HALF_WIDTH = 0.7  # w, in pixels
_SATURATION = 1.3  # c over the value at which a straight stroke just reaches brightness 1
_SAMPLES = 96  # points along a stroke: at most about a pixel apart


Images = NDArray[np.uint8]


def load_curves(train: int, test: int, seed: int = 0) -> tuple[Images, Images]:
    """Return training and test images, (N, 28, 28) unsigned bytes each; from the cache folder if they were made before.

    A cache that cannot be read or written is passed over: the images are then generated, and are the same.

    Args:
        train: number of training images, >= 1.
        test: number of test images, >= 1.
        seed: decides all images, >= 0; training and test images come from independent streams.

    Raises:
        ArgumentError: a number is out of range.
    """
    path = cache_folder() / "curves" / f"curves-v{_VERSION}-{train}-{test}-{seed}.npz"
    images = _read_cache(path, ((train, SIDE, SIDE), (test, SIDE, SIDE)))
    if images is None:
        images = generate_curves(train, (seed, 0)), generate_curves(test, (seed, 1))
        _write_cache(path, images)
    return images


def generate_curves(count: int, seed: tuple[int, ...]) -> Images:
    """Return ``count`` images, (count, 28, 28) unsigned bytes; the first n do not depend on ``count``.

    Args:
        count: number of images, >= 1.
        seed: entropy of the random numbers, each >= 0.

    Cost: about 0.15 ms per image on one core.

    Raises:
        ArgumentError: ``count`` is out of range.
    """
    require_positive_integer("the number of curves", count)
    blocks = []
    for start in range(0, count, _BLOCK):
        rng = np.random.default_rng((*seed, start))
        triples = rng.uniform(_MARGIN_PIXELS, SIDE - 1 - _MARGIN_PIXELS, size=(_CANDIDATES * _BLOCK, 3, 2))
        gaps = np.linalg.norm(triples - np.roll(triples, 1, axis=1), axis=2)
        apart = triples[gaps.min(axis=1) >= _LEAST_DISTANCE]
        blocks.append(_draw(apart[: min(_BLOCK, count - start)]))
    return np.concatenate(blocks)


def _draw(points: NDArray[np.float64]) -> Images:
    """Return the strokes through ``points`` (N, 3, 2) as images (N, 28, 28)."""
    time = ((np.arange(_SAMPLES) + 0.5) / _SAMPLES)[None, :, None]
    start, middle, end = (points[:, k : k + 1] for k in range(3))
    slope, bend = 4 * middle - 3 * start - end, 2 * (start - 2 * middle + end)
    positions = start + time * slope + time**2 * bend
    lengths = np.linalg.norm(slope + 2 * time * bend, axis=2) / _SAMPLES  # of the stroke that each point stands for
    pixels = np.arange(SIDE, dtype=np.float64)
    distances = pixels[:, None, None, None] - positions  # pixel, image, sample, axis
    profile = np.exp(-0.5 * (distances / _HALF_WIDTH) ** 2)
    rows = np.moveaxis(profile[..., 0], 0, 1) * lengths[:, None, :]
    columns = np.moveaxis(profile[..., 1], 0, 2)
    saturated = math.sqrt(2 * math.pi) * _HALF_WIDTH  # the integral on the centre line of a long straight stroke
    brightness = np.minimum(rows @ columns * (_SATURATION / saturated), 1.0)
    levels: Images = np.rint(255 * brightness).astype(np.uint8)
    return levels


def _read_cache(path: Path, shapes: tuple[tuple[int, ...], ...]) -> tuple[Images, Images] | None:
    try:
        with path.open("rb") as stream, np.load(stream) as saved:
            images = saved["train"], saved["test"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return images if (images[0].shape, images[1].shape) == shapes else None


def _write_cache(path: Path, images: tuple[Images, Images]) -> None:
    partial = path.with_suffix(f".{np.random.default_rng().integers(2**32):08x}.part")
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                np.savez(stream, train=images[0], test=images[1])
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
