"""What a problem is: a network, a loss and data under one name, and where the data come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...curvature.likelihoods import resolve_likelihood
from ...errors import ArgumentError, UnknownNameError
from ..data.augmentation import Augmentation
from ..data.datafiles import LabelledImages

__all__ = [
    "GENERATED_HERE",
    "PUBLISHED",
    "Data",
    "Problem",
    "Source",
    "Target",
    "held_out",
    "is_small",
    "labelled",
    "require_seed",
]

GENERATED_HERE = "generated here, none needed"
"""The licence of data that are."""


PUBLISHED: Mapping[str, Mapping[str, float | str]] = MappingProxyType(
    {
        "mbf": MappingProxyType({"units": "absolute", "limit": math.inf}),
        **dict.fromkeys(
            (
                "ekfac",
                "kbfgs",
                "kbfgs-conv",
                "kbfgs-l",
                "kfac",
                "kfac-conv",
                "mbf-released",
                "ngd-exact",
                "shampoo",
                "tnt",
            ),
            MappingProxyType({"limit": math.inf}),
        ),
    }
)
"""Options of methods in the form of their papers, for which a problem's settings may have been chosen; a run that was
saved before these options existed had that form."""


@dataclass(frozen=True)
class Data:
    """Training, test and perhaps validation samples; of an autoencoder the targets are the inputs, the same tensors.

    Args:
        train_inputs: (N, ...) values as float32 (points of equations as float64), pixels or tokens as integers.
        train_targets: (N, ...) values, or (N,) or (N, T) classes as int64.
        test_inputs: (M, ...).
        test_targets: like ``train_targets``.
        valid_inputs: (K, ...), none of them among the training samples; None where nothing is held out.
        valid_targets: like ``train_targets``; None where nothing is held out.
        context: what all samples have in common, such as the features and edges of a graph; given to the model's
            ``set_context`` before training.
        test_set: what the test samples are, where they are not the published test set.
        origin: what decides the data beside the problem and its options, such as a version and a checksum of what they
            were made of; a run's configuration has it.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    valid_inputs: Tensor | None = None
    valid_targets: Tensor | None = None
    context: tuple[Tensor, ...] = ()
    test_set: str = "test set"
    origin: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Source:
    """Where data come from.

    Args:
        title: of the data set.
        licence: the publishers' terms in a few words.
        citation: authors, title, year.
        address: web page; empty for generated data.
    """

    title: str
    licence: str
    citation: str
    address: str = ""


@dataclass(frozen=True)
class Target:
    """What counts as solved: the first evaluation at which ``metric`` is as good as ``value``.

    Args:
        metric: a name in ``metrics.jsonl``; accuracies are to be reached from below, all else from above.
        value: to be reached.
    """

    metric: str
    value: float

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether a line of metrics is as good; one without the metric is not."""
        found = metrics.get(self.metric)
        if found is None:
            return False
        return found >= self.value if self.metric.endswith("accuracy") else found <= self.value


@dataclass(frozen=True)
class Problem:
    """Something to train.

    Args:
        name: under which it is found.
        summary: data, network and loss in one line.
        likelihood: of which the loss is the negative logarithm, a mean over samples; None where the loss is that of
            residuals with derivatives of the network.
        epochs: passes over the training data that show most of what there is to see.
        build_model: returns the network for a seed, on the CPU; the global random state stays as it was.
        load: returns the data; its argument is a folder that may hold the files, or None.
        source: of the data.
        batch_size: samples in a mini-batch, unless a run says otherwise; None is all of them.
        classes: number of classes; None where the targets are values.
        target: what counts as solved; None where nothing is agreed on.
        augmentation: changes every training mini-batch at random.
        undecayed: patterns of names of parameters that weight decay leaves alone.
        settings: for some methods lr, damping, weight decay or keywords that suit the problem better than the method's
            defaults, chosen on the validation samples; used where a run names none.
        optimum: the least training loss, where it is known.
        floor: what no training loss gets below, such as the entropy of the targets, where it is known and not 0.
        landmarks: losses by name that a reader wants to see beside the curves, such as that of the mean image.
        objective: the loss of output and target, a mean over samples, where it is more than that of the likelihood; the
            likelihood then reads ``logits`` of what the network returns.
        interval: epochs from one evaluation to the next, >= 1: more than one where an epoch is a single cheap step.
        relative_error: whether the test samples also tell the relative error in L2, the metric ``relative_l2``.
    """

    name: str
    summary: str
    likelihood: Literal["bernoulli", "gaussian", "categorical"] | None
    epochs: int
    build_model: Callable[[int], nn.Module]
    load: Callable[[Path | None], Data]
    source: Source
    batch_size: int | None = None
    classes: int | None = None
    target: Target | None = None
    augmentation: Augmentation | None = None
    undecayed: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, float | str]] = field(default_factory=lambda: MappingProxyType({}))
    optimum: Callable[[Data], float] | None = None
    floor: float | None = None
    landmarks: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    objective: Callable[[Any, Tensor], Tensor] | None = None
    interval: int = 1
    relative_error: bool = False

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """Negative log-likelihood in nats, summed over pixels or tokens, mean over samples, or the objective, shape ().

        Args:
            output: (N, ...) of the network, or whatever the objective takes.
            target: see ``Data``.
        """
        if self.objective is not None:
            return self.objective(output, target)
        likelihood = resolve_likelihood(self.likelihood)
        assert likelihood is not None
        return likelihood.negative_log_likelihood(output, target) / len(output)


def is_small(size: str) -> bool:
    """Return whether a size is ``small``.

    Raises:
        UnknownNameError: it is neither ``full`` nor ``small``.
    """
    if size not in ("full", "small"):
        raise UnknownNameError("size", str(size), ("full", "small"))
    return size == "small"


def require_seed(data_seed: int) -> None:
    """Check a seed of generated data.

    Raises:
        ArgumentError: it is no integer >= 0.
    """
    if not isinstance(data_seed, int) or data_seed < 0:
        raise ArgumentError(f"data_seed must be an integer >= 0, got {data_seed!r}")


def held_out(data: Data, validation: int) -> Data:
    """Return the data with the last ``validation`` training samples as validation samples.

    Args:
        data: without validation samples.
        validation: how many, in [0, N).

    Raises:
        ArgumentError: ``validation`` is out of range.
    """
    samples = len(data.train_inputs)
    if not isinstance(validation, int) or not 0 <= validation < samples:
        raise ArgumentError(f"validation must be an integer >= 0 and below the {samples} samples, got {validation!r}")
    if not validation:
        return data
    cut = samples - validation
    return replace(
        data,
        train_inputs=data.train_inputs[:cut],
        train_targets=data.train_targets[:cut],
        valid_inputs=data.train_inputs[cut:],
        valid_targets=data.train_targets[cut:],
    )


def labelled(
    images: LabelledImages, train: int | None, test: int | None, convert: Callable[[NDArray[np.uint8]], Tensor]
) -> Data:
    """Return images as inputs and their classes as targets.

    Args:
        images: as read.
        train: how many training images, the first ones; None is all.
        test: how many test images.
        convert: makes inputs of images.
    """
    tested = images.test_labels[:test]
    part = len(tested) < len(images.test_labels) and images.test_set != "test set"
    return Data(
        convert(images.train_images[:train]),
        torch.from_numpy(images.train_labels[:train].astype(np.int64)),
        convert(images.test_images[:test]),
        torch.from_numpy(tested.astype(np.int64)),
        test_set=f"first {len(tested)} of {images.test_set}" if part else images.test_set,
    )
