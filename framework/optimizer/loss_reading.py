"""What the user is told about the loss that the curvature backend has read off the gradient at the output."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from ...curvature.backends.loss_seen import SeenLoss
from ...curvature.final_activation import ends_in_sigmoid, way_out_of_activation
from ...curvature.loss_weights import LossReader
from ...errors import ArgumentError, LossWarning

__all__ = ["require_right_loss", "warn_of_loss"]

_ASSUMED = (
    "The curvature is that of weight 1 for every sample (the loss a mean over samples, summed over everything else); "
    "likelihood='from-loss' measures any other in optimizer.step(closure)"
)

_FLAT = (
    "the loss has no curvature in the model's output: its second derivative there is 0 throughout a mini-batch, as "
    "that of a hinge loss, an absolute error or any other that is piecewise linear. Matrices and step sizes that are "
    "measured from it are 0: damping alone shapes the steps, and methods that take their step sizes from the curvature "
    "(joint-*, lw-*) do not move. Take a loss that is smooth (nn.SoftMarginLoss() or a squared hinge, nn.HuberLoss()), "
    "a method that needs no likelihood (mbf, shampoo, kfac with statistics='empirical'), or for an absolute error "
    "likelihood=osculate.Gaussian(weight=1.0), whose curvature is that of a squared one"
)


def require_right_loss(reader: LossReader, inverse_scale: Tensor | None) -> None:
    """Check that the loss is the one that the optimizer was told of.

    Args:
        reader: of the backend.
        inverse_scale: 1 / scale of the loss, ``None`` if it is not scaled.

    Raises:
        ArgumentError: if it is the loss of another likelihood, or a sum where a mean was announced.
    """
    found = reader.found
    if found is None:
        return
    if found.looks_like:
        words = {"categorical": "a cross entropy over classes", "bernoulli": "a binary cross entropy with logits"}
        raise ArgumentError(
            f"likelihood={reader.kind!r}, but the gradient that the loss sends into the model's output is that of "
            f"{words[found.looks_like]}: build with likelihood={found.looks_like!r}"
        )
    if found.summed and reader.loss_reduction == "mean" and inverse_scale is None:
        raise ArgumentError(
            "loss_reduction='mean', but every sample has weight 1 in the loss, which is therefore a sum over samples: "
            "build with loss_reduction='sum', or divide the loss by their number"
        )


def warn_of_loss(reader: LossReader, model: nn.Module | None = None, unseen: SeenLoss | None = None) -> None:
    """Say once what could not be read of the loss, and what is assumed.

    Args:
        reader: of the backend.
        model: whose last module is named where its output is no logits.
        unseen: what may have to tell that the loss is not known either, in the same warning.
    """
    if reader.told:
        return
    found = reader.found
    guessed = found is not None and found.by_range and not ends_in_sigmoid(model)
    ends_in = "" if found is None or guessed else found.ends_in
    said = ""
    if reader.kind == "from-loss":
        if reader.shape.flat:
            said = _FLAT
        elif reader.shape.concave:
            said = "the loss is not convex in the model's output; what is concave in it is left out of the curvature"
    elif reader.kind == "gaussian":
        if reader.shape.flat:
            said = _FLAT
        elif reader.assumed:
            said = (
                "the scale of a squared error cannot be read off its gradient. The curvature is that of half the "
                "squared error, summed over outputs, a mean over samples. For nn.MSELoss() over D outputs per sample "
                "pass likelihood=osculate.Gaussian(weight=2 / D), to agree Gaussian(weight=1.0); or call "
                "optimizer.step(closure), where it is measured"
            )
    elif reader.unread:
        said = (
            f"{reader.unread}, so the gradient that the loss sends there is not seen, and the weights of the samples "
            f"cannot be read off it. {_ASSUMED}"
        )
    elif found is not None and ends_in and found.mode != "assumed":
        said = (
            f"{way_out_of_activation(ends_in, model)}. The loss takes them for logits and applies a "
            "softmax once more. The curvature is right for that loss, but it is seldom the one that is meant"
        )
    elif ends_in:
        said = (
            f"{way_out_of_activation(ends_in, model)}. The weights of the samples cannot be read off the "
            f"gradient that the loss sends there. {_ASSUMED}"
        )
    elif found is not None and found.mode == "assumed":
        said = (
            "the gradient at the model's output is not that of a cross entropy with hard, mixed or evenly smoothed "
            "labels (soft targets with unequal weights, negative weights, or another loss), so the weights of the "
            f"samples cannot be read off it. {_ASSUMED}"
        )
    elif found is not None and found.meant and reader.loss_reduction == "sum":
        said = (
            "loss_reduction='sum', but every sample has weight 1 / N in the loss, which is therefore a mean over the N "
            "samples of a mini-batch; the curvature is taken for N times smaller than it is told to be: build with "
            "loss_reduction='mean'"
        )
    if said:
        reader.told = True
        if unseen is not None and unseen.unsaid:
            said, unseen.unsaid = f"{said}. Besides, {unseen.unsaid}", ""
        warnings.warn(f"likelihood={reader.kind!r}: {said}", LossWarning, stacklevel=4)
