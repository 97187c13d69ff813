"""A real table: the age of shellfish from seven measures and the sex, which comes with the package."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.shipped import load_abalone
from ..networks.models import classifier, seeded
from .problem import Data, Problem, Source, held_out, is_small

__all__ = ["tabular_regression"]

_SOURCE = Source(
    "Abalone",
    "CC BY 4.0, W. Nash, T. Sellers, S. Talbot, A. Cawthorn and W. Ford",
    "Nash et al., The Population Biology of Abalone in Tasmania, Sea Fisheries Division, Technical Report 48, 1994",
    "https://doi.org/10.24432/C55C7W",
)


def tabular_regression(size: str = "full", validation: int = 0) -> Problem:
    """Return the regression of the number of rings; every column has mean 0 and variance 1 over the training samples.

    The loss of the mean is 1/2; half the share of the variance that a network leaves unexplained is its loss.

    Args:
        size: ``full``: 3300 training and 877 test samples; ``small``: 300, 100 and a narrower network.
        validation: training samples, the last ones, that are held out.
    """
    small = is_small(size)
    widths = (10, 16, 1) if small else (10, 64, 64, 1)

    def load(data_dir: Path | None) -> Data:
        train, test = load_abalone()
        if small:
            train, test = train[:300], test[:100]
        mean, deviation = train.mean(0), train.std(0)
        pairs = [_tensors((part - mean) / deviation) for part in (train, test)]
        return held_out(Data(*pairs[0], *pairs[1], test_set=f"{len(test)} held-out shellfish"), validation)

    return Problem(
        name="tabular-regression",
        summary=f"{300 if small else 3300} real shellfish, their age from 10 columns, "
        f"{'-'.join(map(str, widths))}, half squared error",
        likelihood="gaussian",
        batch_size=50 if small else 100,
        epochs=30,
        build_model=partial(seeded, partial(classifier, widths)),
        load=load,
        source=_SOURCE,
    )


def _tensors(table: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    values = torch.from_numpy(table.astype(np.float32))
    return values[:, :-1].contiguous(), values[:, -1:].contiguous()
