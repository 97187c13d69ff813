"""The next character of a text: a small causal transformer. One sample is one sequence, its loss the sum over it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import UnknownNameError
from ..data.grammar import ALPHABET, encode, write_text
from ..data.texts import CHARACTERS, TEXTS, TextPlan, read_text, sequences
from ..networks.models import CharTransformer, seeded
from .problem import GENERATED_HERE, Data, Problem, Source, Target, is_small, require_seed

__all__ = ["char_lm", "char_transformer"]

_LENGTH = 64
_MEDIUM = TextPlan(2400, 224, 16)
_SHAPES = {"full": (_LENGTH, 128, 4, 4), "medium": (_LENGTH, 64, 4, 2), "small": (16, 16, 2, 1)}
"""Characters of a sequence, width, heads and layers of the transformer by size."""
_SUBJECTS = {"python": "Python's reference", "shakespeare": "Shakespeare"}
_SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "python": Source(
            "the reference of the Python language that the running Python carries, pydoc_data.topics",
            "PSF licence, Python Software Foundation",
            "van Rossum and the Python development team, The Python Language Reference",
            "https://docs.python.org/3/reference/",
        ),
        "shakespeare": Source(
            "a million characters of Shakespeare",
            "public domain",
            "Karpathy, char-rnn, 2015",
            "https://github.com/karpathy/char-rnn",
        ),
    }
)


def char_lm(size: str = "full", text: str = "python") -> Problem:
    """Return the language model of a real text at the size that nanoGPT trains on a CPU.

    Four layers, four heads, width 128, sequences of 64 characters, batches of 12, no dropout; 2000 steps are 4 epochs
    of the reference of Python, 2 of Shakespeare. Losses are sums over the 64 characters of a sequence.

    Args:
        size: ``full``; ``medium``: 2400 training sequences, 200 steps an epoch, and two layers of width 64, for studies
            of many runs; ``small``: 200 sequences of 16 characters, one layer of width 16.
        text: ``python``: the reference of the running Python, without a download; losses compare within one version of
            Python only. ``shakespeare``: ``shakespeare/input.txt`` of the data folder, else a download; nanoGPT
            publishes a test loss of 1.88 nats per character, 120 per sequence.

    Raises:
        UnknownNameError: there is no such text.
    """
    if size not in _SHAPES:
        raise UnknownNameError("size", str(size), _SHAPES)
    if text not in TEXTS:
        raise UnknownNameError("text", str(text), TEXTS)
    small, full = size == "small", size == "full"
    length, width, heads, layers = _SHAPES[size]
    plan = TEXTS[text] if full else TextPlan(200, 50, 5) if small else _MEDIUM

    def load(data_dir: Path | None) -> Data:
        found = read_text(text, data_dir)
        train, valid, test = map(_shifted, sequences(found, length, plan))
        return Data(*train, *test, *valid, test_set=f"{len(test[0])} held-out sequences", origin=found.origin)

    published = text == "shakespeare" and full
    return Problem(
        name="char-lm",
        summary=f"{plan.train} sequences of {length} characters of {_SUBJECTS[text]}, "
        f"transformer of {layers} x {width}, cross entropy",
        likelihood="categorical",
        batch_size=20 if small else 12,
        epochs=2 if text == "shakespeare" else 4,
        classes=len(CHARACTERS),
        build_model=partial(seeded, partial(CharTransformer, len(CHARACTERS), length, width, heads, layers)),
        load=load,
        source=_SOURCES[text],
        target=Target("test_loss", 1.88 * _LENGTH) if published else None,
    )


def char_transformer(size: str = "full", data_seed: int = 0) -> Problem:
    """Return the language model of a text that a grammar writes, for tests: its losses compare with nothing published.

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
        summary=f"for tests: {samples} sequences of {length} characters of a grammar, transformer of width {width}, "
        "cross entropy",
        likelihood="categorical",
        batch_size=20 if small else 100,
        epochs=10,
        classes=len(ALPHABET),
        build_model=partial(seeded, network),
        load=load,
        source=Source("sentences of a small grammar", GENERATED_HERE, "ours"),
    )


def _shifted(codes: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return all but the last character of sequences (N, T + 1), and all but the first."""
    tokens = torch.from_numpy(codes)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _sequences(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` pieces of a text (count, length), and the same one character later."""
    text = torch.tensor(encode(write_text(count * length + 1, seed)))
    return text[:-1].view(count, length), text[1:].view(count, length)
