"""Convolutional classifiers of 32 x 32 colour images, with the papers' augmentation.

Source: PAPERS 4.1, from the published code of the papers; batches of 128. ``size="small"`` has the first 2000 training
and 500 test images and networks of the same depth that are 16 times narrower (ResNet: one block per stage).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..data.augmentation import Chain, ColourJitter, RandomCrop, RandomFlip
from ..data.colour_images import CIFAR10 as CIFAR10_FILES
from ..data.colour_images import CIFAR100 as CIFAR100_FILES
from ..data.colour_images import CifarFiles, load_cifar, load_svhn
from ..data.datafiles import LabelledImages
from ..networks.image_models import VGG11, VGG16, Standardise, residual_network, vgg
from ..networks.models import seeded
from .problem import Data, Problem, Source, Target, held_out, is_small, labelled

__all__ = ["cifar10_resnet32", "cifar_vgg16", "svhn_vgg11"]

_CIFAR = (
    "no explicit licence; the authors ask for the citation",
    "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    "https://www.cs.toronto.edu/~kriz/cifar.html",
)
_SVHN = Source(
    "Street View House Numbers, cropped digits",
    "for non-commercial use only",
    "Netzer, Wang, Coates, Bissacco, Wu and Ng, Reading Digits in Natural Images, 2011",
    "http://ufldl.stanford.edu/housenumbers/",
)
_SMALL_TRAIN, _SMALL_TEST = 2000, 500
_CIFAR10_PIXELS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100_PIXELS = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
_SVHN_PIXELS = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
_CROP_AND_FLIP = Chain((RandomCrop(4), RandomFlip()))
_SVHN_CHANGES = Chain((RandomCrop(2), ColourJitter((1 - 63 / 255, 1 + 63 / 255), (0.2, 1.8), (0.5, 1.5))))


_problem = partial(Problem, likelihood="categorical", batch_size=128, epochs=200)


def cifar10_resnet32(size: str = "full", validation: int = 0) -> Problem:
    """Return ResNet-32 on CIFAR-10: crops with margin 4 and reflections.

    Args:
        size: ``full`` or ``small``.
        validation: training images, the last ones, that are held out.
    """
    small = is_small(size)
    shape = {"blocks": 1, "width": 4} if small else {}
    return _problem(
        name="cifar10-resnet32",
        summary="CIFAR-10 pictures, ResNet-32 with BatchNorm, crops and reflections, cross entropy",
        classes=10,
        build_model=partial(seeded, lambda: residual_network(Standardise(*_CIFAR10_PIXELS), 10, **shape)),
        load=partial(_cifar, CIFAR10_FILES, small, validation),
        source=Source("CIFAR-10", *_CIFAR),
        target=None if small else Target("test_accuracy", 0.92),
        augmentation=_CROP_AND_FLIP,
    )


def cifar_vgg16(classes: int, size: str = "full", validation: int = 0) -> Problem:
    """Return VGG-16 with BatchNorm on CIFAR-10 or CIFAR-100: crops with margin 4 and reflections.

    Args:
        classes: 10 or 100.
        size: ``full`` or ``small``.
        validation: training images, the last ones, that are held out.
    """
    small, ten = is_small(size), classes == 10
    pixels, files = (_CIFAR10_PIXELS, CIFAR10_FILES) if ten else (_CIFAR100_PIXELS, CIFAR100_FILES)
    groups, hidden = _narrowed(VGG16, small)
    return _problem(
        name=f"cifar{classes}-vgg16",
        summary=f"CIFAR-{classes} pictures, VGG-16 with BatchNorm, crops and reflections, cross entropy",
        classes=classes,
        build_model=partial(seeded, lambda: vgg(Standardise(*pixels), groups, classes, True, hidden)),
        load=partial(_cifar, files, small, validation),
        source=Source(f"CIFAR-{classes}", *_CIFAR),
        target=None if small or ten else Target("test_accuracy", 0.72),
        augmentation=_CROP_AND_FLIP,
    )


def svhn_vgg11(size: str = "full", validation: int = 0) -> Problem:
    """Return VGG-11 without BatchNorm on the house numbers: crops with margin 2 and changes of colour.

    The papers do not say with which means pixels are standardised; these are those of the training set.

    Args:
        size: ``full`` or ``small``.
        validation: training images, the last ones, that are held out.
    """
    small = is_small(size)
    groups, hidden = _narrowed(VGG11, small)
    return _problem(
        name="svhn-vgg11",
        summary="house numbers, VGG-11, crops and changes of colour, cross entropy",
        classes=10,
        build_model=partial(seeded, lambda: vgg(Standardise(*_SVHN_PIXELS), groups, 10, False, hidden)),
        load=lambda data_dir: held_out(_bytes(load_svhn(data_dir), small), validation),
        source=_SVHN,
        augmentation=_SVHN_CHANGES,
    )


def _narrowed(groups: tuple[tuple[int, ...], ...], small: bool) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Channels of the convolutions and width of the dense layers."""
    return (tuple(tuple(width // 16 for width in group) for group in groups), 64) if small else (groups, 4096)


def _cifar(files: CifarFiles, small: bool, validation: int, data_dir: Path | None) -> Data:
    return held_out(_bytes(load_cifar(files, data_dir, _SMALL_TRAIN if small else None), small), validation)


def _bytes(images: LabelledImages, small: bool) -> Data:
    """Return bytes as inputs: augmentation works on them, and the networks standardise them."""
    train, test = (_SMALL_TRAIN, _SMALL_TEST) if small else (None, None)
    data = labelled(images, train, test, lambda values: torch.from_numpy(values.copy()))
    partly = len(data.test_inputs) < len(images.test_images)
    return replace(data, test_set=f"first {test} test images") if partly else data
