"""Secant updates of one inverse Hessian over all parameters: full-memory BFGS, self-scaled Broyden, L-BFGS.

s is the last step, y the change of the gradient along it, on the same mini-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...errors import require_positive_integer

__all__ = [
    "FullBFGS",
    "FullInverse",
    "LimitedBFGS",
    "SecantUpdate",
    "SelfScaledBFGS",
    "SelfScaledBroyden",
    "StoredPairs",
]


class SecantUpdate(Protocol):
    """How pairs become an inverse."""

    def declines(self, parameters: int) -> str:
        """Why it does not take so many parameters, or an empty string."""

    def init(self, parameters: int, like: Tensor) -> Any:
        """The identity."""

    def update(self, state: Any, step: Tensor, change: Tensor, gradient: Tensor) -> bool:
        """Take a pair in; returns whether it was taken: s'y must be positive, or H would lose its sign.

        Args:
            state: changed in place.
            step: (P,) s.
            change: (P,) y.
            gradient: (P,) at the beginning of the step, what self-scaling compares with.
        """

    def precondition(self, state: Any, gradient: Tensor) -> Tensor:
        """(P,) H gradient."""


@dataclass
class FullInverse:
    """H, (P, P); how often it was updated; and the length of the last step along -H gradient."""

    inverse: Tensor
    updates: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The matrix and the count."""
        return {"inverse": self.inverse, "updates": self.updates}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy them into place."""
        self.inverse.copy_(values["inverse"])
        self.updates = int(values["updates"])


def _curves(step: Tensor, change: Tensor) -> float:
    """s'y if it is safely positive, else 0."""
    product = float(step @ change)
    return product if product > torch.finfo(step.dtype).eps * float(step.norm() * change.norm()) else 0.0


@dataclass(frozen=True)
class _Full:
    """A full matrix.

    Args:
        limit: on P, >= 1: the matrix has P^2 numbers.
    """

    limit: int = 20000

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("limit", self.limit)

    def declines(self, parameters: int) -> str:
        """More parameters than the limit."""
        return (
            ""
            if parameters <= self.limit
            else (
                f"{parameters} parameters are more than limit={self.limit}, and one matrix would take "
                f"{8 * parameters**2 / 2**30:,.1f} GiB; LimitedBFGS() stores pairs"
            )
        )

    def init(self, parameters: int, like: Tensor) -> FullInverse:
        """The identity."""
        return FullInverse(torch.eye(parameters, dtype=like.dtype, device=like.device))

    def precondition(self, state: FullInverse, gradient: Tensor) -> Tensor:
        """One product."""
        return state.inverse @ gradient

    def update(self, state: FullInverse, step: Tensor, change: Tensor, gradient: Tensor) -> bool:
        """By :meth:`factors`."""
        curved = _curves(step, change)
        if not curved:
            return False
        if not state.updates:  # Nocedal and Wright, (6.20): the first pair knows the size of H
            state.inverse.mul_(curved / float(change @ change))
        image = state.inverse @ change
        across = float(change @ image)
        if not across > 0.0:  # rounding has cost H its sign: begin anew
            state.inverse.copy_(torch.eye(len(step), dtype=step.dtype, device=step.device))
            state.updates = 0
            return False
        tau, phi = self.factors(state, step, change, image, curved, gradient)
        if not (tau > 0.0 and math.isfinite(tau) and math.isfinite(phi)):
            tau, phi = 1.0, 1.0  # BFGS's own, where rounding has spoilt the others
        # H <- (H - Hy(Hy)' / y'Hy + phi v v') / tau + s s' / s'y,  v = sqrt(y'Hy) (s / s'y - Hy / y'Hy)
        state.inverse.addr_(image, image, alpha=-1.0 / across)
        if phi:
            difference = (step / curved - image / across) * across**0.5
            state.inverse.addr_(difference, difference, alpha=phi)
        if tau != 1.0:
            state.inverse.div_(tau)
        state.inverse.addr_(step, step, alpha=1.0 / curved)
        state.updates += 1
        return True

    def factors(
        self, state: FullInverse, step: Tensor, change: Tensor, image: Tensor, curved: float, gradient: Tensor
    ) -> tuple[float, float]:
        """(tau, phi): by what H is divided before the pair enters, and how much of BFGS's own term it keeps."""
        return 1.0, 1.0


@dataclass(frozen=True)
class FullBFGS(_Full):
    """The update of Broyden, Fletcher, Goldfarb and Shanno, with H scaled by the first pair.

    Memory: P^2 numbers. Cost: 6 P^2 flops per step.
    """


@dataclass(frozen=True)
class SelfScaledBFGS(_Full):
    """BFGS with H divided by tau = min(1, y's / s'Bs) first (Al-Baali, Comput. Optim. Appl. 9 (1998); for networks
    Urban, Stefanou and Pons, arXiv:2405.04230).

    s'Bs needs no B: s is a multiple t of -H g, so s'Bs = -t s'g = s'B s with B s = -t g.
    """

    def factors(
        self, state: FullInverse, step: Tensor, change: Tensor, image: Tensor, curved: float, gradient: Tensor
    ) -> tuple[float, float]:
        """tau <= 1: H grows where the model was too stiff."""
        curvature = _own_curvature(state, step, gradient)
        return (min(1.0, curved / curvature) if curvature > 0.0 else 1.0), 1.0


@dataclass(frozen=True)
class SelfScaledBroyden(_Full):
    """A member of Broyden's family with theta and tau chosen from the pair (Al-Baali and Khalfan, Pacific J. Optim. 1
    (2005); for physics-informed networks Urban, Stefanou and Pons, arXiv:2405.04230, equations 13-23).

    With b = s'Bs / y's, h = y'Hy / y's, a = h b - 1 and c = sqrt(a / (a + 1)):
    rho- = min(1, h (1 - c)), theta- = (rho- - 1) / a, theta = max(theta-, min(1 / rho-, (1 - b) / b)),
    sigma = 1 + a theta, power = |sigma|^{1 / (1 - P)}, rho = min(1, 1 / b), tau = min(rho power, sigma) for theta <= 0
    and rho min(power, 1 / theta) else; phi = (1 - theta) / sigma. "SSBroyden2" of the authors' code; they leave H
    unscaled before the first pair unless asked, here it always is.
    """

    def factors(
        self, state: FullInverse, step: Tensor, change: Tensor, image: Tensor, curved: float, gradient: Tensor
    ) -> tuple[float, float]:
        """See the class."""
        curvature = _own_curvature(state, step, gradient)
        if not curvature > 0.0:
            return 1.0, 1.0
        b, h = curvature / curved, float(change @ image) / curved
        a = h * b - 1.0
        if a <= 1e-12:  # y is a multiple of Bs: every member of the family is the same
            return min(1.0, 1.0 / b), 1.0
        below = min(1.0, h * (1.0 - (a / (a + 1.0)) ** 0.5))
        theta = max((below - 1.0) / a, min(1.0 / below, (1.0 - b) / b))
        sigma, rho = 1.0 + a * theta, min(1.0, 1.0 / b)
        power = abs(sigma) ** (1.0 / (1.0 - len(step))) if len(step) > 1 else 1.0
        tau = min(rho * power, sigma) if theta <= 0.0 else rho * min(power, 1.0 / theta)
        return tau, (1.0 - theta) / sigma


def _own_curvature(state: FullInverse, step: Tensor, gradient: Tensor) -> float:
    """s'Bs for a step s = -t H g: t (-s'g), with t from the lengths of s and H g."""
    image = state.inverse @ gradient
    length = float(step.norm() / image.norm().clamp(min=torch.finfo(step.dtype).tiny))
    return -length * float(step @ gradient)


@dataclass
class StoredPairs:
    """The last pairs, oldest first."""

    steps: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The pairs."""
        return {"steps": list(self.steps), "changes": list(self.changes)}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take them."""
        self.steps, self.changes = [v.clone() for v in values["steps"]], [v.clone() for v in values["changes"]]


@dataclass(frozen=True)
class LimitedBFGS:
    """The last ``memory`` pairs, applied by the two-loop recursion (Nocedal and Wright, algorithm 7.4).

    Args:
        memory: >= 1.

    Memory: 2 memory P numbers. Cost: 4 memory P flops per step.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        require_fields(self)
        require_positive_integer("memory", self.memory)

    def declines(self, parameters: int) -> str:
        """Nothing."""
        return ""

    def init(self, parameters: int, like: Tensor) -> StoredPairs:
        """No pairs: the identity."""
        return StoredPairs()

    def update(self, state: StoredPairs, step: Tensor, change: Tensor, gradient: Tensor) -> bool:
        """Store the pair, and forget the oldest."""
        if not _curves(step, change):
            return False
        state.steps, state.changes = [*state.steps, step][-self.memory :], [*state.changes, change][-self.memory :]
        return True

    def precondition(self, state: StoredPairs, gradient: Tensor) -> Tensor:
        """Two loops."""
        result, factors = gradient.clone(), []
        pairs = list(zip(state.steps, state.changes, strict=True))
        for step, change in reversed(pairs):
            factor = float(step @ result) / float(step @ change)
            factors.append(factor)
            result -= factor * change
        if pairs:
            step, change = pairs[-1]
            result *= float(step @ change) / float(change @ change)
        for (step, change), factor in zip(pairs, reversed(factors), strict=True):
            result += step * (factor - float(change @ result) / float(step @ change))
        return result
