"""The networks of the papers for 32 x 32 colour images: a residual network and two of the VGG family.

They take bytes and standardise them with the published means and deviations of their set.

Source: PAPERS 4.1: K. He et al., arXiv:1512.03385v1, section 4.2 (the network for CIFAR-10, shortcuts of kind A);
K. Simonyan and A. Zisserman, arXiv:1409.1556v6, table 1 (A and D), with the heads of the papers' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["VGG11", "VGG16", "Standardise", "residual_network", "vgg"]

VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
"""Channels of the convolutions; a max-pooling ends each group."""
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions; a max-pooling ends each group."""


class Standardise(nn.Module):
    """Bytes (N, 3, H, W) to numbers of about mean 0 and variance 1 per channel.

    Args:
        mean: per channel, of pixels in [0, 1].
        deviation: per channel, > 0.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Standardised values in the dtype of the mean."""
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.deviation


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm beside a shortcut without parameters.

    Where the width changes, the shortcut takes every second pixel and adds channels of zeros on both sides.

    Args:
        inputs: channels that come in.
        outputs: channels that go out, ``inputs`` or 2 ``inputs``.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.margin = (outputs - inputs) // 2
        self.first = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)

    def forward(self, values: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        found = self.second_norm(self.second(self.first_norm(self.first(values)).relu()))
        shortcut = functional.pad(values[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.margin, self.margin))
        result: Tensor = (found + shortcut).relu()
        return result


def residual_network(standardise: Standardise, classes: int, blocks: int = 5, width: int = 16) -> nn.Sequential:
    """Return the residual network with 6 ``blocks`` + 2 layers; 5 blocks per stage make ResNet-32.

    Args:
        standardise: the first module.
        classes: number of classes.
        blocks: residual blocks in each of the three stages, >= 1.
        width: channels of the first stage, >= 1; the others have twice and four times as many.
    """
    widths = [width, *(stage * width for stage in (1, 2, 4) for _ in range(blocks))]
    body = [ResidualBlock(inputs, outputs) for inputs, outputs in pairwise(widths)]
    stem = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))
    network = nn.Sequential(standardise, *stem, *body, *head)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return network


def vgg(
    standardise: Standardise,
    groups: Sequence[Sequence[int]],
    classes: int,
    batch_norm: bool,
    hidden: int = 4096,
) -> nn.Sequential:
    """Return a VGG network for 32 x 32 images: convolutions, then two dense layers and the output, no dropout.

    Convolutions start from N(0, 2 / (9 outputs)) and biases 0, dense layers from PyTorch's own distribution.

    Args:
        standardise: the first module.
        groups: channels of the convolutions, five groups.
        classes: number of classes.
        batch_norm: whether BatchNorm follows each convolution.
        hidden: width of the two dense layers, >= 1.
    """
    layers: list[nn.Module] = [standardise]
    inputs = 3
    for group in groups:
        for outputs in group:
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers.append(nn.ReLU())
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(hidden, classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
            nn.init.zeros_(module.bias)
    return network
