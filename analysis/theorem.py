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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Curve", "Evidence", "Inequality", "Plot", "Setting", "Theorem", "Verdict", "verify", "worst"]

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
        slack = self.bound - self.measured if self.direction == "<=" else self.measured - self.bound
        return slack / abs(self.bound) if self.bound else slack

    @property
    def holds(self) -> bool:
        """Whether it holds up to rounding; a number that is not finite on the left never does."""
        return math.isfinite(self.measured) and (self.margin >= -self.tolerance or self.bound == math.inf)


def worst(
    name: str,
    measured: Tensor | Sequence[float],
    bound: Tensor | Sequence[float] | float,
    direction: Direction = "<=",
    tolerance: float = 1e-9,
) -> Inequality:
    """The instance with the smallest margin; one that is not finite comes first.

    Args:
        name: of the inequality.
        measured: left sides, any shape, at least one.
        bound: right sides, of the same shape or one for all.
        direction: of the inequality.
        tolerance: as in :class:`Inequality`.
    """
    left = torch.as_tensor(measured, dtype=torch.float64).detach().cpu().flatten()
    right = torch.as_tensor(bound, dtype=torch.float64).detach().cpu().expand(left.shape).flatten()
    entries = [
        Inequality(name, a, b, direction, len(left), tolerance)
        for a, b in zip(left.tolist(), right.tolist(), strict=True)
    ]
    return min(entries, key=lambda entry: entry.margin if math.isfinite(entry.measured) else -math.inf)


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
    def closest(self) -> Inequality:
        """The inequality with the smallest margin."""
        return min(self.inequalities, key=lambda entry: entry.margin)


@dataclass(frozen=True)
class Theorem:
    """A claim that can be checked by running it.

    Attributes:
        name: e.g. ``"T11"``.
        claim: one sentence.
        equation: the inequality, in LaTeX.
        source: paper, version and section, or "ours" with the section of docs/PAPERS.md.
        check: computes the evidence.
        control: the same check where the claim must fail.
        control_claim: what the control does wrong.
    """

    name: str
    claim: str
    equation: str
    source: str
    check: Callable[[Setting], Evidence]
    control: Callable[[Setting], Evidence]
    control_claim: str


@dataclass(frozen=True)
class Verdict:
    """A theorem, what its check and its control found, and the seconds both took."""

    theorem: Theorem
    evidence: Evidence
    control: Evidence
    seconds: float

    @property
    def status(self) -> Status:
        """Of the claim."""
        return self.evidence.status

    @property
    def control_fails(self) -> bool:
        """Whether the negative control fails, as it must: an inequality is violated."""
        return self.control.status == "violated"

    @property
    def ok(self) -> bool:
        """Held, and the check is able to fail."""
        return self.status == "held" and self.control_fails


def verify(theorem: Theorem, setting: Setting) -> Verdict:
    """Run a theorem's check and its control in double precision."""
    start = time.perf_counter()
    evidence, control = theorem.check(setting), theorem.control(setting)
    return Verdict(theorem, evidence, control, time.perf_counter() - start)
