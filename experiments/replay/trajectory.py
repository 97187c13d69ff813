"""Recorded trajectories: reading a file, its settings under whatever name they have, and the network it was run on.

A file holds a data set, mini-batches, initial weights and what an algorithm made of them, iteration by iteration. An
array ``NAME_l`` belongs to layer l.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ...errors import ArgumentError, UnknownNameError

__all__ = ["Settings", "Trajectory", "build_network", "is_input", "load_trajectory", "loss_of"]

_INPUTS = {"data", "labels", "batches", "warm_batches", "warm_targets", "fisher_targets", "warm_fisher_targets"}
_INITIAL = re.compile(r"[Wb]_init_\d+")

_ALIGNED = {
    "warm_targets": "warm_batches",
    "warm_fisher_targets": "warm_batches",
    "fisher_targets": "batches",
}
"""Sampled targets, row-aligned with mini-batches."""

_LOSSES: dict[str, type[Likelihood]] = {
    "logistic-regression-sum-loss": Bernoulli,
    "bernoulli": Bernoulli,
    "bce": Bernoulli,
    "bce-with-logits": Bernoulli,
    "linear-regression-half-mse": Gaussian,
    "gaussian": Gaussian,
    "half-mse": Gaussian,
    "multi-class-classification": Categorical,
    "categorical": Categorical,
    "cross-entropy": Categorical,
}

_OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "linear": nn.Identity,
    "identity": nn.Identity,
    "flatten": nn.Flatten,
    "maxpool2": lambda: nn.MaxPool2d(2, stride=2),
    "avgpool2": lambda: nn.AvgPool2d(2, stride=2),
}

_ALIASES: dict[str, tuple[str, ...]] = {
    "lr": ("lr", "learning_rate", "alpha"),
    "damping": ("lambda_damping", "damping_lambda", "damping", "lambda"),
    "weight_decay": ("weight_decay_tau", "weight_decay", "weight_decay_gamma", "tau", "gamma"),
    "momentum": ("momentum_rho", "momentum", "rho"),
    "statistics_decay": ("statistics_decay", "A_decay", "decay"),
    "pair_decay": ("s_y_decay", "pair_decay"),
    "pair_damping": ("pair_damping", "pairs"),
    "mu1": ("powell_alpha", "mu1"),
    "memory": ("memory", "p", "lbfgs_memory", "memory_p", "p_memory", "lbfgs_p", "num_pairs", "max_pairs"),
    "initial": ("H_g_initial", "H_initial", "initial"),
    "skip_threshold": ("skip_threshold", "skip_tolerance"),
    "statistics_every": ("T1_statistics", "statistics_every", "T1", "statistics_interval"),
    "inverses_every": ("T2_inverse", "inverse_every", "inverses_every", "T2", "inverse_interval"),
    "eager": ("inverse_always_until", "inverses_always_until", "always_invert_until", "eager"),
    "blocks": ("fc_blocks", "dense_blocks", "blocks"),
    "diagonal_momentum": ("diag_beta1",),
    "diagonal_decay": ("diag_beta2",),
    "diagonal_epsilon": ("diag_epsilon",),
    "input_damping": ("A_damping_epsilon",),
    "output_damping": ("lm_damping_epsilon", "G_damping_epsilon"),
}


def is_input(name: str) -> bool:
    """Whether an array of a file is given to the algorithm rather than made by it."""
    return name in _INPUTS or _INITIAL.fullmatch(name) is not None


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a file, each known under several names. Remembers which ones were asked for.

    Args:
        values: as the file has them.
        used: names of the file that have been read so far.
    """

    values: Mapping[str, Any]
    used: set[str] = field(default_factory=set)

    def get(self, name: str, default: Any = None) -> Any:
        """The setting, or the default.

        Raises:
            ArgumentError: if two of its names have different values.
        """
        found = {alias: self.values[alias] for alias in _ALIASES[name] if alias in self.values}
        self.used.update(found)
        if len({str(value) for value in found.values()}) > 1:
            raise ArgumentError(f"settings {found} contradict each other; keep one of them")
        return next(iter(found.values()), default)

    def number(self, name: str, default: float | None = None) -> float:
        """A setting that is a number.

        Raises:
            ArgumentError: if it is none, or missing without a default.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArgumentError(
                f"setting {name!r} must be a number, got {value!r}; meta['hyper'] may call it "
                f"{', '.join(_ALIASES[name])}"
            )
        return float(value)

    def count(self, name: str, default: int) -> int:
        """A setting that is an integer.

        Raises:
            ArgumentError: if it is none.
        """
        value = self.number(name, default)
        if value != int(value):
            raise ArgumentError(f"setting {name!r} must be an integer, got {value!r}")
        return int(value)

    @property
    def unused(self) -> list[str]:
        """Names of the file that nobody asked for."""
        return sorted(set(self.values) - self.used)


@dataclass(frozen=True)
class Trajectory:
    """One file.

    Args:
        meta: algorithm, loss, network, hyper-parameters.
        arrays: everything else, by name.
    """

    meta: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)

    @property
    def iterations(self) -> int:
        """T."""
        return len(self.arrays["batches"])

    @property
    def full_batch(self) -> bool:
        """Whether every iteration sees all N samples."""
        return bool(self.arrays["batches"].shape[1] == len(self.arrays["data"]))

    @property
    def warm_batches(self) -> NDArray[Any]:
        """(J, B) rows of the warm start; J = 0 where there is none."""
        return self.arrays.get("warm_batches", self.arrays["batches"][:0])

    def inputs(self, rows: NDArray[Any]) -> Tensor:
        """Samples of a mini-batch, float64."""
        return torch.tensor(self.arrays["data"][rows], dtype=torch.float64)

    def targets(self, rows: NDArray[Any]) -> Tensor:
        """Their targets: classes (N,) where the file has labels, else the samples themselves."""
        if "labels" in self.arrays:
            return torch.tensor(self.arrays["labels"][rows].astype(np.int64))
        return self.inputs(rows)

    def sampled(self, names: tuple[str, ...], index: int) -> Tensor | None:
        """Recorded sampled targets of one mini-batch from the first of these arrays, None without one."""
        for name in names:
            if name in self.arrays:
                kind = np.int64 if "labels" in self.arrays else np.float64
                return torch.tensor(self.arrays[name][index].astype(kind))
        return None


def load_trajectory(path: Path) -> Trajectory:
    """Read and check a file.

    Raises:
        ArgumentError: if it is missing, damaged, not of the format, or lacks an array that no replay can do without.
    """
    if path.is_dir():
        raise ArgumentError(f"{str(path)!r} is a folder; name the files in it, as in {path.name}/*.npz")
    if not path.is_file():
        raise ArgumentError(f"there is no file {str(path)!r}; give recorded trajectories (.npz)")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(str(arrays.pop("meta")))
    except KeyError:
        raise ArgumentError("the file has no array 'meta', so it is not a recorded trajectory") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, NotImplementedError, BadZipFile, zlib.error) as e:
        raise ArgumentError(f"the file cannot be read as .npz ({e}); it may be truncated: copy it again") from None
    if not isinstance(meta, dict):
        raise ArgumentError(f"'meta' must be a JSON object, got {type(meta).__name__}")
    _check(meta, arrays)
    return Trajectory(meta, arrays)


def _check(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    for name in ("algorithm", "loss", "hyper"):
        if name not in meta:
            raise ArgumentError(f"meta has no {name!r}; it has {', '.join(sorted(meta))}")
    if not isinstance(meta["hyper"], dict):
        raise ArgumentError(f"meta['hyper'] must be a table of settings, got {meta['hyper']!r}")
    for name in ("data", "batches"):
        if name not in arrays:
            raise ArgumentError(f"the file has no array {name!r}; it has {', '.join(sorted(arrays))}")
    samples = len(arrays["data"])
    for name in ("batches", "warm_batches"):
        rows = arrays.get(name, arrays["batches"])
        if rows.ndim != 2 or rows.dtype.kind not in "iu" or not rows.size or rows.min() < 0 or rows.max() >= samples:
            raise ArgumentError(f"{name!r} must be a table of row numbers of the {samples} samples in 'data'")
    for name, like in _ALIGNED.items():
        if name in arrays and arrays[name].shape[:2] != arrays.get(like, arrays["batches"][:0]).shape:
            raise ArgumentError(f"{name!r} of shape {arrays[name].shape} does not match the rows of {like!r}")
    made = any("_init_" in name and not is_input(name) for name in arrays)
    if meta.get("warm_start") and "warm_batches" not in arrays and not made:
        raise ArgumentError(
            "meta says warm_start, but the file has neither 'warm_batches' nor what the warm start made"
        )


def loss_of(trajectory: Trajectory) -> Likelihood:
    """The likelihood whose negative logarithm, averaged over the mini-batch, is the loss of the file.

    Raises:
        UnknownNameError: for an unknown loss.
        ArgumentError: for a loss over classes without labels.
    """
    name = re.sub(r"[^a-z0-9]+", "-", str(trajectory.meta["loss"]).lower())
    if name not in _LOSSES:
        raise UnknownNameError("loss", str(trajectory.meta["loss"]), _LOSSES)
    likelihood = _LOSSES[name]()
    if isinstance(likelihood, Categorical) != ("labels" in trajectory.arrays):
        raise ArgumentError(f"loss {trajectory.meta['loss']!r} and array 'labels' belong together: classes, or neither")
    return likelihood


def build_network(trajectory: Trajectory) -> tuple[nn.Sequential, list[nn.Module]]:
    """The network in float64 with the initial weights of the file.

    Returns:
        The model, and its modules with parameters: the l-th is layer l.

    Raises:
        ArgumentError: if a layer, an operation or an initial weight is missing or unknown.
    """
    images = trajectory.arrays["data"].ndim == 4
    modules: list[nn.Module] = []
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights from the global generator
        for index, entry in enumerate(_entries(trajectory)):
            layers.append(_layer(index, entry, images))
            modules.append(layers[-1].double())
            images = images and entry["type"] != "dense"
            for name in entry.get("then", ()):
                if name not in _OPERATIONS:
                    raise UnknownNameError("operation", str(name), _OPERATIONS)
                modules.append(_OPERATIONS[name]())
                images = images and name != "flatten"
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            key = f"{'W' if name == 'weight' else 'b'}_init_{index}"
            if key not in trajectory.arrays:
                raise ArgumentError(f"the file has no array {key!r}, the initial {name} of layer {index}")
            value = trajectory.arrays[key]
            if value.shape != tuple(parameter.shape):
                raise ArgumentError(f"{key!r} has shape {value.shape}, layer {index} needs {tuple(parameter.shape)}")
            parameter.data.copy_(torch.tensor(value, dtype=torch.float64))
    return nn.Sequential(*modules), layers


def _entries(trajectory: Trajectory) -> list[Mapping[str, Any]]:
    meta = trajectory.meta
    if "layers" in meta:
        return list(meta["layers"])
    sizes = meta.get("layer_sizes", meta.get("sizes"))
    if not sizes or "activations" not in meta:
        raise ArgumentError("meta describes no network: it needs 'layers', or 'layer_sizes' and 'activations'")
    if len(meta["activations"]) != len(sizes) - 1:
        raise ArgumentError(f"{len(sizes) - 1} layers need as many activations, got {meta['activations']!r}")
    shapes = zip(itertools.pairwise(sizes), meta["activations"], strict=True)
    return [
        {"type": "dense", "in": inputs, "out": outputs, "bias": f"b_init_{l}" in trajectory.arrays, "then": [then]}
        for l, ((inputs, outputs), then) in enumerate(shapes)
    ]


def _layer(index: int, entry: Mapping[str, Any], images: bool) -> nn.Module:
    try:
        if entry["type"] == "dense":
            return nn.Linear(entry["in"], entry["out"], entry.get("bias", True))
        if entry["type"] == "conv":
            stride, padding, bias = entry.get("stride", 1), entry.get("padding", 0), entry.get("bias", True)
            return nn.Conv2d(entry["in"], entry["out"], entry["kernel"], stride, padding, bias=bias)
        if entry["type"] == "batchnorm":
            kind = nn.BatchNorm2d if images else nn.BatchNorm1d
            return kind(entry["features"], eps=entry.get("eps", 1e-5))
    except KeyError as error:
        raise ArgumentError(f"layer {index} of meta['layers'] lacks {error}; it has {dict(entry)}") from None
    raise UnknownNameError("type of layer", str(entry["type"]), ("dense", "conv", "batchnorm"))
