"""Joint layer steps along 2L directions: each layer's new direction d_l and its last step p_l. Ours.

    (M + lambda I + rho diag(M)) (alpha, beta) = r,   r = -m_l.d_l / |d_l| and -g_l.p_l / |p_l|

m is the momentum gradient, g that of the mini-batch; theta <- theta + alpha d + beta p, p = what theta moved by before.
Where an alpha is negative it is set to zero, and the betas are solved for again. A direction of length zero, or without
curvature, drops out.
The average of M counts, for a layer that has no last step yet, the step that it is about to take along d.
"""

import numpy as np

from .joint import MatrixAverage
from .layerwise import Directions, layer_inner, layer_scores
from .network import Array, Batch, Parameters


class LastStepRule:
    """Sizes of the steps, with the average of M and the last steps between calls."""

    def __init__(self, decay: float = 0.8, damping: float = 0.0, relative_damping: float = 0.3) -> None:
        """Nothing seen; `damping` = lambda, `relative_damping` = rho."""
        self.average, self.damping, self.relative = MatrixAverage(decay), damping, relative_damping
        self.last: Parameters | None = None

    def step(
        self, sampled: Batch, parameters: Parameters, gradients: Directions, momentum: Directions, d: Directions
    ) -> Parameters:
        """The parameters after one step; `sampled` is the mini-batch with SAMPLED targets."""
        last = self.last or [{name: np.zeros_like(value) for name, value in entry.items()} for entry in d]
        norms = np.sqrt(np.concatenate([layer_inner(d, d), layer_inner(last, last)]))
        records, count = sampled.evaluate(parameters).records, len(d)
        known = [p if norm > 0 else new for p, new, norm in zip(last, d, norms[count:], strict=True)]
        scores = np.concatenate([layer_scores(sampled.layers, records, entry) for entry in (d, known)], axis=1)
        scores /= np.concatenate([norms[:count], np.sqrt(layer_inner(known, known))])
        total = sum(np.outer(score, score) for score in scores)
        matrix = self.average.update(np.asarray(total) / len(scores))
        slopes = -np.concatenate([layer_inner(momentum, d), layer_inner(gradients, last)])
        sizes = chosen_sizes(matrix, slopes, norms, self.damping, self.relative)
        self.last = [
            {name: alpha * new[name] + beta * p[name] for name in new}
            for new, p, alpha, beta in zip(d, last, sizes[:count], sizes[count:], strict=True)
        ]
        return [
            {name: entry[name] + moved[name] for name in entry}
            for entry, moved in zip(parameters, self.last, strict=True)
        ]


def chosen_sizes(matrix: Array, slopes: Array, norms: Array, damping: float, relative: float) -> Array:
    """Sizes along the UNNORMALISED directions, shape (2L,); `matrix` is M for the normalised ones."""
    system = matrix + damping * np.eye(len(norms)) + relative * np.diag(np.diag(matrix))
    count, present = len(norms) // 2, np.flatnonzero((norms > 0) & (np.diag(system) > 0))
    r = np.divide(slopes, norms, out=np.zeros_like(norms), where=norms > 0)
    sizes = np.zeros(len(norms))
    sizes[present] = np.linalg.solve(system[np.ix_(present, present)], r[present])
    if (sizes[:count] < 0).any():
        sizes[:count] = np.maximum(sizes[:count], 0.0)
        free = present[present >= count]
        fixed = system[np.ix_(free, np.arange(count))] @ sizes[:count]
        sizes[free] = np.linalg.solve(system[np.ix_(free, free)], r[free] - fixed)
    return np.divide(sizes, norms, out=np.zeros_like(norms), where=norms > 0)
