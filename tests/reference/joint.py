"""Joint layer steps: all layers' step sizes from one L x L system. A new variant, not from the three papers.

The scores s_l(i) (each sample's derivative along layer l's direction, sampled targets) give M = mean_i s(i) s(i)^T, the
curvature in the L-dimensional space spanned by the directions. With normalised directions d_l / |d_l|:

    (M + lambda I + rho diag(M)) alpha = r,   r_l = -g_l.d_l / |d_l|,   alpha clipped at 0
"""

import numpy as np

from .layerwise import Directions, layer_inner, layer_scores
from .network import Array, Batch, Parameters


def normalised(directions: Directions) -> tuple[Parameters, Array]:
    """Unit directions and the norms they had, layer by layer."""
    norms = np.sqrt(layer_inner(directions, directions))
    unit = [{name: value / norm for name, value in d.items()} for d, norm in zip(directions, norms, strict=True)]
    return unit, norms


def joint_matrix(batch: Batch, parameters: Parameters, unit: Directions) -> Array:
    """M of one mini-batch (with SAMPLED targets), sample by sample, shape (L, L)."""
    scores = layer_scores(batch.layers, batch.evaluate(parameters).records, unit)
    total = np.zeros((len(unit), len(unit)))
    for score in scores:
        total += np.outer(score, score)
    return total / len(scores)


class MatrixAverage:
    """Bias-corrected moving average of M over the steps."""

    def __init__(self, decay: float = 0.8) -> None:
        """Starts at zero; the weight of what was seen so far is kept beside it."""
        self.decay, self.weight = decay, 0.0
        self.value: Array | None = None

    def update(self, matrix: Array) -> Array:
        """Take in this step's M; returns the corrected average."""
        old = np.zeros_like(matrix) if self.value is None else self.value
        self.value = self.decay * old + (1 - self.decay) * matrix
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.value / self.weight


def joint_step_sizes(
    gradients: Directions, directions: Directions, matrix: Array, damping: float = 0.0, relative_damping: float = 0.1
) -> Array:
    """Step sizes alpha_l of the UNNORMALISED directions, shape (L,).

    `gradients` is the momentum gradient; `matrix` is M for the normalised directions; `damping` = lambda,
    `relative_damping` = rho.
    """
    unit, norms = normalised(directions)
    r = -layer_inner(gradients, unit)
    system = matrix + damping * np.eye(len(r)) + relative_damping * np.diag(np.diag(matrix))
    return np.maximum(np.linalg.solve(system, r), 0.0) / norms
