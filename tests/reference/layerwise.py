"""Layer-wise adaptive step sizes, reconstructed from the abstract of arXiv:2305.13664.

Per layer l, with direction d_l and curvature C_l (the layer's diagonal block):

    alpha_l = (-g_l.d_l) / (d_l.C_l d_l + lambda |d_l|^2)

The quadratic forms q_l = d_l.C_l d_l come in five ways: (a) sampled Fisher, (a') sampled Fisher from the batch mean,
(b) one signed Hessian-vector product, (c) exact, (d) plain row sums. Directions have the form of parameters: per layer
{"W", "b"}.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .exact import flatten, gauss_newton, hessian, layer_slices
from .network import Array, Batch, Layer, LayerRecord, Parameters, as_matrix

Directions = Sequence[Mapping[str, Array]]


def layer_inner(left: Directions, right: Directions) -> Array:
    """The inner product of each layer, shape (L,)."""
    return np.array([sum(np.sum(a[name] * b[name]) for name in a) for a, b in zip(left, right, strict=True)])


def layer_scores(layers: Sequence[Layer], records: Sequence[LayerRecord], directions: Directions) -> Array:
    """s_l(i) = sum over positions of g_l(i, t).(d_l h~)(i, t), shape (B, L): each sample's derivative along d_l."""
    scores = np.zeros((len(records[0].g), len(layers)))
    for l, (layer, record, direction) in enumerate(zip(layers, records, directions, strict=True)):
        if layer.kind == "batchnorm":  # the output is linear in (scale, shift): z = d_scale x_hat + d_shift
            z = record.h * direction["W"] + direction["b"]
        else:
            z = record.homogeneous() @ as_matrix(direction).T
        for i in range(len(z)):
            scores[i, l] = sum(g @ row for g, row in zip(record.g[i], z[i], strict=True))
    return scores


def sampled_fisher(batch: Batch, parameters: Parameters, d: Directions) -> Array:
    """(a) q_l = mean_i s_l(i)^2, `batch` with SAMPLED targets; unbiased for the block of the GGN matrix."""
    return (layer_scores(batch.layers, batch.evaluate(parameters).records, d) ** 2).mean(0)


def sampled_fisher_batch_mean(batch: Batch, parameters: Parameters, d: Directions) -> Array:
    """(a') q_l = m (g~_l.d_l)^2, g~ the gradient of the batch-mean loss, `batch` with SAMPLED targets; unbiased."""
    gradients = batch.evaluate(parameters).gradients
    return len(batch.x) * layer_inner(gradients, d) ** 2


def signed_product(batch: Batch, parameters: Parameters, d: Directions, signs: Array) -> Array:
    """(b) eps_l d_l.(H v)_l with v = (eps_1 d_1, ..., eps_L d_L): one product, unbiased over random `signs` (+-1)."""
    H, flat, slices = hessian(batch, parameters), flatten(d), layer_slices(d)
    v = np.concatenate([sign * flat[part] for sign, part in zip(signs, slices, strict=True)])
    Hv = H @ v
    return np.array([sign * flat[part] @ Hv[part] for sign, part in zip(signs, slices, strict=True)])


def exact_hessian_blocks(batch: Batch, parameters: Parameters, d: Directions) -> Array:
    """(c) d_l.H_ll d_l, one diagonal block at a time; may be negative."""
    H, flat = hessian(batch, parameters), flatten(d)
    return np.array([flat[part] @ H[part, part] @ flat[part] for part in layer_slices(d)])


def exact_gauss_newton_blocks(batch: Batch, parameters: Parameters, d: Directions) -> Array:
    """What (a) and (a') estimate: d_l.(GGN)_ll d_l."""
    matrix, flat = gauss_newton(batch, parameters), flatten(d)
    return np.array([flat[part] @ matrix[part, part] @ flat[part] for part in layer_slices(d)])


def row_sums(batch: Batch, parameters: Parameters, d: Directions) -> Array:
    """(d) d_l.(H d)_l of one plain product: cheap but not block-diagonal; an ablation."""
    H, flat = hessian(batch, parameters), flatten(d)
    Hd = H @ flat
    return np.array([flat[part] @ Hd[part] for part in layer_slices(d)])


def step_sizes(gradients: Directions, directions: Directions, quadratic: Array, damping: float = 0.0) -> Array:
    """alpha_l = (-g_l.d_l) / (q_l + lambda |d_l|^2); `gradients` is the momentum gradient, not the raw one."""
    return -layer_inner(gradients, directions) / (quadratic + damping * layer_inner(directions, directions))


class CurvatureAverage:
    """Bias-corrected moving average of the Rayleigh quotients c_l = q_l / |d_l|^2."""

    def __init__(self, decay: float = 0.9) -> None:
        """Starts at zero; the weight of what was seen so far is kept beside it."""
        self.decay, self.value, self.weight = decay, 0.0, 0.0

    def update(self, quadratic: Array, squared_norm: Array) -> Array:
        """Take in this step's quadratic forms; returns the corrected average, shape (L,)."""
        self.value = self.decay * self.value + (1 - self.decay) * quadratic / squared_norm
        self.weight = self.decay * self.weight + (1 - self.decay)
        return np.asarray(self.value / self.weight)


def averaged_step_sizes(
    gradients: Directions, directions: Directions, rayleigh: Array, damping: float, largest: float
) -> Array:
    """alpha_l = (-g_l.d_l / |d_l|^2) / (c_l + lambda), clipped to [0, alpha_max]."""
    slopes = -layer_inner(gradients, directions) / layer_inner(directions, directions)
    return np.clip(slopes / (rayleigh + damping), 0.0, largest)


class MomentumDirection:
    """SGD with momentum: d = -m, m the bias-corrected exponential average of the gradient."""

    def __init__(self, decay: float = 0.9) -> None:
        """Starts at zero."""
        self.decay, self.count = decay, 0
        self.m: Parameters | None = None

    def propose(self, gradients: Parameters) -> tuple[Parameters, Parameters]:
        """Returns (bias-corrected momentum gradient, direction)."""
        self.count += 1
        old = self.m or [{name: np.zeros_like(value) for name, value in entry.items()} for entry in gradients]
        self.m = [
            {name: self.decay * m[name] + (1 - self.decay) * g[name] for name in g}
            for m, g in zip(old, gradients, strict=True)
        ]
        corrected = [{name: value / (1 - self.decay**self.count) for name, value in entry.items()} for entry in self.m]
        return corrected, [{name: -value for name, value in entry.items()} for entry in corrected]


class AdamDirection:
    """AdamW without its decay: d = -m^ / (sqrt(v^) + eps)."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> None:
        """Starts at zero."""
        self.momentum, self.beta2, self.epsilon = MomentumDirection(beta1), beta2, epsilon
        self.v: Parameters | None = None

    def propose(self, gradients: Parameters) -> tuple[Parameters, Parameters]:
        """Returns (bias-corrected momentum gradient, direction)."""
        corrected, _ = self.momentum.propose(gradients)
        old = self.v or [{name: np.zeros_like(value) for name, value in entry.items()} for entry in gradients]
        self.v = [
            {name: self.beta2 * v[name] + (1 - self.beta2) * g[name] ** 2 for name in g}
            for v, g in zip(old, gradients, strict=True)
        ]
        correction = 1 - self.beta2**self.momentum.count
        directions = [
            {name: -m[name] / (np.sqrt(v[name] / correction) + self.epsilon) for name in m}
            for m, v in zip(corrected, self.v, strict=True)
        ]
        return corrected, directions


def apply(parameters: Parameters, directions: Directions, alphas: Array, decay: float = 0.0) -> Parameters:
    """theta <- (1 - alpha_l gamma) theta + alpha_l d_l, gamma = the decoupled weight decay."""
    return [
        {name: (1 - alpha * decay) * entry[name] + alpha * direction[name] for name in entry}
        for entry, direction, alpha in zip(parameters, directions, alphas, strict=True)
    ]
