"""A method over all parameters at once: where its direction comes from, and how it goes along."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...checking import require_fields, require_kind
from ...errors import ArgumentError, CompatibilityError, UnknownNameError, require_interval
from ...preconditioners.whole.models import Curvature, GaussNewton, Secant, Spring
from ...preconditioners.whole.secant import FullBFGS, LimitedBFGS, SelfScaledBFGS, SelfScaledBroyden
from ...preconditioners.whole.systems import System, SystemBySize
from ...stepsize.search.levenberg_marquardt import Geodesic, LevenbergMarquardtSearch, Straight
from ...stepsize.search.lines import GridSearch, HagerZhang, StrongWolfe
from ...stepsize.search.protocol import Search
from ..methods.options import composed

__all__ = ["WholeEntry", "WholeMethod", "register_whole", "whole_method", "whole_methods"]


@dataclass(frozen=True)
class WholeMethod:
    """A composition for :class:`~osculate.WholeModel`.

    Args:
        curvature: the local model of the loss.
        search: how far to go.
        damping: > 0, relative to the largest eigenvalue of the curvature. Where a search adapts it: its beginning.

    Raises:
        CompatibilityError: if the search needs residuals and the curvature is that of any loss.
    """

    curvature: Curvature = field(default_factory=GaussNewton)
    search: Search = field(default_factory=LevenbergMarquardtSearch)
    damping: float = 1e-3

    def __post_init__(self) -> None:
        require_fields(self)
        require_interval("damping", self.damping, 0.0, float("inf"), closed="()")
        if self.search.needs_residuals and not self.curvature.needs_residuals:
            raise CompatibilityError(
                f"{type(self.search).__name__} damps the equations of residuals, and {type(self.curvature).__name__} "
                "has none; take a line search (StrongWolfe(), HagerZhang()), or GaussNewton()"
            )

    @property
    def needs_residuals(self) -> bool:
        """Whether ``step`` must be given residuals, and not a loss."""
        return self.curvature.needs_residuals or self.search.needs_residuals


def levenberg_marquardt(*, system: System | None = None, geodesic: bool = True) -> WholeMethod:
    """Levenberg-Marquardt with geodesic acceleration, for residuals.

    Args:
        system: how the equations are solved; ``None``: what suits the size.
        geodesic: whether steps are bent along the valley (arXiv:1201.5885); else the method of 1963.
    """
    bend = Geodesic() if geodesic else Straight()
    return WholeMethod(GaussNewton(system or SystemBySize()), LevenbergMarquardtSearch(bend))


def energy_natural_gradient(*, damping: float = 1e-14) -> WholeMethod:
    """Energy natural gradient descent (arXiv:2302.13163): the almost undamped Gauss-Newton direction, grid line search.

    Args:
        damping: > 0, relative to the largest eigenvalue.
    """
    return WholeMethod(GaussNewton(), GridSearch(), damping)


def spring(*, momentum: float = 0.9, damping: float = 1e-10) -> WholeMethod:
    """SPRING for physics-informed networks (arXiv:2505.12149): momentum in residual space, grid line search.

    Args:
        momentum: mu in [0, 1).
        damping: > 0, relative to the largest eigenvalue.
    """
    return WholeMethod(Spring(momentum), GridSearch(), damping)


def bfgs() -> WholeMethod:
    """Full-memory BFGS over all parameters with a strong Wolfe search, for any loss on a fixed batch."""
    return WholeMethod(Secant(FullBFGS()), StrongWolfe())


def self_scaled_bfgs() -> WholeMethod:
    """Self-scaled BFGS (arXiv:2405.04230) with a strong Wolfe search, for any loss on a fixed batch."""
    return WholeMethod(Secant(SelfScaledBFGS()), StrongWolfe())


def self_scaled_broyden() -> WholeMethod:
    """Self-scaled Broyden (arXiv:2405.04230) with a strong Wolfe search, for any loss on a fixed batch."""
    return WholeMethod(Secant(SelfScaledBroyden()), StrongWolfe())


def limited_bfgs(*, memory: int = 20) -> WholeMethod:
    """L-BFGS over all parameters with Hager and Zhang's search, for any loss on a fixed batch.

    Args:
        memory: pairs, >= 1.
    """
    return WholeMethod(Secant(LimitedBFGS(memory)), HagerZhang())


@dataclass(frozen=True)
class WholeEntry:
    """A registered method over all parameters.

    Attributes:
        name: what :func:`osculate.build` takes.
        paper: where it comes from.
        factory: function without required arguments that returns a :class:`WholeMethod`.
    """

    name: str
    paper: str
    factory: Callable[..., WholeMethod]

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the factory with their defaults."""
        return {name: entry.default for name, entry in inspect.signature(self.factory).parameters.items()}


_METHODS: dict[str, WholeEntry] = {
    entry.name: entry
    for entry in (
        WholeEntry("lm", "arXiv:1201.5885", levenberg_marquardt),
        WholeEntry("engd", "arXiv:2302.13163", energy_natural_gradient),
        WholeEntry("spring", "arXiv:2505.12149", spring),
        WholeEntry("bfgs", "baseline", bfgs),
        WholeEntry("ssbfgs", "arXiv:2405.04230", self_scaled_bfgs),
        WholeEntry("ssbroyden", "arXiv:2405.04230", self_scaled_broyden),
        WholeEntry("lbfgs", "baseline", limited_bfgs),
    )
}


def whole_methods() -> dict[str, WholeEntry]:
    """All registered methods over all parameters, by name."""
    return dict(_METHODS)


def whole_method(name: str, **options: Any) -> WholeMethod:
    """A registered method with options of its factory.

    Raises:
        UnknownNameError: for an unknown method or option; near misses are listed.
    """
    if name not in _METHODS:
        raise UnknownNameError("method", name, _METHODS)
    entry = _METHODS[name]
    for option in options:
        if option not in entry.options:
            where = f"'osculate methods {name}' in a shell explains all"
            raise UnknownNameError(f"option of {name}", option, entry.options, where)
    return composed(name, entry.factory, options)


def register_whole(name: str, factory: Callable[..., WholeMethod], *, paper: str = "") -> None:
    """Add a method over all parameters.

    Raises:
        ArgumentError: if the name is taken, or the factory is no function.
    """
    require_kind("factory", factory, Callable, "pass a function that returns a WholeMethod")
    if name in _METHODS:
        raise ArgumentError(f"method {name!r} is registered already; choose another name")
    _METHODS[name] = WholeEntry(name, paper, factory)
