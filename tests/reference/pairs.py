"""Secant pairs: damping, the skip rules and the inverse BFGS update (arXiv:2006.08877).

H approximates the inverse curvature, s = change of the variable, y = change of the gradient. Ratios are evaluated as
written, without guards against zero denominators; every comparison is strict as written.
"""

from dataclasses import dataclass, field

import numpy as np

from .network import Array


@dataclass(frozen=True)
class DampedPair:
    """A pair after damping, which rules changed it, and how far each decision was from its threshold."""

    s: Array
    y: Array
    powell: bool = False
    lm: bool = False
    margins: dict[str, float] = field(default_factory=dict)


def powell_on_inverse(s: Array, y: Array, Hy: Array, alpha: float) -> tuple[Array, bool]:
    """Damping 1 (changes s): afterwards s.y >= alpha y.Hy."""
    sy, yHy = s @ y, y @ Hy
    if sy / yHy > alpha:
        return s, False
    theta = (1 - alpha) * yHy / (yHy - sy)
    return theta * s + (1 - theta) * Hy, True


def powell_with_identity(s: Array, y: Array, epsilon: float) -> tuple[Array, bool]:
    """Damping 2 (changes y): afterwards s.y >= epsilon s.s."""
    sy, ss = s @ y, s @ s
    if sy / ss > epsilon:
        return y, False
    theta = (1 - epsilon) * ss / (ss - sy)
    return theta * y + (1 - theta) * s, True


def double_damping(s: Array, y: Array, Hy: Array, alpha: float = 0.2, epsilon: float = 0.5) -> DampedPair:
    """DD: damping 1 on the inverse, then damping 2 with the s it produced. `epsilon` = sqrt(lambda) < 1."""
    margin = abs(float((s @ y) / (y @ Hy)) - alpha)
    damped_s, powell = powell_on_inverse(s, y, Hy, alpha)
    margin_lm = abs(float((damped_s @ y) / (damped_s @ damped_s)) - epsilon)
    damped_y, lm = powell_with_identity(damped_s, y, epsilon)
    return DampedPair(damped_s, damped_y, powell, lm, {"powell": margin, "lm": margin_lm})


def powell_then_lm(s: Array, y: Array, Hy: Array, alpha: float = 0.2, epsilon: float = 0.5) -> DampedPair:
    """DDv2 (arXiv:2102.06737): damping 1, then always y + epsilon s."""
    margin = abs(float((s @ y) / (y @ Hy)) - alpha)
    damped_s, powell = powell_on_inverse(s, y, Hy, alpha)
    return DampedPair(damped_s, y + epsilon * damped_s, powell, True, {"powell": margin})


def powell_h_only(s: Array, y: Array, Hy: Array, alpha: float = 0.2, epsilon: float = 0.5) -> DampedPair:
    """Damping 1 alone; `epsilon` is unused."""
    del epsilon
    damped_s, powell = powell_on_inverse(s, y, Hy, alpha)
    return DampedPair(damped_s, y, powell)


def merged_double_damping(s: Array, y: Array, H: Array, alpha: float = 0.2) -> DampedPair:
    """Merged DD: sigma = max(y.Hy, s.s); leave the pair if s.y > alpha sigma.

    Otherwise, with the larger of the two: damp s with H (if y.Hy >= s.s), else damp y with the identity.
    """
    Hy = H @ y
    sy, yHy, ss = s @ y, y @ Hy, s @ s
    if sy > alpha * max(yHy, ss):
        return DampedPair(s, y)
    if yHy >= ss:
        theta = (1 - alpha) * yHy / (yHy - sy)
        return DampedPair(theta * s + (1 - theta) * Hy, y, powell=True)
    theta = (1 - alpha) * ss / (ss - sy)
    return DampedPair(s, theta * y + (1 - theta) * s, lm=True)


def powell_b0(s: Array, y: Array, alpha: float = 0.25, floor: float = 0.1) -> DampedPair:
    """SdLBFGS: B0 = gamma I, gamma = max(y.y / s.y, floor), the floor alone for s.y <= 0; then s.y >= alpha s.B0 s."""
    sy = s @ y
    gamma = max((y @ y) / sy, floor) if sy > 0 else floor
    sBs = gamma * (s @ s)
    if sy > alpha * sBs:
        return DampedPair(s, y)
    theta = (1 - alpha) * sBs / (sBs - sy)
    return DampedPair(s, theta * y + (1 - theta) * gamma * s, lm=True)


def reason_to_skip(s: Array, y: Array, scale: Array, threshold: float) -> int:
    """0: take the pair; 1: s.y <= 0; 2: s.y <= threshold (s.s) |scale|."""
    if s @ y <= 0:
        return 1
    if s @ y <= threshold * (s @ s) * np.linalg.norm(scale):
        return 2
    return 0


def inverse_bfgs_update(H: Array, s: Array, y: Array) -> Array:
    """H + (rho^2 y.Hy + rho) s s^T - rho (s (Hy)^T + (Hy) s^T) with rho = 1 / s.y."""
    rho, Hy = 1.0 / (s @ y), H @ y
    return H + (rho**2 * (y @ Hy) + rho) * np.outer(s, s) - rho * (np.outer(s, Hy) + np.outer(Hy, s))
