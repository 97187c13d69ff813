"""Derivatives of a network by its input, carried forward through the layers.

Every layer takes the value and the derivatives at once, as channels that share its weight (forward-mode Taylor
propagation; the Laplacian alone: forward Laplacian, arXiv:2307.08214). Half the work of differentiating backward twice,
and all that a weight does is multiply channels: what Kronecker factors are made of (arXiv:2405.15603).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ArgumentError, CompatibilityError

__all__ = ["Derivatives", "derivatives"]


@dataclass(frozen=True)
class Derivatives:
    """A network and its derivatives at N points, for d inputs and C outputs.

    Attributes:
        value: (N, C).
        first: (N, d, C), by each input.
        second: (N, K, C), twice by each of the chosen inputs, in their order; K = 0 if none was chosen.
        laplacian: (N, C), sum of the second derivatives by all inputs; ``None`` unless it was asked for.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    laplacian: Tensor | None = None


def derivatives(
    model: nn.Module, points: Tensor, *, second: Sequence[int] = (), laplacian: bool = False
) -> Derivatives:
    """A network with its first, and on request second, derivatives by its input.

    Args:
        model: ``nn.Sequential`` (nested ones too) of ``nn.Linear`` and of functions that work entry by entry.
        points: (N, d).
        second: inputs by which it is differentiated twice.
        laplacian: whether the sum of all second derivatives is wanted; one channel, whatever d.

    Raises:
        CompatibilityError: if a module has no rule for channels, naming it and the way out.
        ArgumentError: for points that are no (N, d) matrix, or inputs that do not exist.

    Example:
        >>> import torch, osculate as osc
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> osc.derivatives(net, torch.rand(5, 2), laplacian=True).laplacian.shape
        torch.Size([5, 1])
    """
    if points.ndim != 2:
        raise ArgumentError(f"points must be a matrix (N, d), got shape {tuple(points.shape)}")
    inputs = points.shape[1]
    wrong = [entry for entry in second if not 0 <= entry < inputs]
    if wrong:
        raise ArgumentError(f"second={list(second)} names inputs {wrong}, and the points have inputs 0 to {inputs - 1}")
    first = torch.eye(inputs, dtype=points.dtype, device=points.device).expand(len(points), -1, -1)
    channels = _Channels(points, first, points.new_zeros(len(points), len(second) + laplacian, inputs))
    found = _through(model, channels, list(second), laplacian, type(model).__name__)
    chosen = len(second)
    return Derivatives(
        found.value, found.first, found.second[:, :chosen], found.second[:, chosen] if laplacian else None
    )


@dataclass(frozen=True)
class _Channels:
    """Value (N, width), first derivatives (N, d, width), second derivatives (N, K [+ 1], width), the Laplacian last."""

    value: Tensor
    first: Tensor
    second: Tensor


def _through(module: nn.Module, channels: _Channels, second: list[int], laplacian: bool, name: str) -> _Channels:
    if type(module).forward is nn.Sequential.forward and isinstance(module, nn.Sequential):
        for key, child in module.named_children():
            channels = _through(child, channels, second, laplacian, f"{name}.{key}")
        return channels
    if isinstance(module, nn.Identity):
        return channels
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        value = functional.linear(channels.value, module.weight, module.bias)
        width = channels.first.shape[1]
        moved = functional.linear(torch.cat([channels.first, channels.second], 1), module.weight)
        return _Channels(value, moved[:, :width], moved[:, width:])
    if next(module.parameters(), None) is None and _is_elementwise(module, channels.value):
        return _entry_by_entry(module, channels, second, laplacian)
    raise CompatibilityError(
        f"{name} ({type(module).__name__}) has no rule for derivatives by the input: osculate.derivatives reads "
        "nn.Sequential of nn.Linear and functions that work entry by entry. Differentiate by torch.autograd.grad with "
        "create_graph=True instead; structures of whole gradients (build('lm'), Dense(), MiniBlock(), Diagonal()) take "
        "that"
    )


def _is_elementwise(module: nn.Module, like: Tensor) -> bool:
    """Whether an entry of the output depends on that entry of the input alone; tried on three entries."""
    with torch.no_grad():
        probe = torch.tensor([[0.3, -0.7, 1.1]], dtype=like.dtype, device=like.device)
        output = module(probe)
        if not isinstance(output, Tensor) or output.shape != probe.shape:
            return False
        for entry in range(3):
            changed = probe.clone()
            changed[0, entry] += 0.5
            others = torch.arange(3, device=like.device) != entry
            if not torch.equal(module(changed)[0, others], output[0, others]):
                return False
    return True


def _entry_by_entry(module: nn.Module, channels: _Channels, second: list[int], laplacian: bool) -> _Channels:
    value, slope, curvature = _SLOPES.get(type(module), _differentiated)(module, channels.value)
    squares = channels.first.square()
    bent = [squares[:, second]] + ([squares.sum(1, keepdim=True)] if laplacian else [])
    slope, curvature = slope.unsqueeze(1), curvature.unsqueeze(1)
    return _Channels(value, slope * channels.first, curvature * torch.cat(bent, 1) + slope * channels.second)


def _of_tanh(module: nn.Module, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.tanh(value)
    slope = 1.0 - found * found
    return found, slope, -2.0 * found * slope


def _of_sigmoid(module: nn.Module, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.sigmoid(value)
    slope = found * (1.0 - found)
    return found, slope, slope * (1.0 - 2.0 * found)


def _differentiated(module: nn.Module, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and two derivatives of any function, by autograd."""
    with torch.enable_grad():
        given = value if value.requires_grad else value.detach().requires_grad_()
        found = module(given)
        (slope,) = torch.autograd.grad(found.sum(), given, create_graph=True)
        if not slope.requires_grad:  # piecewise linear
            return found, slope, torch.zeros_like(slope)
        (curvature,) = torch.autograd.grad(slope.sum(), given, create_graph=True, allow_unused=True)
    return found, slope, torch.zeros_like(slope) if curvature is None else curvature


_SLOPES: dict[type, Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    nn.Tanh: _of_tanh,
    nn.Sigmoid: _of_sigmoid,
}
