"""The problems: a network, a loss and data under one name.

Autoencoders have ReLU between their layers, a linear code and a linear output; their targets are their inputs. Losses
are means over samples (and sums over pixels). Every problem takes ``size="full"`` or ``"small"``: fewer samples and a
narrower network, for tests and quick looks. Parameters start from PyTorch's default distribution.

Source: PAPERS 4.1 for the widths, losses and batch sizes of the autoencoders for digits, faces and curves; the others
are ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ArgumentError, UnknownNameError
from .curves import load_curves
from .datasets import FASHION, MNIST, ImageSet, load_images
from .faces import load_face_patches
from .models import autoencoder, classifier, digit_cnn, seeded

__all__ = ["PROBLEMS", "Data", "Problem", "get_problem"]


@dataclass(frozen=True)
class Data:
    """Training and test samples, float32; of an autoencoder the targets are the inputs, the same tensors.

    Args:
        train_inputs: (N, ...).
        train_targets: (N, ...) values, or (N,) classes as int64.
        test_inputs: (M, ...).
        test_targets: like ``train_targets``.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Problem:
    """Something to train.

    Args:
        name: under which it is found.
        summary: data, network and loss in one line.
        likelihood: of which the loss is the negative logarithm.
        batch_size: samples in a mini-batch, unless a run says otherwise.
        epochs: passes over the training data that show most of what there is to see.
        classes: number of classes; None where the targets are values.
        build_model: returns the network for a seed, on the CPU; the global random state stays as it was.
        loss: of outputs and targets, a mean over samples, shape ().
        load: returns the data; its argument is a folder that may hold the files, or None.
    """

    name: str
    summary: str
    likelihood: Literal["bernoulli", "gaussian", "categorical"]
    batch_size: int
    epochs: int
    classes: int | None
    build_model: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    load: Callable[[Path | None], Data]


def bernoulli_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of pixels in [0, 1] and logits, summed over pixels, mean over samples, in nats."""
    total = functional.binary_cross_entropy_with_logits(output, target, reduction="sum")
    return total / len(output)


def gaussian_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return half the squared error, summed over pixels, mean over samples."""
    return 0.5 * functional.mse_loss(output, target, reduction="sum") / len(output)


def categorical_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of classes (N,) and logits (N, classes), mean over samples, in nats."""
    return functional.cross_entropy(output, target)


def curves_autoencoder(size: str = "full", data_seed: int = 0) -> Problem:
    """Return the autoencoder of generated curves.

    Args:
        size: ``full``: 20 000 training and 10 000 test images; ``small``: 4000, 1000 and a narrower network.
        data_seed: decides the images, >= 0.
    """
    small = _is_small(size)
    if not isinstance(data_seed, int) or data_seed < 0:
        raise ArgumentError(f"data_seed must be an integer >= 0, got {data_seed!r}")
    train, test = (4000, 1000) if small else (20000, 10000)
    widths = (784, 100, 50, 25, 6) if small else (784, 400, 200, 100, 50, 25, 6)

    def load(data_dir: Path | None) -> Data:
        images = load_curves(train, test, data_seed)
        return _reconstruction(_pixels(images.train), _pixels(images.test))

    return Problem(
        name="curves-autoencoder",
        summary=f"{train} generated images of curves through three points, {_drawn(widths)}, binary cross entropy",
        likelihood="bernoulli",
        batch_size=200 if small else 1000,
        epochs=20,
        classes=None,
        build_model=partial(seeded, partial(autoencoder, widths)),
        loss=bernoulli_loss,
        load=load,
    )


def image_autoencoder(name: str, source: ImageSet, size: str = "full") -> Problem:
    """Return the autoencoder of MNIST or Fashion-MNIST, pixels divided by 255.

    Args:
        name: of the problem.
        source: the data set.
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
    """
    small = _is_small(size)
    widths = (784, 200, 100, 30) if small else (784, 1000, 500, 250, 30)

    def load(data_dir: Path | None) -> Data:
        images = load_images(source, data_dir)
        train, test = _share(small)
        return _reconstruction(_pixels(images.train_images[:train]), _pixels(images.test_images[:test]))

    return Problem(
        name=name,
        summary=f"{source.title} images, {_drawn(widths)}, binary cross entropy",
        likelihood="bernoulli",
        batch_size=200 if small else 1000,
        epochs=20,
        classes=None,
        build_model=partial(seeded, partial(autoencoder, widths)),
        loss=bernoulli_loss,
        load=load,
    )


def faces_autoencoder(size: str = "full", patches_per_face: int | None = None, data_seed: int = 0) -> Problem:
    """Return the autoencoder of FACES-like patches; the people of the test patches are not trained on.

    Args:
        size: ``full``: 100 patches of each of 300 + 100 photographs; ``small``: 10, and a narrower network.
        patches_per_face: another number of patches, >= 1; None is what ``size`` says.
        data_seed: decides the patches, >= 0.
    """
    small = _is_small(size)
    if not isinstance(data_seed, int) or data_seed < 0:
        raise ArgumentError(f"data_seed must be an integer >= 0, got {data_seed!r}")
    patches = (10 if small else 100) if patches_per_face is None else patches_per_face
    widths = (625, 200, 100, 30) if small else (625, 2000, 1000, 500, 30)

    def load(data_dir: Path | None) -> Data:
        images = load_face_patches(patches, data_seed, data_dir)
        return _reconstruction(images.train, images.test)

    return Problem(
        name="faces-autoencoder",
        summary=f"{300 * patches} FACES-like patches of the Olivetti faces, {_drawn(widths)}, half squared error",
        likelihood="gaussian",
        batch_size=200 if small else 1000,
        epochs=20,
        classes=None,
        build_model=partial(seeded, partial(autoencoder, widths)),
        loss=gaussian_loss,
        load=load,
    )


def mnist_cnn(size: str = "full") -> Problem:
    """Return the convolutional classifier of MNIST, with BatchNorm and dropout; pixels of mean 0 and variance 1.

    Args:
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
    """
    small = _is_small(size)
    network = partial(digit_cnn, channels=4, hidden=32) if small else digit_cnn
    return Problem(
        name="mnist-cnn",
        summary="MNIST digits, two convolutions with BatchNorm, two dense layers with dropout, cross entropy",
        likelihood="categorical",
        batch_size=200 if small else 500,
        epochs=5,
        classes=10,
        build_model=partial(seeded, network),
        loss=categorical_loss,
        load=partial(_labelled, MNIST, small, (1, 28, 28)),
    )


def fashion_mlp(size: str = "full") -> Problem:
    """Return the fully connected classifier of Fashion-MNIST; pixels of mean 0 and variance 1.

    Args:
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
    """
    small = _is_small(size)
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
        load=partial(_labelled, FASHION, small, (784,)),
    )


PROBLEMS: Mapping[str, Callable[..., Problem]] = MappingProxyType(
    {
        "curves-autoencoder": curves_autoencoder,
        "mnist-autoencoder": partial(image_autoencoder, "mnist-autoencoder", MNIST),
        "fashion-autoencoder": partial(image_autoencoder, "fashion-autoencoder", FASHION),
        "faces-autoencoder": faces_autoencoder,
        "mnist-cnn": mnist_cnn,
        "fashion-mlp": fashion_mlp,
    }
)
"""Each problem's name and what makes it; the first is the default and needs no files."""


def get_problem(name: str, **options: Any) -> Problem:
    """Return a problem by name; no data are read yet.

    Args:
        name: a key of ``PROBLEMS``.
        options: keywords of the problem, ``size`` for all of them.

    Raises:
        UnknownNameError: there is no problem, option or size of that name; near misses are listed.
        ArgumentError: an option is out of range.
    """
    if name not in PROBLEMS:
        raise UnknownNameError("problem", name, PROBLEMS)
    factory = PROBLEMS[name]
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of problem {name!r}:", option, known)
    return factory(**options)


def _labelled(source: ImageSet, small: bool, shape: tuple[int, ...], data_dir: Path | None) -> Data:
    images = load_images(source, data_dir)
    train, test = _share(small)
    train_inputs, test_inputs = _pixels(images.train_images[:train]), _pixels(images.test_images[:test])
    deviation, mean = torch.std_mean(train_inputs)
    return Data(
        ((train_inputs - mean) / deviation).reshape(-1, *shape),
        torch.from_numpy(images.train_labels[:train].astype(np.int64)),
        ((test_inputs - mean) / deviation).reshape(-1, *shape),
        torch.from_numpy(images.test_labels[:test].astype(np.int64)),
    )


def _reconstruction(train: Tensor, test: Tensor) -> Data:
    return Data(train, train, test, test)


def _pixels(images: NDArray[np.uint8]) -> Tensor:
    """Return images (N, ...) as rows of values in [0, 1]."""
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)).div_(255)


def _is_small(size: str) -> bool:
    if size not in ("full", "small"):
        raise UnknownNameError("size", str(size), ("full", "small"))
    return size == "small"


def _share(small: bool) -> tuple[int | None, int | None]:
    return (6000, 1000) if small else (None, None)


def _drawn(widths: tuple[int, ...]) -> str:
    """Return encoder widths as text, such as ``784-400-...-6-...-784``, decoder abbreviated."""
    return "-".join(map(str, widths)) + f"-...-{widths[0]}"
