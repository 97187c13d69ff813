"""What parts ask of each other, and what a backend is told to record: flags that every floor speaks in.

They stand in a file of their own, below layers and backends: an estimator that names a flag needs no backend for it.
"""

from __future__ import annotations

import enum
from typing import Literal

__all__ = ["LOOKING_BACK", "Needs", "PassKind", "Record"]


class Needs(enum.Flag):
    """What a part asks of the others. A method is legal when every need is provided by somebody.

    - ``INPUTS``: layer inputs (always available from the capture);
    - ``ROOTS``: gradients at the pre-activations, one row per sample and position, whose outer products average to the
      curvature (empirical or sampled Fisher);
    - ``VECTORS``: gradient vectors of the whole layer whose outer products average to the curvature;
    - ``PAIRS``: batch means of pre-activations and their gradients before and after the step (secant pairs);
    - ``CHANGES``: the layer's parameters and the gradient of the mean loss there, before and after the step;
    - ``SCORES``: per-sample derivatives of the log-likelihood along the step directions (quadratic forms);
    - ``PRODUCTS``: products with the Hessian of the mini-batch loss, which take a closure;
    - ``BATCH_SCORES``: the parameter gradient of the mean loss with sampled labels;
    - ``NORMS``: norms of the layers' parameters and directions (always available, one pass over each);
    - ``SLOPES``: inner products of gradient and direction per layer (always available, one pass);
    - ``MATRIX``: the layer's dense curvature matrix over its parameters (``LayerStatistics.matrix``).
    """

    NOTHING = 0
    INPUTS = enum.auto()
    ROOTS = enum.auto()
    VECTORS = enum.auto()
    PAIRS = enum.auto()
    SCORES = enum.auto()
    PRODUCTS = enum.auto()
    BATCH_SCORES = enum.auto()
    NORMS = enum.auto()
    SLOPES = enum.auto()
    MATRIX = enum.auto()
    CHANGES = enum.auto()


LOOKING_BACK = Needs.PAIRS | Needs.CHANGES
"""What is measured before and after the step, on the same mini-batch."""


class Record(enum.Flag):
    """What to keep of one layer: its inputs, output gradients, sampled gradients, or only means (cheapest).

    ``CURVATURE_ROOTS``: all roots of the likelihood's curvature, backpropagated. ``PER_SAMPLE`` beside ``GRADIENTS``,
    ``SAMPLED`` or ``CURVATURE_ROOTS``: whole parameter gradients are wanted; a backend may measure them itself, or
    leave them to be built from the rows. ``COUNT``: nothing but the number of samples.
    """

    NOTHING = 0
    INPUTS = enum.auto()
    GRADIENTS = enum.auto()
    MEANS = enum.auto()
    SAMPLED = enum.auto()
    SAMPLED_PARAMETERS = enum.auto()
    CURVATURE_ROOTS = enum.auto()
    PER_SAMPLE = enum.auto()
    COUNT = enum.auto()


PassKind = Literal["gradient", "look back", "forward"]
"""What a forward pass is run for; see ``Capture.arm``."""
