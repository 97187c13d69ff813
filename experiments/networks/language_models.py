"""A small causal transformer over characters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CharTransformer"]


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
