"""Least-squares models whose outputs and Jacobians are available unit by unit, so that no width is too large.

Every model is a sum over units: hidden neurons, output channels, or blocks of a linear model. Parameters are one tensor
theta (units, inputs, kernel), and whatever is asked of a model is asked for a range of units, one chunk at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ArgumentError, require_positive_integer

__all__ = ["LinearModel", "TwoLayerTanh", "UnitModel", "convolutional_tanh", "dense_tanh"]


class UnitModel(Protocol):
    """A model u(theta) in R^n with loss |u - y|^2 / (2 n), linear or not, written as a sum over units.

    Attributes:
        initial: theta_0, (units, inputs, kernel); kernel is 1 but for convolutions.
        targets: y, (n,).
        positions: T >= 1, places where a unit's weights are applied.
    """

    @property
    def initial(self) -> Tensor:
        """theta_0, (units, inputs, kernel)."""

    @property
    def targets(self) -> Tensor:
        """y, (n,)."""

    @property
    def positions(self) -> int:
        """T."""

    def part(self, weights: Tensor, low: int) -> Tensor:
        """Contribution (n,) of the units ``low``, ..., whose weights (chunk, inputs, kernel) are given."""

    def jacobian(self, weights: Tensor, low: int) -> Tensor:
        """Derivative of u along those weights, (n, chunk, inputs, kernel)."""


@dataclass(frozen=True)
class LinearModel:
    """u = sum over blocks b of J_b theta_b, theta_0 = 0: the model in which the theory is exact.

    Args:
        features: (n, blocks, size), the Jacobian.
        targets: y, (n,).
    """

    features: Tensor
    targets: Tensor
    positions = 1

    @property
    def initial(self) -> Tensor:
        """Zero."""
        return self.features.new_zeros(*self.features.shape[1:], 1)

    def part(self, weights: Tensor, low: int) -> Tensor:
        """J theta over some blocks."""
        chosen = self.features[:, low : low + weights.shape[0]]
        return chosen.flatten(1) @ weights.flatten()

    def jacobian(self, weights: Tensor, low: int) -> Tensor:
        """The features."""
        return self.features[:, low : low + weights.shape[0]].unsqueeze(3)


@dataclass(frozen=True)
class TwoLayerTanh:
    """u(x) = (m T)^{-1/2} sum_j a_j sum_t tanh(<W_j, x_t>); the signs a stay fixed, W is trained.

    The set-up of arXiv:1905.10961 (section 4, there with ReLU, which has no stable Jacobian at the kink); T = 1 is a
    dense layer, T > 1 a convolution whose positions are summed.

    Args:
        patches: (n, T, inputs, kernel): what one unit meets.
        signs: a, (m,), each 1 or -1.
        initial: W_0, (m, inputs, kernel).
        targets: y, (n,).
    """

    patches: Tensor
    signs: Tensor
    initial: Tensor
    targets: Tensor
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", 1.0 / math.sqrt(self.signs.shape[0] * self.patches.shape[1]))

    @property
    def positions(self) -> int:
        """T."""
        return self.patches.shape[1]

    def part(self, weights: Tensor, low: int) -> Tensor:
        """Sum over some hidden units."""
        hidden = self._preactivations(weights).tanh().sum(1)
        return hidden @ self.signs[low : low + weights.shape[0]] * self.scale

    def jacobian(self, weights: Tensor, low: int) -> Tensor:
        """sum_t g(x_t) x_t' with g the gradients at the pre-activations."""
        return torch.einsum("ntj,ntik->njik", self.output_gradients(weights, low), self.patches)

    def output_gradients(self, weights: Tensor, low: int) -> Tensor:
        """Derivatives of u at the pre-activations of some units, (n, T, chunk)."""
        slope = 1.0 - self._preactivations(weights).tanh().square()
        return slope * (self.signs[low : low + weights.shape[0]] * self.scale)

    def _preactivations(self, weights: Tensor) -> Tensor:
        return self.patches.flatten(2) @ weights.flatten(1).T


def _signs(width: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, (width,), generator=generator).double() - 1.0


def dense_tanh(
    samples: int, inputs: int, width: int, generator: torch.Generator, device: str | torch.device = "cpu"
) -> TwoLayerTanh:
    """A dense two-layer net on unit-length inputs with N(0, 1) targets and N(0, 1) weights.

    Args:
        samples: n >= 1.
        inputs: d >= 1.
        width: m >= 1 hidden neurons.
        generator: of everything drawn, on the CPU: the data come first, so that every width sees the same.
        device: where to compute, in float64.
    """
    for name, value in (("samples", samples), ("inputs", inputs), ("width", width)):
        require_positive_integer(name, value)
    points = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    points = points / points.norm(dim=1, keepdim=True) * math.sqrt(inputs)
    targets = torch.randn(samples, generator=generator, dtype=torch.float64)
    weights = torch.randn(width, inputs, 1, generator=generator, dtype=torch.float64) / math.sqrt(inputs)
    signs = _signs(width, generator)
    return TwoLayerTanh(points[:, None, :, None].to(device), signs.to(device), weights.to(device), targets.to(device))


def convolutional_tanh(
    samples: int,
    image: tuple[int, int, int],
    width: int,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
) -> TwoLayerTanh:
    """A convolution with 3 x 3 kernels, tanh, and a fixed sum over channels and positions.

    Args:
        samples: n >= 1.
        image: (channels, height, width) of the inputs, no side below 3; there is no padding.
        width: m >= 1 output channels.
        generator: of everything drawn, on the CPU.
        device: where to compute, in float64.

    Raises:
        ArgumentError: for an image that has no room for a kernel.
    """
    for name, value in (("samples", samples), ("width", width), ("channels", image[0])):
        require_positive_integer(name, value)
    if min(image[1:]) < 3:
        raise ArgumentError(f"images must be at least 3 x 3 for kernels of 3 x 3, got {image[1]} x {image[2]}")
    pixels = torch.randn(samples, *image, generator=generator, dtype=torch.float64)
    patches = functional.unfold(pixels, 3).transpose(1, 2).unflatten(2, (image[0], 9))
    targets = torch.randn(samples, generator=generator, dtype=torch.float64)
    weights = torch.randn(width, image[0], 9, generator=generator, dtype=torch.float64) / math.sqrt(9 * image[0])
    signs = _signs(width, generator)
    return TwoLayerTanh(patches.to(device), signs.to(device), weights.to(device), targets.to(device))
