"""The next character of a text: a small causal transformer. One sample is one sequence, its loss the sum over it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..data.grammar import ALPHABET, encode, write_text
from ..networks.models import CharTransformer, seeded
from .problem import GENERATED_HERE, Data, Problem, Source, is_small, require_seed

__all__ = ["char_transformer"]


def char_transformer(size: str = "full", data_seed: int = 0) -> Problem:
    """Return the language model of a text that a grammar writes.

    Args:
        size: ``full``: 8000 training sequences of 64 characters, two layers of width 64; ``small``: 200 of 16, one
            layer of width 16.
        data_seed: decides the text, >= 0.
    """
    small = is_small(size)
    require_seed(data_seed)
    samples, length, width, heads, layers = (200, 16, 16, 2, 1) if small else (8000, 64, 64, 4, 2)

    def load(data_dir: Path | None) -> Data:
        train, valid, test = (
            _sequences(count, length, 3 * data_seed + part)
            for part, count in enumerate((samples, samples // 8, samples // 8))
        )
        return Data(*train, *test, *valid)

    network = partial(CharTransformer, len(ALPHABET), length, width, heads, layers)
    return Problem(
        name="char-transformer",
        summary=f"{samples} sequences of {length} characters of a grammar, transformer of width {width}, cross entropy",
        likelihood="categorical",
        batch_size=20 if small else 100,
        epochs=10,
        classes=len(ALPHABET),
        build_model=partial(seeded, network),
        load=load,
        source=Source("sentences of a small grammar", GENERATED_HERE, "ours"),
    )


def _sequences(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` pieces of a text (count, length), and the same one character later."""
    text = torch.tensor(encode(write_text(count * length + 1, seed)))
    return text[:-1].view(count, length), text[1:].view(count, length)
