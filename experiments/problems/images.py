"""Classifiers of MNIST and Fashion-MNIST; pixels of mean 0 and variance 1. They are ours, not a paper's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.datasets import FASHION, ImageSet, load_images
from ..networks.models import classifier, digit_cnn, seeded
from .problem import Data, Problem, categorical_loss, held_out, is_small
from .sources import SOURCES

__all__ = ["fashion_mlp", "image_cnn", "pixels", "share"]

_NETWORK = "two convolutions with BatchNorm, two dense layers with dropout"
_SUBJECTS = {"MNIST": "MNIST digits", "Fashion-MNIST": "Fashion-MNIST clothing"}


def image_cnn(name: str, source: ImageSet, size: str = "full", validation: int = 0) -> Problem:
    """Return the convolutional classifier of MNIST or Fashion-MNIST, with BatchNorm and dropout.

    Args:
        name: of the problem.
        source: the data set.
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
        validation: training images, the last ones, that are held out.
    """
    small = is_small(size)
    network = partial(digit_cnn, channels=4, hidden=32) if small else digit_cnn
    return Problem(
        name=name,
        summary=f"{_SUBJECTS[source.title]}, {_NETWORK}, cross entropy",
        likelihood="categorical",
        batch_size=200 if small else 500,
        epochs=5,
        classes=10,
        build_model=partial(seeded, network),
        loss=categorical_loss,
        load=partial(_labelled, source, small, (1, 28, 28), validation),
        source=SOURCES[source.title],
    )


def fashion_mlp(size: str = "full", validation: int = 0) -> Problem:
    """Return the fully connected classifier of Fashion-MNIST; pixels of mean 0 and variance 1.

    Args:
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
        validation: training images, the last ones, that are held out.
    """
    small = is_small(size)
    widths = (784, 64, 32, 10) if small else (784, 512, 256, 128, 10)
    return Problem(
        name="fashion-mlp",
        summary=f"Fashion-MNIST clothing, {'-'.join(map(str, widths))}, cross entropy",
        likelihood="categorical",
        batch_size=200 if small else 500,
        epochs=10,
        classes=10,
        build_model=partial(seeded, partial(classifier, widths)),
        loss=categorical_loss,
        load=partial(_labelled, FASHION, small, (784,), validation),
        source=SOURCES[FASHION.title],
    )


def _labelled(source: ImageSet, small: bool, shape: tuple[int, ...], validation: int, data_dir: Path | None) -> Data:
    images = load_images(source, data_dir)
    train, test = share(small)
    train_inputs, test_inputs = pixels(images.train_images[:train]), pixels(images.test_images[:test])
    deviation, mean = torch.std_mean(train_inputs)
    data = Data(
        ((train_inputs - mean) / deviation).reshape(-1, *shape),
        torch.from_numpy(images.train_labels[:train].astype(np.int64)),
        ((test_inputs - mean) / deviation).reshape(-1, *shape),
        torch.from_numpy(images.test_labels[:test].astype(np.int64)),
    )
    return held_out(data, validation)


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """Return images (N, ...) as rows of values in [0, 1]."""
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)).div_(255)


def share(small: bool) -> tuple[int | None, int | None]:
    """Return how many training and test images a size has; None is all."""
    return (6000, 1000) if small else (None, None)
