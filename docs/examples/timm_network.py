"""Train a network of timm with ``BatchNormAct2d`` layers by optimizers of osculate.

    pip install -e ".[foreign]"                      # timm among others
    python docs/examples/timm_network.py             # all of them
    python docs/examples/timm_network.py kfac muon

Random weights and made-up images: nothing is downloaded. What is worth a look:

* ``BatchNormAct2d`` is a subclass of ``BatchNorm2d`` that does something else: it is recognised by being tried out, and
  the method's fallback serves it. The convolutions and the classifier, 97 % of the parameters, are the method's own.
* Batch normalisation in training couples the samples: quantities per sample are an approximation, as in the papers.
* Small images: the stride of the first convolution is taken away.
"""

from __future__ import annotations

import sys
import warnings

import osculate as osc
import timm
import torch
from torch import Tensor, nn

CLASSES, SIZE = 4, 16
OPTIONS = {
    "kfac": {"lr": 0.02, "damping": 0.1},
    "lw-adamw": {},  # this one and the next choose their steps themselves
    "joint-kfac": {},
    "soap": {"lr": 1e-3},
    "muon": {"lr": 0.01},
}


def network() -> nn.Module:
    """A small EfficientNet whose norms are ``BatchNormAct2d``."""
    model = timm.create_model("test_efficientnet", num_classes=CLASSES)
    model.conv_stem.stride = (1, 1)
    return model


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stripes in one of four directions, and noise."""
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    angles = labels * torch.pi / CLASSES
    phase = 6.3 * torch.rand(count, generator=generator)[:, None, None]
    waves = torch.sin(angles.cos()[:, None, None] * row + angles.sin()[:, None, None] * column + phase)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return waves[:, None] + 0.5 * noise, labels


def train(method: str, model: nn.Module, steps: int = 30) -> tuple[float, float, float]:
    """Train. Returns the first loss, the mean of the last five, and the share of parameters the method serves."""
    optimizer = osc.build(method, model, likelihood="categorical", **OPTIONS.get(method, {}))
    generator, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in range(steps):
        inputs, labels = images(64, generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    served = sum(p.numel() for block in optimizer.blocks if not block.fallback for p in block.parameters)
    return losses[0], sum(losses[-5:]) / 5, served / sum(p.numel() for p in model.parameters())


def main(methods: list[str]) -> None:
    """Train a new network by every method."""
    for method in methods:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", osc.FallbackWarning)  # it names every BatchNormAct2d
            first, last, share = train(method, network())
        print(f"{method:11s} efficientnet: loss {first:.3f} to {last:.3f}, {100 * share:.1f} % served", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(OPTIONS))
