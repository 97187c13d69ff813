"""The small networks of the recorded trajectories: forward, backward, and what every layer saw.

torch's autograd supplies the gradients, nothing else of torch is used. Numbers go in and out as numpy float64.

Notation (that of the recorded files): per layer, h = input, a = W h + b = pre-activation, g = per-sample gradient of
the UNAVERAGED loss with respect to a. A convolution is a dense layer applied to patches: h has one row per output
position t.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Array = NDArray[np.float64]
Parameters = list[dict[str, Array]]  # per layer {"W": ..., "b": ...}; "b" is absent without a bias

BERNOULLI = "logistic-regression-sum-loss"
GAUSSIAN = "linear-regression-half-MSE"
CATEGORICAL = "multi-class classification"


@dataclass(frozen=True)
class Layer:
    """One layer with parameters and the parameterless operations that follow it."""

    kind: str  # "dense", "conv" or "batchnorm"
    bias: bool
    then: tuple[str, ...]
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    eps: float = 0.0


@dataclass(frozen=True)
class LayerRecord:
    """What one layer saw: B samples, T positions (T = 1 for a dense layer)."""

    h: Array  # (B, T, in); a patch per position for a convolution; batch normalisation: the normalised input
    a: Array  # (B, T, out)
    g: Array  # (B, T, out)
    bias: bool

    def homogeneous(self) -> Array:
        """h~ = [h; 1], the 1 last and only where the layer has a bias, shape (B, T, in + bias)."""
        return np.concatenate([self.h, np.ones((*self.h.shape[:2], 1))], axis=2) if self.bias else self.h


@dataclass(frozen=True)
class Evaluation:
    """One forward and backward pass over a mini-batch."""

    loss: float  # mean over the batch, without weight decay
    outputs: Array  # (B, C)
    records: list[LayerRecord]
    gradients: Parameters  # of the batch-MEAN loss
    relu_margin: float  # smallest |a| in front of a relu: how far the batch is from a kink


@dataclass(frozen=True)
class Batch:
    """A network's architecture and loss with one mini-batch: everything but the parameters."""

    layers: Sequence[Layer]
    loss: str
    x: NDArray[Any]
    targets: NDArray[Any]

    def evaluate(self, parameters: Parameters) -> Evaluation:
        """Forward and backward at the given parameters."""
        return evaluate(self.layers, parameters, self.loss, self.x, self.targets)

    def resampled(self, targets: NDArray[Any]) -> "Batch":
        """The same inputs with other targets."""
        return replace(self, targets=targets)


def layers_of(meta: Mapping[str, Any]) -> list[Layer]:
    """The layers described by a trajectory's metadata (`layer_sizes` and `activations`, or `layers`)."""
    if "layers" not in meta:
        return [Layer("dense", True, () if name == "linear" else (name,)) for name in meta["activations"]]
    layers = []
    for entry in meta["layers"]:
        numbers = {key: entry[key] for key in ("kernel", "stride", "padding", "eps") if key in entry}
        layers.append(Layer(entry["type"], entry.get("bias", True), tuple(entry["then"]), **numbers))
    return layers


def layers_with_matrices(meta: Mapping[str, Any]) -> list[Layer]:
    """`layers_of`, for algorithms that need every layer to multiply by a matrix."""
    layers = layers_of(meta)
    if any(layer.kind == "batchnorm" for layer in layers):
        raise ValueError(f"{meta['algorithm']} is not transcribed for batch normalisation")
    return layers


def initial_parameters(arrays: Mapping[str, NDArray[Any]], count: int) -> Parameters:
    """W_init_l and b_init_l of a trajectory, copied."""
    return [
        {name: np.array(arrays[f"{name}_init_{l}"]) for name in ("W", "b") if f"{name}_init_{l}" in arrays}
        for l in range(count)
    ]


def as_matrix(entry: Mapping[str, Array]) -> Array:
    """[W | b] with the bias as last column; a kernel is flattened to (out, in k k)."""
    weight = entry["W"].reshape(len(entry["W"]), -1)
    return np.concatenate([weight, entry["b"][:, None]], axis=1) if "b" in entry else weight


def from_matrix(matrix: Array, like: Mapping[str, Array]) -> dict[str, Array]:
    """Undo `as_matrix`."""
    if "b" not in like:
        return {"W": matrix.reshape(like["W"].shape)}
    return {"W": matrix[:, :-1].reshape(like["W"].shape), "b": matrix[:, -1]}


def targets_of(loss: str, arrays: Mapping[str, NDArray[Any]], rows: NDArray[Any]) -> NDArray[Any]:
    """The true targets of a mini-batch: the inputs themselves, or the classes."""
    return np.asarray(arrays["labels"][rows] if loss == CATEGORICAL else arrays["data"][rows])


def loss_per_sample(loss: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of each sample, summed over its outputs, shape (B,)."""
    if loss == BERNOULLI:  # -log Bernoulli(target; sigmoid(z)) = softplus(z) - target z
        return (functional.softplus(outputs) - targets * outputs).sum(1)
    if loss == GAUSSIAN:
        return 0.5 * ((outputs - targets) ** 2).sum(1)
    if loss == CATEGORICAL:
        return functional.cross_entropy(outputs, targets.long(), reduction="none")
    raise ValueError(f"unknown loss {loss!r}; known: {BERNOULLI!r}, {GAUSSIAN!r}, {CATEGORICAL!r}")


def sample_targets(loss: str, outputs: Array, generator: np.random.Generator) -> NDArray[Any]:
    """One draw per example from the model's own predictive distribution."""
    if loss == BERNOULLI:
        return (generator.random(outputs.shape) < 1.0 / (1.0 + np.exp(-outputs))).astype(np.uint8)
    if loss == GAUSSIAN:
        return outputs + generator.standard_normal(outputs.shape)
    probabilities = np.exp(outputs - outputs.max(1, keepdims=True))
    cumulative = np.cumsum(probabilities / probabilities.sum(1, keepdims=True), axis=1)
    return (generator.random((len(outputs), 1)) > cumulative).sum(1).astype(np.uint8)


def _apply(layer: Layer, weight: Tensor, bias: Tensor | None, h: Tensor) -> Tensor:
    """One layer's pre-activation."""
    if layer.kind == "dense":
        return functional.linear(h, weight, bias)
    if layer.kind == "conv":
        return functional.conv2d(h, weight, bias, stride=layer.stride, padding=layer.padding)
    if layer.kind == "batchnorm":  # batch statistics (training mode); running averages play no part
        return functional.batch_norm(h, None, None, weight, bias, training=True, eps=layer.eps)
    raise ValueError(f"unknown layer type {layer.kind!r}")


def _operate(name: str, x: Tensor) -> Tensor:
    """One parameterless operation."""
    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "maxpool2": lambda y: functional.max_pool2d(y, 2, stride=2),
        "flatten": lambda y: y.flatten(1),
    }
    return operations[name](x)


def forward(
    layers: Sequence[Layer], parameters: Sequence[Mapping[str, Tensor]], x: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs, and per layer its input and its pre-activation."""
    inputs, preactivations = [], []
    for layer, entry in zip(layers, parameters, strict=True):
        inputs.append(x)
        x = _apply(layer, entry["W"], entry.get("b"), x)
        preactivations.append(x)
        for name in layer.then:
            x = _operate(name, x)
    return x, inputs, preactivations


def _rows(layer: Layer, h: Tensor) -> Array:
    """A layer's input as (B, T, in): the vectors that its matrix W multiplies."""
    if layer.kind == "dense":
        return h.detach().numpy()[:, None, :]
    if layer.kind == "conv":
        return functional.unfold(h.detach(), layer.kernel, 1, layer.padding, layer.stride).transpose(1, 2).numpy()
    normalised = functional.batch_norm(h.detach(), None, None, training=True, eps=layer.eps)
    return _positions(normalised)


def _positions(x: Tensor) -> Array:
    """Pre-activations or their gradients as (B, T, out)."""
    x = x.detach()
    return (x[:, None, :] if x.dim() == 2 else x.flatten(2).transpose(1, 2)).numpy()


def evaluate(
    layers: Sequence[Layer], parameters: Parameters, loss: str, x: NDArray[Any], targets: NDArray[Any]
) -> Evaluation:
    """Forward and backward over one mini-batch (rows of `x`, row-aligned `targets`)."""
    leaves = [{k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in e.items()} for e in parameters]
    outputs, inputs, preactivations = forward(layers, leaves, torch.tensor(x, dtype=torch.float64))
    mean_loss = loss_per_sample(loss, outputs, torch.tensor(targets, dtype=torch.float64)).mean()
    flat = [leaf for entry in leaves for leaf in entry.values()]
    gradients = iter(torch.autograd.grad(mean_loss, [*flat, *preactivations]))
    named = [{k: next(gradients).numpy() for k in entry} for entry in leaves]
    records = [
        # the gradient of the batch-MEAN loss is 1/B of the gradient of the sample's own loss
        LayerRecord(_rows(layer, h), _positions(a), len(x) * _positions(next(gradients)), "b" in entry)
        for layer, entry, h, a in zip(layers, leaves, inputs, preactivations, strict=True)
    ]
    kinks = [
        float(a.detach().abs().min()) for layer, a in zip(layers, preactivations, strict=True) if "relu" in layer.then
    ]
    return Evaluation(float(mean_loss.detach()), outputs.detach().numpy(), records, named, min(kinks, default=np.inf))
