"""Random changes of training images, sample by sample: crops, reflections, colours.

What is drawn depends on the generator alone, so a run that continues sees what it would have seen. Images are bytes
(N, C, H, W), as the papers' pipelines change them before they are standardised: what a crop adds is black.

Source: PAPERS 4.1. The order of operations and the definition of the colour changes are torchvision's, but for one
order of the three colour changes per mini-batch instead of per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ArgumentError

__all__ = ["Augmentation", "Chain", "ColourJitter", "RandomCrop", "RandomFlip"]

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, what torchvision's grey images are made with

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""A random change of images, (N, C, H, W) bytes that stay as they are, by a generator on the CPU; shapes are kept."""


@dataclass(frozen=True)
class RandomCrop:
    """Black margins, then a window of the old size at a random place.

    Args:
        margin: pixels >= 1 on each side.
    """

    margin: int = 4

    def __post_init__(self) -> None:
        if self.margin < 1:
            raise ArgumentError(f"margin must be >= 1, got {self.margin}; leave the crop out to keep images in place")

    def __str__(self) -> str:
        """In words."""
        return f"crops within a margin of {self.margin} pixels"

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the windows."""
        count, _, height, width = images.shape
        offset = torch.randint(0, 2 * self.margin + 1, (2, count), generator=generator)
        offset = _moved(offset, images.device)
        padded = functional.pad(images, (self.margin,) * 4)
        rows = offset[0].view(-1, 1, 1, 1) + torch.arange(height, device=images.device).view(-1, 1)
        columns = offset[1].view(-1, 1, 1, 1) + torch.arange(width, device=images.device)
        samples = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
        channels = torch.arange(images.shape[1], device=images.device).view(-1, 1, 1)
        return padded[samples, channels, rows, columns]


@dataclass(frozen=True)
class RandomFlip:
    """Left and right exchanged, with probability one half."""

    def __str__(self) -> str:
        """In words."""
        return "reflections"

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the reflected images."""
        chosen = _moved(torch.rand(len(images), generator=generator), images.device) < 0.5
        return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast and saturation times random factors, in random order.

    Args:
        brightness: interval of the factor; 1 changes nothing, 0 is black.
        contrast: interval of the factor; 0 is the mean grey of the image.
        saturation: interval of the factor; 0 is the grey image.
    """

    brightness: tuple[float, float]
    contrast: tuple[float, float]
    saturation: tuple[float, float]

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ArgumentError(f"{name} must be an interval of numbers >= 0, got ({low}, {high})")

    def __str__(self) -> str:
        """In words."""
        names = ("brightness", "contrast", "saturation")
        return ", ".join(f"{name} times {getattr(self, name)[0]:g} to {getattr(self, name)[1]:g}" for name in names)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the recoloured images (N, 3, H, W)."""
        drawn = _moved(torch.rand(3, len(images), generator=generator), images.device)
        luma = _moved(torch.tensor(_LUMA), images.device)
        values = images.float()
        for kind in torch.randperm(3, generator=generator).tolist():
            low, high = (self.brightness, self.contrast, self.saturation)[kind]
            factor = (low + (high - low) * drawn[kind]).view(-1, 1, 1, 1)
            other = torch.zeros_like(values)  # what a factor 0 makes of the images: black, mean grey, or grey
            if kind > 0:
                grey = torch.einsum("nchw,c->nhw", values, luma).unsqueeze(1).floor()
                other = grey.mean((1, 2, 3), keepdim=True) if kind == 1 else grey
            values = (factor * values + (1 - factor) * other).clamp(0, 255).floor()
        return values.to(images.dtype)


@dataclass(frozen=True)
class Chain:
    """Several changes, one after another.

    Args:
        parts: in order.
    """

    parts: Sequence[Augmentation]

    def __str__(self) -> str:
        """In words."""
        return ", then ".join(map(str, self.parts))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return what the last part returns."""
        for part in self.parts:
            images = part(images, generator)
        return images


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on ``device``, without waiting for what the device is doing."""
    if device.type == "cpu":
        return values
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
