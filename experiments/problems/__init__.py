"""The problems by name. Every one takes ``size="full"`` or ``"small"``: less data and a narrower network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from ...errors import UnknownNameError
from ..data.datasets import FASHION, MNIST
from .citations import GRAPH_TASKS, graph_network
from .digits import digits_autoencoder, digits_classifier, digits_vae
from .equations import burgers_1d, heat_1d, poisson_2d, poisson_5d, sine_regression
from .images import curves_autoencoder, faces_autoencoder, fashion_mlp, image_autoencoder, image_cnn
from .known import logistic, quadratic
from .natural_images import cifar10_resnet32, cifar_vgg16, svhn_vgg11
from .problem import Data, Problem, Source, Target
from .residual_problem import ResidualProblem
from .tabular import tabular_regression
from .text import char_lm, char_transformer

__all__ = ["PROBLEMS", "Data", "Problem", "ResidualProblem", "Source", "Target", "get_problem"]

PROBLEMS: Mapping[str, Callable[..., Problem]] = MappingProxyType(
    {
        "digits-autoencoder": digits_autoencoder,
        "curves-autoencoder": curves_autoencoder,
        "mnist-autoencoder": partial(image_autoencoder, "mnist-autoencoder", MNIST),
        "fashion-autoencoder": partial(image_autoencoder, "fashion-autoencoder", FASHION),
        "faces-autoencoder": faces_autoencoder,
        "mnist-cnn": partial(image_cnn, "mnist-cnn", MNIST),
        "fashion-cnn": partial(image_cnn, "fashion-cnn", FASHION),
        "fashion-mlp": fashion_mlp,
        "cifar10-resnet32": cifar10_resnet32,
        "cifar10-vgg16": partial(cifar_vgg16, 10),
        "cifar100-vgg16": partial(cifar_vgg16, 100),
        "svhn-vgg11": svhn_vgg11,
        **{name: partial(graph_network, name) for name in GRAPH_TASKS},
        "digits-classifier": digits_classifier,
        "digits-vae": digits_vae,
        "tabular-regression": tabular_regression,
        "char-lm": char_lm,
        "char-transformer": char_transformer,
        "logistic": logistic,
        "quadratic": quadratic,
        "poisson-2d": poisson_2d,
        "heat-1d": heat_1d,
        "poisson-5d": poisson_5d,
        "burgers-1d": burgers_1d,
        "sine-regression": sine_regression,
    }
)
"""Each problem's name and what makes it; the first is the default; its data come with the package."""


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
