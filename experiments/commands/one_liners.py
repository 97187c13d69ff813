"""One short line for everything that ``osculate methods`` lists: names and lines stand beside each other."""

from __future__ import annotations

import re

from .docstrings import plain

__all__ = ["LINES", "one_line"]

LINES = {
    "adagrad": "AdaGrad with a diagonal, as torch.optim.Adagrad",
    "adam": "Adam; weight decay coupled, as torch.optim.Adam",
    "adamw": "AdamW; weight decay decoupled, as torch.optim.AdamW",
    "ekfac": "K-FAC's eigenbasis with second moments along its axes",
    "joint-kbfgs": "K-BFGS directions, joint layer steps, no learning rate",
    "joint-kfac": "K-FAC directions, joint layer steps, no learning rate",
    "joint-kfac-momentum": "joint steps along K-FAC directions and the last steps",
    "joint-kfac-noise-aware": "joint K-FAC steps that heed what new batches measure",
    "joint-sgdm": "SGD-momentum with joint layer steps, no learning rate",
    "kbfgs": "Kronecker factors by BFGS updates, no inversions",
    "kbfgs-conv": "K-BFGS for convolutions, with Powell's damping",
    "kbfgs-l": "K-BFGS with limited memory at the outputs",
    "kfac": "Kronecker-factored Fisher matrix of every layer",
    "kfac-conv": "K-FAC as the experiments with convolutions run it",
    "lw-adamw": "AdamW's direction, a step size of its own per layer",
    "lw-sgdm": "SGD-momentum, a step size of its own per layer",
    "mbf": "Mini-Block Fisher: a block per output neuron or kernel",
    "mbf-released": "Mini-Block Fisher with the blocks of its released code",
    "mini-block-lbfgs": "L-BFGS on mini-blocks, each from pairs of its own",
    "muon": "orthogonalised momentum on hidden weight matrices",
    "ngd-exact": "each layer's whole Fisher matrix; for small networks",
    "rmsprop": "RMSprop, as torch.optim.RMSprop",
    "sgdm": "SGD with heavy-ball momentum, as torch.optim.SGD",
    "shampoo": "Shampoo: fourth roots of summed gradient products",
    "soap": "Adam in the slowly renewed eigenbasis of Shampoo",
    "tnt": "Tensor Normal Training: matrix-normal covariances",
    "bfgs": "full-memory BFGS over all parameters",
    "engd": "energy natural gradient descent for residuals",
    "lbfgs": "L-BFGS over all parameters, Hager and Zhang's search",
    "lm": "Levenberg-Marquardt for residuals",
    "spring": "SPRING: momentum in the space of residuals",
    "ssbfgs": "self-scaled BFGS over all parameters",
    "ssbroyden": "self-scaled Broyden over all parameters",
    "dadapt-adam": "Adam with D-Adaptation's learning rate",
    "dog": "SGD whose step is distance over gradients",
    "ldog": "DoG with a step of its own for every tensor",
    "mechanic-adamw": "AdamW whose learning rate Mechanic scales",
    "momo": "SGD-momentum with a Polyak step from a model",
    "momo-adam": "Adam with a Polyak step from a model",
    "prodigy": "Adam with an estimated distance as its learning rate",
    "schedule-free-adamw": "AdamW that averages iterates instead of a schedule",
}
"""By name; at most 54 letters, which stand beside the longest name on 80 columns."""


def one_line(name: str, summary: str, width: int = 54) -> str:
    """The short line of a method, a summary's own beginning where none is written: whole clauses, no references.

    Args:
        name: of the method.
        summary: its first sentence.
        width: letters to fit in, where a clause ends before them.
    """
    if name in LINES:
        return LINES[name]
    without = re.sub(r"(?<=\S) \([^()]*\)", "", plain(summary)).removesuffix(".")
    pieces = re.split(r"([;:,] )", without)
    clauses = ["".join(pieces[:number]) for number in range(len(pieces), 0, -2)]
    return next((text for text in clauses if len(text) <= width), clauses[-1])
