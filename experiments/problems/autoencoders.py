"""Autoencoders: ReLU between the layers, a linear code and a linear output; the targets are the inputs.

Losses are means over samples and sums over pixels. ``size="small"`` has fewer samples and a narrower network.

Source: PAPERS 4.1 for the widths, losses and batch sizes of the autoencoders for digits, faces and curves; the one for
clothing has those of the digits.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from ..data.curves import load_curves
from ..data.datasets import ImageSet, load_images
from ..data.faces import load_face_patches
from ..networks.models import autoencoder, seeded
from .images import pixels, share
from .problem import Data, Problem, Target, bernoulli_loss, gaussian_loss, is_small, require_seed
from .sources import CURVES, OLIVETTI, SOURCES

__all__ = ["curves_autoencoder", "faces_autoencoder", "image_autoencoder"]


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

    def load(data_dir: Path | None) -> Data:
        images = load_curves(train, test, data_seed)
        return _reconstruction(pixels(images.train), pixels(images.test))

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
        source=CURVES,
    )


def image_autoencoder(name: str, source: ImageSet, size: str = "full") -> Problem:
    """Return the autoencoder of MNIST or Fashion-MNIST, pixels divided by 255.

    Args:
        name: of the problem.
        source: the data set.
        size: ``full``: all images; ``small``: the first 6000 and 1000 and a narrower network.
    """
    small = is_small(size)
    widths = (784, 200, 100, 30) if small else (784, 1000, 500, 250, 30)

    def load(data_dir: Path | None) -> Data:
        images = load_images(source, data_dir)
        train, test = share(small)
        return _reconstruction(pixels(images.train_images[:train]), pixels(images.test_images[:test]))

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
        source=SOURCES[source.title],
        target=Target("train_loss", 62.0) if name == "mnist-autoencoder" and not small else None,
    )


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
        source=OLIVETTI,
    )


def _reconstruction(train: Tensor, test: Tensor) -> Data:
    return Data(train, train, test, test)


def _drawn(widths: tuple[int, ...]) -> str:
    """Return encoder widths as text, such as ``784-400-...-6-...-784``, decoder abbreviated."""
    return "-".join(map(str, widths)) + f"-...-{widths[0]}"
