"""The networks of the problems; but for embeddings they have PyTorch's own initial distribution of the parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "CharTransformer",
    "VariationalAutoencoder",
    "autoencoder",
    "classifier",
    "digit_cnn",
    "seeded",
    "smooth_network",
]


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return what ``build`` makes when torch's CPU generator starts from ``seed``; the global state stays as it was.

    Args:
        build: makes the network, on the CPU.
        seed: >= 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """Return encoder and mirrored decoder: ReLU in between, linear code, linear output.

    Args:
        widths: pixels, hidden widths, code, such as (784, 1000, 500, 250, 30); each >= 1. The decoder has the same in
            reverse order: (784, 1000, 500, 250, 30, 250, 500, 1000, 784) in all.

    Source: the authors' autoencoder of arXiv:2006.08877, which follows Hinton and Salakhutdinov (2006).
    """
    encoder, decoder = _dense(widths), _dense(widths[::-1])
    return nn.Sequential(*encoder, *decoder)


def classifier(widths: Sequence[int]) -> nn.Sequential:
    """Return a fully connected network with ReLU between its layers and a linear output.

    Args:
        widths: inputs, hidden widths, classes; each >= 1.
    """
    return nn.Sequential(*_dense(widths))


def digit_cnn(channels: int = 16, hidden: int = 128) -> nn.Sequential:
    """Return a convolutional network for ten classes of (1, 28, 28) images, with BatchNorm and dropout.

    Two blocks of 3 x 3 convolution, BatchNorm, ReLU and 2 x 2 max-pooling, then two dense layers, dropout of a quarter
    of the values before each.

    Args:
        channels: of the first convolution, >= 1; the second has twice as many.
        hidden: width of the dense layer in between, >= 1.
    """
    return nn.Sequential(
        *_block(1, channels),
        *_block(channels, 2 * channels),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(2 * channels * 7 * 7, hidden),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(hidden, 10),
    )


def smooth_network(widths: Sequence[int]) -> nn.Sequential:
    """Return a fully connected network with tanh between its layers and a linear output, in double precision.

    Args:
        widths: inputs, hidden widths, outputs; each >= 1.
    """
    return nn.Sequential(*_dense(widths, nn.Tanh)).double()


class CharTransformer(nn.Module):
    """Characters (N, T) to logits (N, T, characters) of the character that follows each.

    Embeddings of characters and places, pre-norm layers of attention to the past and a GELU layer four times as wide,
    a final normalisation, a linear output; no dropout.

    Args:
        characters: size of the alphabet.
        length: largest T.
        width: of the embeddings, a multiple of ``heads``.
        heads: of the attention, >= 1.
        layers: >= 1.
    """

    mask: Tensor

    def __init__(self, characters: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, characters)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.1)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (N, T, characters)."""
        length = text.shape[1]
        places = torch.arange(length, device=text.device).expand_as(text)  # (N, T): one row of places per sample
        values = self.characters(text) + self.places(places)
        for layer in self.layers:
            values = layer(values, src_mask=self.mask[:length, :length])
        logits: Tensor = self.output(self.norm(values))
        return logits


class VariationalAutoencoder(nn.Module):
    """Pixels and noise (N, pixels + code) to ``logits``, and ``mean`` and ``log_variance`` of the code.

    The code is z = mean + exp(log_variance / 2) * noise: the noise is given, so that the network is a function of its
    inputs. Tanh in between, the decoder mirrors the encoder.

    Args:
        widths: pixels and hidden widths of the encoder, at least one; each >= 1.
        code: numbers in a code, >= 1.

    Source: Kingma and Welling, arXiv:1312.6114v11, appendix C.
    """

    def __init__(self, widths: Sequence[int], code: int) -> None:
        super().__init__()
        self.code = code
        self.encoder = nn.Sequential(*_dense(widths, nn.Tanh), nn.Tanh())
        self.mean = nn.Linear(widths[-1], code)
        self.log_variance = nn.Linear(widths[-1], code)
        self.decoder = nn.Sequential(*_dense((code, *widths[::-1]), nn.Tanh))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Logits of the pixels (N, pixels), mean and log variance of the code (N, code)."""
        hidden = self.encoder(inputs[:, : -self.code])
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        codes = mean + (log_variance / 2).exp() * inputs[:, -self.code :]
        return {"logits": self.decoder(codes), "mean": mean, "log_variance": log_variance}


def _dense(widths: Sequence[int], between: Callable[[], nn.Module] = nn.ReLU) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), between()]
    return layers[:-1]


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
