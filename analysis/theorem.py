"""Theorems as objects: a claim, where it comes from, a computation that tests it, and one in which it must fail.

A check returns numbers, never a yes: every inequality carries what was measured, the bound, and the margin between the
two, so that a reader can see how close a claim came to failing. Assumptions are measured like conclusions, because "did
not converge" and "the theorem did not apply" are different findings. The negative control runs the same check in a
setting where the claim is false; a control that passes is an error of the checker.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError, require_positive_integer

__all__ = [
    "Control",
    "Curve",
    "Evidence",
    "Inequality",
    "Plot",
    "Setting",
    "Theorem",
    "Verdict",
    "agreement",
    "together",
    "verify",
    "worst",
]

Direction = Literal["<=", ">="]
Status = Literal["held", "violated", "assumption not met"]


@dataclass(frozen=True)
class Setting:
    """Where and with which randomness a theorem is checked. Everything is computed in float64.

    Args:
        seed: of every random choice, >= 0.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        widths: hidden widths for theorems about wide networks, each >= 1; empty: the theorem's own.
    """

    seed: int = 0
    device: str = "cpu"
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ArgumentError(f"seed must be an integer >= 0, got {self.seed!r}")
        for width in self.widths:
            require_positive_integer("widths: every width", width)

    def generator(self, stream: int = 0) -> torch.Generator:
        """A generator of its own for every ``stream``, on the CPU, so that all devices see the same numbers."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)


@dataclass(frozen=True)
class Inequality:
    """``measured <= bound`` or ``measured >= bound``: the instance with the smallest margin of all that were tried.

    Attributes:
        name: in words and symbols.
        measured: left side.
        bound: right side.
        direction: ``"<="`` or ``">="``.
        instances: how many were tried.
        tolerance: rounding allowed, relative to max(|bound|, 1e-300) or absolute where the bound is zero.
    """

    name: str
    measured: float
    bound: float
    direction: Direction = "<="
    instances: int = 1
    tolerance: float = 1e-9

    @property
    def margin(self) -> float:
        """Distance to the bound on the good side, relative to the bound (absolute if the bound is zero)."""
        if math.isnan(self.measured) or math.isnan(self.bound):
            return -math.inf
        if math.isinf(self.bound):
            return (
                math.inf if math.isfinite(self.measured) and (self.bound > 0) == (self.direction == "<=") else -math.inf
            )
        slack = self.bound - self.measured if self.direction == "<=" else self.measured - self.bound
        return slack / abs(self.bound) if self.bound else slack

    @property
    def holds(self) -> bool:
        """Whether it holds up to rounding; a number that is not finite on the left never does."""
        return math.isfinite(self.measured) and self.margin >= -self.tolerance


def worst(
    name: str,
    measured: Tensor | Sequence[float] | float,
    bound: Tensor | Sequence[float] | float,
    direction: Direction = "<=",
    tolerance: float = 1e-9,
) -> Inequality:
    """The instance with the smallest margin; one that is not a number comes first.

    Args:
        name: of the inequality.
        measured: left sides, any shape, at least one.
        bound: right sides, of the same shape or one for all.
        direction: of the inequality.
        tolerance: as in :class:`Inequality`.

    Raises:
        ArgumentError: if there is no instance.
    """
    left = torch.as_tensor(measured, dtype=torch.float64).detach().cpu().flatten()
    if not len(left):
        raise ArgumentError(f"{name}: no instance was tried; a claim about nothing is not checked")
    right = torch.as_tensor(bound, dtype=torch.float64).detach().cpu()
    right = right.expand(left.shape) if right.ndim == 0 else right.flatten()
    slack = right - left if direction == "<=" else left - right
    margin = torch.where(right == 0, slack, slack / right.abs())
    margin = torch.where(right.isinf() & left.isfinite(), slack, margin)
    margin = torch.where(left.isfinite() & ~margin.isnan(), margin, torch.full_like(margin, -math.inf))
    index = int(margin.argmin())
    return Inequality(name, float(left[index]), float(right[index]), direction, len(left), tolerance)


def agreement(name: str, found: Tensor, expected: Tensor, tolerance: float) -> Inequality:
    """Largest difference relative to the largest expected entry, one instance per slice of the first axis.

    Args:
        name: what agrees with what.
        found: (instances, ...), from the part under test.
        expected: the same shape, from an independent formula.
        tolerance: bound on the relative difference, > 0.
    """
    if found.shape != expected.shape:
        return Inequality(f"{name}: shapes {tuple(found.shape)}, {tuple(expected.shape)}", math.inf, tolerance)
    difference = (found - expected).flatten(1).abs().amax(1)
    scale = expected.flatten(1).abs().amax(1).clamp(min=torch.finfo(expected.dtype).tiny)
    return worst(name, difference / scale, tolerance)


def together(entries: Sequence[Inequality]) -> Inequality:
    """The one with the smallest margin, standing for the instances of all; of inequalities with one name and bound."""
    closest = min(entries, key=lambda entry: entry.margin)
    return replace(closest, instances=sum(entry.instances for entry in entries))


@dataclass(frozen=True)
class Curve:
    """One line of a plot. ``style``: ``"measured"``, ``"bound"`` or ``"control"``."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["measured", "bound", "control"] = "measured"


@dataclass(frozen=True)
class Plot:
    """What a figure shows: curves over one axis, or a map of values over two (``grid``: rows y, columns x)."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...] = ()
    x_log: bool = False
    y_log: bool = False
    grid: Sequence[Sequence[float]] | None = None
    grid_x: Sequence[float] = ()
    grid_y: Sequence[float] = ()


@dataclass(frozen=True)
class Evidence:
    """What one check computed.

    Attributes:
        inequalities: the claim; it holds if all of them do.
        assumptions: the theorem applies if all of them hold.
        constants: numbers that enter the bounds, by name with their symbol.
        plots: what a reader would rather see.
    """

    inequalities: tuple[Inequality, ...]
    assumptions: tuple[Inequality, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()

    @property
    def status(self) -> Status:
        """Whether the claim held, where it applied."""
        if not all(entry.holds for entry in self.assumptions):
            return "assumption not met"
        return "held" if all(entry.holds for entry in self.inequalities) else "violated"

    @property
    def refuted(self) -> bool:
        """Whether an inequality of the claim fails, assumptions apart: breaking those can be a control's very point."""
        return not all(entry.holds for entry in self.inequalities)

    @property
    def closest(self) -> Inequality:
        """The inequality with the smallest margin; one that fails before any that holds."""
        return min(self.inequalities, key=lambda entry: (entry.holds, entry.margin))


@dataclass(frozen=True)
class Control:
    """A further negative control: what it does wrong, and the same check with that."""

    claim: str
    check: Callable[[Setting], Evidence]


@dataclass(frozen=True)
class Theorem:
    """A claim that can be checked by running it.

    Attributes:
        name: e.g. ``"T11"``.
        claim: one sentence.
        equation: the inequality, in LaTeX (what matplotlib's mathtext can set).
        source: paper, version and section, or "ours" with the section of docs/PAPERS.md.
        check: computes the evidence.
        control: the same check where the claim must fail.
        control_claim: what the control does wrong.
        further: more negative controls; every one must fail.
    """

    name: str
    claim: str
    equation: str
    source: str
    check: Callable[[Setting], Evidence]
    control: Callable[[Setting], Evidence]
    control_claim: str
    further: tuple[Control, ...] = ()

    @property
    def controls(self) -> tuple[Control, ...]:
        """All negative controls."""
        return (Control(self.control_claim, self.control), *self.further)


@dataclass(frozen=True)
class Verdict:
    """A theorem, what its check and its controls found, and the seconds all took.

    Attributes:
        theorem: the claim.
        evidence: of its check.
        control: of its first control.
        seconds: all together.
        further: of its further controls, in their order.
    """

    theorem: Theorem
    evidence: Evidence
    control: Evidence
    seconds: float
    further: tuple[Evidence, ...] = ()

    @property
    def status(self) -> Status:
        """Of the claim."""
        return self.evidence.status

    @property
    def controls(self) -> tuple[Evidence, ...]:
        """Of all controls, in the order of :attr:`Theorem.controls`."""
        return (self.control, *self.further)

    @property
    def control_fails(self) -> bool:
        """Whether every negative control fails, as it must: an inequality of the claim is false there."""
        return all(evidence.refuted for evidence in self.controls)

    @property
    def ok(self) -> bool:
        """Held, and the check is able to fail."""
        return self.status == "held" and self.control_fails


def verify(theorem: Theorem, setting: Setting) -> Verdict:
    """Run a theorem's check and its controls in double precision."""
    start = time.perf_counter()
    evidence, *controls = [check(setting) for check in (theorem.check, *(entry.check for entry in theorem.controls))]
    return Verdict(theorem, evidence, controls[0], time.perf_counter() - start, tuple(controls[1:]))
