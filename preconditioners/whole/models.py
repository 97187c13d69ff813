"""Local models of a loss over all parameters, and the directions that are read off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...checking import require_fields
from ...errors import require_interval
from .secant import SecantUpdate
from .systems import Products, Solver, System, SystemBySize

__all__ = [
    "Curvature",
    "GaussNewton",
    "Linearised",
    "Secant",
    "SecantModel",
    "Sighted",
    "Spring",
    "SpringState",
    "flattened",
]


@dataclass(frozen=True)
class Sighted:
    """What one evaluation of a mini-batch gives.

    Attributes:
        loss: of the mini-batch.
        gradient: (P,).
        residuals: (V,) or ``None``.
        slopes: (V,) derivative of the loss by each residual, or ``None``.
        curvatures: (V,) second derivative, >= 0, or ``None``.
        rows: (V, P) derivatives of the residuals, if they were asked for.
        products: with the same, or ``None``.
    """

    loss: float
    gradient: Tensor
    residuals: Tensor | None = None
    slopes: Tensor | None = None
    curvatures: Tensor | None = None
    rows: Tensor | None = None
    products: Products | None = None


class Curvature(Protocol):
    """Where directions come from."""

    needs_residuals: bool
    """Whether it works for sums over residuals only."""

    @property
    def system(self) -> System | None:
        """How its equations are solved; ``None`` for curvature that solves none."""

    def declines(self, parameters: int) -> str:
        """Why it does not take so many parameters, or an empty string."""

    def init(self, parameters: int, like: Tensor) -> Any:
        """Fresh state with ``to_dict`` and ``load_dict``, or ``None``."""

    def model(self, state: Any, seen: Sighted) -> Any:
        """The local model, see :class:`osculate.stepsize.search.protocol.LocalModel`."""

    def learn(self, state: Any, seen: Sighted, step: Tensor, gradient: Tensor | None) -> None:
        """Take in the step that was made, and the gradient after it if the search has evaluated it."""


@dataclass(frozen=True)
class Linearised:
    """The loss with its residuals linearised: Gauss and Newton's model.

    With A = diag(sqrt(curvatures)) J: minimises g'h + |A h|^2 / 2 + lambda |h|^2 / 2.

    ``slid`` is a step that is made in any case (Spring's momentum): directions are the rest from there.
    """

    seen: Sighted
    products: Products
    solver: Solver
    weighted: Tensor
    rest: Tensor | None
    roots: Tensor
    slid: Tensor | None = None

    @property
    def loss(self) -> float:
        """Of the mini-batch."""
        return self.seen.loss

    @property
    def gradient(self) -> Tensor:
        """(P,)."""
        return self.seen.gradient

    @property
    def residuals(self) -> Tensor:
        """(V,)."""
        assert self.seen.residuals is not None
        return self.seen.residuals

    @property
    def scale(self) -> float:
        """The largest eigenvalue of A'A."""
        return max(self.solver.largest, torch.finfo(self.gradient.dtype).tiny)

    def direction(self, damping: float) -> Tensor:
        """-(A'A + lambda I)^{-1} g, or from ``slid``: slid - (A'A + lambda I)^{-1} (g + A'A slid)."""
        if self.slid is None:
            return -self.solver.solve(self.weighted, self.rest, damping)
        moved = self.weighted + self.products.times(self.slid)
        return self.slid - self.solver.solve(moved, self.rest, damping)

    def predicted(self, step: Tensor) -> float:
        """-(g'h + |A h|^2 / 2)."""
        image = self.products.times(step)
        return -float(self.gradient @ step) - 0.5 * float(image @ image)

    def correction(self, second: Tensor, damping: float) -> Tensor:
        """-(A'A + lambda I)^{-1} A' diag(sqrt(curvatures)) second."""
        return -self.solver.solve(self.roots * second, None, damping)

    def change(self, step: Tensor) -> Tensor:
        """J h."""
        image = self.products.times(step)
        return torch.where(self.roots > 0.0, image / self.roots, torch.zeros_like(image))


def _weighted(seen: Sighted) -> tuple[Tensor | None, Products, Tensor, Tensor | None, Tensor]:
    """A (or ``None``), its products, u with A'u + rest = g, rest, and the square roots of the curvatures.

    Residuals without curvature (outliers of Huber's) have a slope all the same: that part of g stays in ``rest``.
    """
    assert seen.slopes is not None and seen.curvatures is not None and seen.products is not None
    roots, given = seen.curvatures.sqrt(), seen.products
    products = Products(
        given.shape, lambda x: roots * given.times(x), lambda u: given.transposed(roots * u), seen.gradient
    )
    rows = None if seen.rows is None else roots[:, None] * seen.rows
    flat = roots == 0.0
    weighted = torch.where(
        flat, torch.zeros_like(roots), seen.slopes / torch.where(flat, torch.ones_like(roots), roots)
    )
    rest = given.transposed(torch.where(flat, seen.slopes, torch.zeros_like(roots))) if bool(flat.any()) else None
    return rows, products, weighted, rest, roots


@dataclass(frozen=True)
class GaussNewton:
    """The Gauss-Newton matrix of the residuals over all parameters: curvature between layers included.

    With a constant damping and a grid of lengths this is energy natural gradient descent (arXiv:2302.13163); with
    :class:`~osculate.LevenbergMarquardtSearch` it is the method of Levenberg and Marquardt.

    Args:
        system: how its equations are solved.

    Memory: V P numbers for V residuals and P parameters, unless the system is free of matrices.
    """

    system: System = field(default_factory=SystemBySize)
    needs_residuals = True

    def __post_init__(self) -> None:
        require_fields(self)

    def declines(self, parameters: int) -> str:
        """The system looks at both sides."""
        return ""

    def init(self, parameters: int, like: Tensor) -> None:
        """No state: each mini-batch speaks for itself."""
        return

    def model(self, state: None, seen: Sighted) -> Linearised:
        """The model of this mini-batch."""
        rows, products, weighted, rest, roots = _weighted(seen)
        return Linearised(seen, products, self.system.prepare(rows, products), weighted, rest, roots)

    def learn(self, state: None, seen: Sighted, step: Tensor, gradient: Tensor | None) -> None:
        """Nothing."""


@dataclass
class SpringState:
    """The last step, (P,)."""

    last: Tensor

    def to_dict(self) -> dict[str, Any]:
        """The step."""
        return {"last": self.last}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy it into place."""
        self.last.copy_(values["last"])


@dataclass(frozen=True)
class Spring:
    """Gauss-Newton steps that begin from a part of the last one: momentum in residual space.

    Goldshlager, Abrahamsen and Lin, arXiv:2401.10190; for physics-informed networks Guzman-Cordero et al.,
    arXiv:2505.12149.

    h = mu p - (A'A + lambda I)^{-1} A'(u + mu A p), the step nearest to mu p that the damped equations allow. What a
    mini-batch does not see keeps its momentum: made for few residuals per step.

    Args:
        momentum: mu in [0, 1).
        system: how its equations are solved.

    Memory: V P + P numbers.
    """

    momentum: float = 0.9
    system: System = field(default_factory=SystemBySize)
    needs_residuals = True

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("momentum", self.momentum, 0.0, 1.0)

    def declines(self, parameters: int) -> str:
        """The system looks at both sides."""
        return ""

    def init(self, parameters: int, like: Tensor) -> SpringState:
        """No last step."""
        return SpringState(torch.zeros(parameters, dtype=like.dtype, device=like.device))

    def model(self, state: SpringState, seen: Sighted) -> Linearised:
        """The model of this mini-batch, slid along the last step."""
        rows, products, weighted, rest, roots = _weighted(seen)
        solver = self.system.prepare(rows, products)
        return Linearised(seen, products, solver, weighted, rest, roots, self.momentum * state.last)

    def learn(self, state: SpringState, seen: Sighted, step: Tensor, gradient: Tensor | None) -> None:
        """Keep the step."""
        state.last.copy_(step)


@dataclass(frozen=True)
class SecantModel:
    """A quadratic model with an inverse Hessian from secant pairs."""

    seen: Sighted
    along: Tensor

    scale = 1.0

    @property
    def loss(self) -> float:
        """Of the mini-batch."""
        return self.seen.loss

    @property
    def gradient(self) -> Tensor:
        """(P,)."""
        return self.seen.gradient

    @property
    def residuals(self) -> Tensor:
        """(V,)."""
        assert self.seen.residuals is not None
        return self.seen.residuals

    def direction(self, damping: float) -> Tensor:
        """-H g; nothing is damped."""
        return self.along

    def predicted(self, step: Tensor) -> float:
        """Half of the first order: what the model says of its own minimum."""
        return -0.5 * float(self.gradient @ step)

    def correction(self, second: Tensor, damping: float) -> Tensor:
        """None is known."""
        return torch.zeros_like(self.along)

    def change(self, step: Tensor) -> Tensor:
        """Nothing is known of residuals."""
        return torch.zeros_like(self.residuals)


@dataclass(frozen=True)
class Secant:
    """A quasi-Newton method over all parameters, for any differentiable loss.

    Pairs come from one mini-batch each: the gradient before and after a step on the same data.

    Args:
        update: how pairs become an inverse.
    """

    update: SecantUpdate
    needs_residuals = False
    system = None

    def __post_init__(self) -> None:
        require_fields(self)

    def declines(self, parameters: int) -> str:
        """As the update."""
        return self.update.declines(parameters)

    def init(self, parameters: int, like: Tensor) -> Any:
        """The identity."""
        return self.update.init(parameters, like)

    def model(self, state: Any, seen: Sighted) -> SecantModel:
        """-H g."""
        return SecantModel(seen, -self.update.precondition(state, seen.gradient))

    def learn(self, state: Any, seen: Sighted, step: Tensor, gradient: Tensor | None) -> None:
        """The pair of this step."""
        if gradient is not None:
            self.update.update(state, step, gradient - seen.gradient, seen.gradient)


def flattened(values: Sequence[Tensor]) -> Tensor:
    """Tensors one after another, (P,)."""
    return torch.cat([value.reshape(-1) for value in values])
