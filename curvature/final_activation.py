"""Outputs that have passed a softmax or a sigmoid, where logits are expected: what they look like, and the way out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ends_in_sigmoid", "final_activation", "sent_by_likelihood", "way_out_of_activation"]

_ROWS = 512
_TELLING = 8
"""Numbers in [0, 1] that are too few to tell probabilities from anything else."""

_MODULES = {
    "Softmax": (nn.Softmax, nn.Softmax2d),
    "LogSoftmax": (nn.LogSoftmax,),
    "Sigmoid": (nn.Sigmoid,),
}
_LOSSES = {
    "Softmax": "probabilities, as after a Softmax, where logits are expected: let the model return the logits and take "
    "nn.CrossEntropyLoss(), which has the softmax in it",
    "LogSoftmax": "log-probabilities, as after a LogSoftmax, where logits are expected: let the model return the "
    "logits and take nn.CrossEntropyLoss(), which is nn.NLLLoss() behind a LogSoftmax",
    "Sigmoid": "numbers in [0, 1], as after a Sigmoid, where logits are expected: let the model return the logits and "
    "take nn.BCEWithLogitsLoss(), which has the sigmoid in it",
}


def final_activation(output: Tensor, tolerance: float = 0.0) -> str:
    """``Softmax``, ``LogSoftmax`` or ``Sigmoid`` if a model's output looks as if it had passed one; else empty.

    Args:
        output: (N, ...); classes on the last axis or on axis 1. Looked at on the host.
        tolerance: of its rounding, where it was computed in less precision than it has.
    """
    if output.ndim < 1 or not output.numel():
        return ""
    exact = max(tolerance, 1e-4 if output.dtype in (torch.float32, torch.float64) else 2e-2)
    some = output.detach()[:_ROWS].double().cpu()
    for axis in {-1, 1} if some.ndim > 2 else {-1} if some.ndim == 2 else ():
        if some.shape[axis] < 2:
            continue
        if float(some.max()) <= 0 and float(some.logsumexp(axis).abs().max()) < exact:
            return "LogSoftmax"
        if float(some.min()) >= 0 and float((some.sum(axis) - 1).abs().max()) < exact:
            return "Softmax"
    within = float(some.min()) >= 0 and float(some.max()) <= 1 and float(some.max()) > float(some.min())
    return "Sigmoid" if within and some.numel() >= _TELLING else ""


def ends_in_sigmoid(model: nn.Module | None) -> bool:
    """Whether the last module is a Sigmoid: without it numbers in [0, 1] before a softmax are logits as any others."""
    return model is not None and isinstance([*model.modules()][-1], _MODULES["Sigmoid"])


def sent_by_likelihood(name: str, output: Tensor, gradient: Tensor, tolerance: float) -> bool:
    """Whether a gradient is that of the negative log-likelihood of one label per row, or of binary labels.

    Args:
        name: of what the output has passed; see :func:`final_activation`.
        output: the probabilities, or their logarithms.
        gradient: of the loss there.
        tolerance: of its ratios.
    """
    if name == "Sigmoid":
        weights = gradient.double().abs() * torch.where(gradient < 0, output, 1 - output)
        return bool(weights.max() - weights.min() <= tolerance * weights.max())
    told = (gradient != 0) & (gradient < 0)
    single = any(int(told.sum(axis).max()) == 1 for axis in {-1, min(1, gradient.ndim - 1)})
    return single and bool((told == (gradient != 0)).all())


def way_out_of_activation(name: str, model: nn.Module | None = None) -> str:
    """A sentence on an output that has passed an activation, with the module that it comes from, and the way out.

    Args:
        name: as :func:`final_activation` gives it.
        model: whose last module is named if it is such a one.
    """
    modules = [] if model is None else list(model.named_modules())
    path, last = modules[-1] if modules else ("", None)
    named = f" (its last module, {path!r}, is a {type(last).__name__})" if isinstance(last, _MODULES[name]) else ""
    return f"the model's output{named} consists of {_LOSSES[name]}"
