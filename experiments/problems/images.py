"""Autoencoders and classifiers of small grey images: generated curves, faces, MNIST and Fashion-MNIST.

Autoencoders have ReLU between the layers, a linear code and a linear output; their targets are the inputs, their losses
means over samples and sums over pixels. The classifiers are ours, not a paper's. ``size="small"`` has fewer samples and
a narrower network.

Source: PAPERS 4.1 for the widths, losses and batch sizes of the autoencoders for digits, faces and curves; the one for
clothing has those of the digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.curves import load_curves
from ..data.datasets import FASHION, ImageSet, load_images
from ..data.faces import load_face_patches
from ..networks.models import autoencoder, classifier, digit_cnn, seeded
from .problem import (
    GENERATED_HERE,
    Data,
    Problem,
    Source,
    Target,
    held_out,
    is_small,
    labelled,
    require_seed,
)

__all__ = ["curves_autoencoder", "faces_autoencoder", "fashion_mlp", "image_autoencoder", "image_cnn"]

_CURVES = Source(
    "generated curves through three points", GENERATED_HERE, "after Hinton and Salakhutdinov, Science 313, 2006"
)
_OLIVETTI = Source(
    "Olivetti faces",
    "credit AT&T Laboratories Cambridge when the images are used",
    "Samaria and Harter, Parameterisation of a stochastic model for human face identification, WACV 1994",
    "https://cs.nyu.edu/~roweis/data.html",
)
_SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "MNIST": Source(
            "MNIST",
            "CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
            "LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, 1998",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        "Fashion-MNIST": Source(
            "Fashion-MNIST",
            "MIT, Zalando SE",
            "Xiao, Rasul and Vollgraf, arXiv:1708.07747",
            "https://github.com/zalandoresearch/fashion-mnist",
        ),
    }
)
_classifier = partial(Problem, likelihood="categorical", classes=10)


def curves_autoencoder(size: str = "full", data_seed: int = 0) -> Problem:
    """Return the autoencoder of generated curves.

    Args:
        size: ``full``: 20 000 training and 10 000 test images; ``small``: 4000, 1000 and a narrower network.
        data_seed: decides the images, >= 0.
    """
    small = is_small(size)
    require_seed(data_seed)
    train, test = (4000, 1000) if small else (20000, 10000)
    widths = (784, 100, 50, 25, 6) if small else (784, 400, 200, 100, 50, 25, 6)

    def load(data_dir: Path | None) -> tuple[Tensor, Tensor]:
        drawn = load_curves(train, test, data_seed)
        return _pixels(drawn[0]), _pixels(drawn[1])

    images = f"{train} generated images of curves through three points"
    return _autoencoder("curves-autoencoder", images, widths, small, load, _CURVES)


def image_autoencoder(name: str, source: ImageSet, size: str = "full") -> Problem:
    """Return the autoencoder of MNIST or Fashion-MNIST, pixels divided by 255.

    Args:
        name: of the problem.
        source: the data set.
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
    """
    small = is_small(size)
    widths = (784, 200, 100, 30) if small else (784, 1000, 500, 250, 30)

    def load(data_dir: Path | None) -> tuple[Tensor, Tensor]:
        images = load_images(source, data_dir)
        train, test = _share(small)
        return _pixels(images.train_images[:train]), _pixels(images.test_images[:test])

    target = Target("train_loss", 62.0) if name == "mnist-autoencoder" and not small else None
    return _autoencoder(name, f"{source.title} images", widths, small, load, _SOURCES[source.title], target)


def faces_autoencoder(size: str = "full", patches_per_face: int | None = None, data_seed: int = 0) -> Problem:
    """Return the autoencoder of FACES-like patches; the people of the test patches are not trained on.

    Args:
        size: ``full``: 100 patches of each of 300 + 100 photographs; ``small``: 10, and a narrower network.
        patches_per_face: another number of patches, >= 1; None is what ``size`` says.
        data_seed: decides the patches, >= 0.
    """
    small = is_small(size)
    require_seed(data_seed)
    patches = (10 if small else 100) if patches_per_face is None else patches_per_face
    widths = (625, 200, 100, 30) if small else (625, 2000, 1000, 500, 30)

    load = partial(load_face_patches, patches, data_seed)
    images = f"{300 * patches} FACES-like patches of the Olivetti faces"
    return _autoencoder("faces-autoencoder", images, widths, small, load, _OLIVETTI, gaussian=True)


def image_cnn(name: str, source: ImageSet, size: str = "full", validation: int = 0) -> Problem:
    """Return the convolutional classifier of MNIST or Fashion-MNIST, with BatchNorm and dropout.

    Args:
        name: of the problem.
        source: the data set.
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
        validation: training images, the last ones, that are held out.
    """
    small = is_small(size)
    subject = "MNIST digits" if source.title == "MNIST" else "Fashion-MNIST clothing"
    return _classifier(
        name=name,
        summary=f"{subject}, two convolutions with BatchNorm, two dense layers with dropout, cross entropy",
        batch_size=200 if small else 500,
        epochs=5,
        build_model=partial(seeded, partial(digit_cnn, channels=4, hidden=32) if small else digit_cnn),
        load=partial(_standardised, source, small, (1, 28, 28), validation),
        source=_SOURCES[source.title],
    )


def fashion_mlp(size: str = "full", validation: int = 0) -> Problem:
    """Return the fully connected classifier of Fashion-MNIST; pixels of mean 0 and variance 1.

    Args:
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
        validation: training images, the last ones, that are held out.
    """
    small = is_small(size)
    widths = (784, 64, 32, 10) if small else (784, 512, 256, 128, 10)
    return _classifier(
        name="fashion-mlp",
        summary=f"Fashion-MNIST clothing, {'-'.join(map(str, widths))}, cross entropy",
        batch_size=200 if small else 500,
        epochs=10,
        build_model=partial(seeded, partial(classifier, widths)),
        load=partial(_standardised, FASHION, small, (784,), validation),
        source=_SOURCES[FASHION.title],
    )


def _autoencoder(
    name: str,
    images: str,
    widths: tuple[int, ...],
    small: bool,
    load: Callable[[Path | None], tuple[Tensor, Tensor]],
    source: Source,
    target: Target | None = None,
    gaussian: bool = False,
) -> Problem:
    """The problem of images that ``load`` returns, training and test images as rows."""

    def data(data_dir: Path | None) -> Data:
        train, test = load(data_dir)
        return Data(train, train, test, test)

    loss = "half squared error" if gaussian else "binary cross entropy"
    return Problem(
        name=name,
        summary=f"{images}, {'-'.join(map(str, widths))}-...-{widths[0]}, {loss}",
        likelihood="gaussian" if gaussian else "bernoulli",
        batch_size=200 if small else 1000,
        epochs=20,
        build_model=partial(seeded, partial(autoencoder, widths)),
        load=data,
        source=source,
        target=target,
    )


def _standardised(
    source: ImageSet, small: bool, shape: tuple[int, ...], validation: int, data_dir: Path | None
) -> Data:
    train, test = _share(small)

    def standardise(images: NDArray[np.uint8]) -> Tensor:
        return ((_pixels(images) - mean) / deviation).reshape(-1, *shape)

    images = load_images(source, data_dir)
    deviation, mean = torch.std_mean(_pixels(images.train_images[:train]))
    return held_out(labelled(images, train, test, standardise), validation)


def _pixels(images: NDArray[np.uint8]) -> Tensor:
    """Return images (N, ...) as rows of values in [0, 1]."""
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)).div_(255)


def _share(small: bool) -> tuple[int | None, int | None]:
    """Return how many training and test images a size has; None is all."""
    return (6000, 1000) if small else (None, None)
