"""T8: the Kronecker factors of a convolution; with one position a convolution is a dense layer (PAPERS 1.6)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...curvature.estimators import EmpiricalFisher
from ...curvature.records.needs import Record
from ...curvature.records.statistics import LayerStatistics
from ...framework.optimizer.build import build
from ...preconditioners.factors.factor import Covariance, CovarianceState
from ..theorem import Evidence, Inequality, Setting, Theorem, agreement
from .instances import Draws, network
from .measured import flat_parameters, statistics

__all__ = ["THEOREMS"]

_SAMPLES = 5
_RECORD = Record.INPUTS | Record.GRADIENTS | Record.MEANS
_BOUND = 1e-10


def _squares(target: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean over samples of half the squared error, smooth and not quadratic through the tanh."""
    return lambda output: 0.5 * (output.flatten(1).tanh() - target).square().sum() / len(output)


def _patches(conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    """(N, T, I |Delta| [+ 1]) patches a_t, cut out one position after the other."""
    height, width = int(conv.kernel_size[0]), int(conv.kernel_size[1])
    down, right = int(conv.stride[0]), int(conv.stride[1])
    vertical, horizontal = int(conv.padding[0]), int(conv.padding[1])
    padded = functional.pad(inputs, (horizontal, horizontal, vertical, vertical))
    rows = (padded.shape[2] - height) // down + 1
    columns = (padded.shape[3] - width) // right + 1
    found = [
        padded[:, :, i * down : i * down + height, j * right : j * right + width].flatten(1)
        for i in range(rows)
        for j in range(columns)
    ]
    stacked = torch.stack(found, 1)
    return torch.cat([stacked, torch.ones_like(stacked[..., :1])], 2) if conv.bias is not None else stacked


def _moment(entry: LayerStatistics) -> Tensor:
    """A as the library's factor averages it."""
    factor, size = Covariance(), entry.layer.matrix_shape[1]
    like = entry.layer.parameters["weight"].detach()
    state: CovarianceState = factor.init(size, like)
    factor.update(state, entry, "inputs", None)
    return state.second_moment


def _one_convolution(draws: Draws, conv: nn.Conv2d, averaged: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs (library, formula) for one convolution followed by a tanh."""
    model, inputs = network(draws, conv), draws.normal(_SAMPLES, conv.in_channels, 5, 4)
    target = draws.normal(*model(inputs).flatten(1).shape)
    layers, found = statistics(model, inputs, _squares(target), _RECORD)
    entry = EmpiricalFisher().fill(found[layers[0].name])
    patches, vector = _patches(conv, inputs), draws.normal(entry.layer.matrix_shape[1])
    positions = patches.shape[1]
    action = torch.einsum("nti,nt->i", patches, patches @ vector) / _SAMPLES / (positions if averaged else 1)
    output = model(inputs).detach().requires_grad_()
    (slope,) = torch.autograd.grad(_squares(target)(output) * _SAMPLES, output)
    rows = slope.flatten(2).mT  # (N, T, O): gradients of each sample's own loss
    matrix = torch.einsum("nto,nti->oi", rows, patches) / _SAMPLES
    gradients = [parameter.grad for parameter in entry.layer.parameters.values()]
    joint = entry.layer.joint_matrix([value for value in gradients if value is not None])
    assert entry.mean_preactivation is not None and entry.mean_gradient is not None
    outer = torch.einsum("nto,ntp->op", rows, rows) / (_SAMPLES * positions)
    return {
        "A v = mean_i sum_t a_t (a_t' v)": (_moment(entry) @ vector, action),
        "mean input over samples and positions": (entry.mean_input(), patches.mean((0, 1))),
        "DW = mean_i sum_t g_t a_t'": (joint, matrix),
        "mean of h over samples and positions": (entry.mean_preactivation, output.detach().mean((0, 2, 3))),
        "mean of g over samples and positions": (entry.mean_gradient, rows.mean((0, 1))),
        "G = mean of g g' over samples and positions": (entry.kronecker_factors()[1], outer),
    }


def _twins(draws: Draws, kernel: int, bias: bool) -> tuple[nn.Sequential, nn.Sequential, Tensor, Tensor]:
    """A convolution whose kernel is the whole image and the dense layer with the same numbers; inputs and targets."""
    conv = network(draws, nn.Conv2d(3, 4, kernel, bias=bias), nn.Flatten())
    dense = network(draws, nn.Flatten(), nn.Linear(3 * kernel**2, 4, bias=bias))
    with torch.no_grad():
        for one, other in zip(dense.parameters(), conv.parameters(), strict=True):
            one.copy_(other.reshape(one.shape))
    return conv, dense, draws.normal(_SAMPLES, 3, kernel, kernel), draws.normal(_SAMPLES, 4)


def _trained(model: nn.Sequential, inputs: Tensor, target: Tensor, method: str) -> Tensor:
    """Parameters after three steps of a registered method."""
    optimizer = build(method, model, lr=0.1, damping=0.3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _squares(target)(model(inputs))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return flat_parameters(model)


def _reduction(draws: Draws, kernel: int, bias: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """One position: everything equals the dense layer's, statistics and trained parameters alike."""
    conv, dense, inputs, target = _twins(draws, kernel, bias)
    both = []
    for model in (conv, dense):
        layers, found = statistics(model, inputs, _squares(target), _RECORD)
        both.append(EmpiricalFisher().fill(found[layers[0].name]))
    first, second = both
    pairs = {"A": (_moment(first), _moment(second)), "mean input": (first.mean_input(), second.mean_input())}
    pairs["G"] = (first.kronecker_factors()[1], second.kronecker_factors()[1])
    for name in ("mean_preactivation", "mean_gradient"):
        pairs[name] = (getattr(first, name), getattr(second, name))
    for method in ("kbfgs", "kbfgs-l"):
        trained = [_trained(model, inputs, target, method) for model in (conv, dense)]
        pairs[f"three steps of {method}"] = (trained[0], trained[1])
    return pairs


def _check(setting: Setting, averaged: bool = False) -> Evidence:
    """Convolutions with padding, stride and without a bias; and the dense limit.

    Args:
        setting: seed and device.
        averaged: A is compared with the mean over positions instead of the sum: a control.
    """
    draws = Draws(setting, 800)
    shapes = [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(2, 3, (3, 2), stride=2, bias=False),
        nn.Conv2d(1, 4, 2, stride=(1, 2), padding=(0, 1)),
    ]
    found: dict[str, list[Inequality]] = {}
    for conv in shapes:
        for name, (value, expected) in _one_convolution(draws, conv, averaged).items():
            found.setdefault(name, []).append(agreement(name, value[None], expected[None], _BOUND))
    for size, bias in ((1, True), (1, False), (3, True)):
        for name, (value, expected) in _reduction(draws, size, bias).items():
            label = f"one position: {name}, convolution = dense"
            found.setdefault(label, []).append(agreement(label, value[None], expected[None], _BOUND))
    return Evidence(tuple(max(entries, key=lambda entry: entry.measured) for entries in found.values()))


THEOREMS = (
    Theorem(
        "T8",
        "The factors of a convolution are the sum over positions at the inputs and the mean at the outputs; with one "
        "position a convolution is a dense layer, to the trained parameters.",
        r"A v = \frac{1}{m} \sum_i \sum_t a_t (a_t^T v), \quad (s, y) = mean_{i,t}(h^+ - h, g^+ - g)",
        "arXiv:2102.06737 (K-BFGS for convolutions); docs/PAPERS.md 1.6",
        _check,
        partial(_check, averaged=True),
        "A is averaged over positions instead of summed: the wrong layer scaling",
    ),
)
