"""A method: one part for every question an optimizer has to answer, checked to fit together before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, cast

from ...checking import require_fields, require_kind
from ...curvature.declarations import (
    DampingDeclarations,
    EstimatorDeclarations,
    StructureDeclarations,
    declared,
)
from ...curvature.estimators import Estimator, InputsOnly
from ...curvature.records.needs import LOOKING_BACK, Needs
from ...errors import ArgumentError, CompatibilityError, require_finite_nonnegative
from ...preconditioners.damping.levenberg_marquardt import AdaptiveDamping
from ...preconditioners.damping.scheduled import ScheduledDamping
from ...preconditioners.damping.split import ConstantDamping, Damping, SideDamping, TwoSided
from ...preconditioners.pairs.damping import PairDamping
from ...preconditioners.protocol import Preconditioner
from ...preconditioners.structures.by_layer import ByLayer, leaves
from ...preconditioners.structures.identity import Identity
from ...preconditioners.structures.kronecker import Kronecker
from ...preconditioners.structures.reference import reference_of, reference_of_part
from ...stepsize.constant import ConstantStep
from ...stepsize.guard import Guard, NoGuard
from ...stepsize.protocol import StepSize
from ..optimizer.arguments import as_number
from .momentum import EMA, Coupled, Momentum, WeightDecay
from .parts import instances, parts

__all__ = ["Method"]

_MEASURED = (Needs.ROOTS, Needs.VECTORS, Needs.MATRIX, Needs.PAIRS, Needs.CHANGES)
"""What only an estimator can provide."""

_NEEDS = (Needs, "take osculate.Needs.NOTHING, or what it is by name, joined by |")
"""What parts declare to need or to provide, and the end of the message if they declare anything else."""


@dataclass(frozen=True)
class Method:
    """A composition of parts.

    Args:
        preconditioner: structure of the curvature, or ``ByLayer`` to mix structures.
        curvature: which matrix is measured.
        damping: how lambda reaches the matrices that are inverted, and whether it adapts.
        momentum: recurrence on gradients, before preconditioning.
        weight_decay: coupled or decoupled.
        step_size: how far to go, all layers together.
        guard: whether a step stays, judged by the loss of the same mini-batch after it.
        fallback: structure for every parameter that ``preconditioner`` does not serve.
        warm_start: estimator of the initial pass over the data; ``None``: the method has none.
        defaults: ``lr``, ``damping``, ``weight_decay`` used where :func:`osculate.build` is given none.

    Raises:
        CompatibilityError: if a part needs what no other part provides; the message names the parts that would.
    """

    preconditioner: Preconditioner | ByLayer = field(default_factory=Identity)
    curvature: Estimator = field(default_factory=InputsOnly)
    damping: Damping = field(default_factory=ConstantDamping)
    momentum: Momentum = field(default_factory=EMA)
    weight_decay: WeightDecay = field(default_factory=Coupled)
    step_size: StepSize = field(default_factory=ConstantStep)
    guard: Guard = field(default_factory=NoGuard)
    fallback: Preconditioner = field(default_factory=Identity)
    warm_start: Estimator | None = None
    defaults: Mapping[str, float] = field(default_factory=lambda: {"lr": 1e-2, "damping": 0.0, "weight_decay": 0.0})

    def __post_init__(self) -> None:
        require_fields(self)
        unknown = sorted(set(self.defaults) - {"lr", "damping", "weight_decay"})
        if unknown:
            raise ArgumentError(f"defaults has unknown keys {unknown}; known: damping, lr, weight_decay")
        object.__setattr__(self, "defaults", MappingProxyType(dict(self.defaults)))
        self._check_answers()
        self._check_needs("curvature estimator", self.curvature)
        if self.adaptive_damping is not None and not self.needs:
            found = ", ".join(sorted({type(part).__name__ for part in leaves(self.preconditioner)}))
            raise CompatibilityError(
                f"{type(self.damping).__name__} evaluates mini-batches twice to choose a damping, and {found} has no "
                "matrix that is damped; use ConstantDamping(), or a structure with curvature like Kronecker(...)"
            )
        if self.warm_start is not None and not self.needs & LOOKING_BACK:
            self._check_needs("warm start", self.warm_start)
        if self.fallback.needs:
            raise CompatibilityError(
                f"fallback {type(self.fallback).__name__} needs {_names(self.fallback.needs)}, but it must serve "
                "modules without statistics; use Identity() or Diagonal()"
            )
        self._check_eigenvalues()
        self.check_values(**self.hyperparameters({}))

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: a read-only view of a dictionary has neither."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return partial(type(self), **(values | {"defaults": dict(self.defaults)})), ()

    @cached_property
    def needs(self) -> Needs:
        """Union of what the structures ask of the estimator."""
        total = Needs.NOTHING
        for part in leaves(self.preconditioner):
            total |= part.needs
        return total

    @cached_property
    def adaptive_damping(self) -> AdaptiveDamping | None:
        """The damping rule, if it also changes lambda."""
        return cast(AdaptiveDamping, self.damping) if declared(self.damping, DampingDeclarations).adapts else None

    def damping_at(self, value: float, step: int) -> float:
        """lambda of step ``step``: ``value``, that of the parameter group, unless the damping rule has a schedule."""
        rule = self.scheduled_damping
        return value if rule is None else rule.at(value, step)

    @cached_property
    def scheduled_damping(self) -> ScheduledDamping | None:
        """The damping rule, if it has a schedule of its own."""
        found = declared(self.damping, DampingDeclarations).scheduled
        return cast(ScheduledDamping, self.damping) if found else None

    @cached_property
    def balances_eigenvalues(self) -> bool:
        """Whether the damping rule wants the mean eigenvalues of Kronecker factors."""
        return declared(self.damping, DampingDeclarations).uses_eigenvalues

    @cached_property
    def measures_matrices(self) -> bool:
        """Whether the damping rule wants the mean eigenvalues of single matrices."""
        return declared(self.damping, DampingDeclarations).uses_whole

    @property
    def looks_back(self) -> bool:
        """Whether a step, or some of them, evaluates the same mini-batch again afterwards."""
        return self.looks_back_at(None)

    def looks_back_at(self, step: int | None) -> bool:
        """Whether step ``step`` evaluates the same mini-batch again afterwards; ``None``: whether any does."""
        adaptive = self.adaptive_damping
        judged = adaptive is not None and (step is None or adaptive.due(step))
        return judged or bool(self.needs & LOOKING_BACK) or self.guard.attempts > 0

    def measures_at(self, step: int | None) -> Needs:
        """What the quadratic forms of step ``step`` ask of the backend; ``None``: those of any step."""
        total = Needs.NOTHING
        for rule, needs in self._measuring:
            if step is None or rule.due(step):
                total |= needs
        return total

    @cached_property
    def _measuring(self) -> list[tuple[StepSize | AdaptiveDamping, Needs]]:
        """Rules with quadratic forms, and what these ask of the backend."""
        rules = [rule for rule in (self.step_size, self.adaptive_damping) if rule is not None]
        asked = [(rule, rule.needs & (Needs.SCORES | Needs.BATCH_SCORES | Needs.PRODUCTS)) for rule in rules]
        return [(rule, needs) for rule, needs in asked if needs]

    @property
    def needs_closure(self) -> bool:
        """Whether ``step`` must be given a closure."""
        return self.looks_back or Needs.PRODUCTS in self.measures_at(None) | self.asks

    @cached_property
    def asks(self) -> Needs:
        """What the estimator asks of the optimizer itself: ``PRODUCTS``, or nothing."""
        return declared(self.curvature, EstimatorDeclarations).asks

    @property
    def needs_likelihood(self) -> bool:
        """Whether some part draws labels from the model during training."""
        scores = Needs.SCORES | Needs.BATCH_SCORES
        return self.curvature.needs_likelihood or bool(self.measures_at(None) & scores)

    def reference(self) -> Method:
        """The same composition with dense matrices: every structure solves with its ``to_dense`` in double precision.

        Build it on a small float64 model beside the method itself; the two trajectories agree to rounding.
        """
        structure, fallback = reference_of(self.preconditioner), reference_of_part(self.fallback)
        return replace(self, preconditioner=structure, fallback=fallback)

    def hyperparameters(self, given: Mapping[str, float | None]) -> dict[str, float]:
        """``lr``, ``damping`` and ``weight_decay``: the given values, defaults where they are ``None``.

        Raises:
            ArgumentError: if a value is not a number.
        """
        names = ("lr", "damping", "weight_decay")
        standard = {"lr": 1e-2, "damping": 0.0, "weight_decay": 0.0} | dict(self.defaults)
        chosen = {name: given.get(name) for name in names}
        return {name: standard[name] if value is None else as_number(name, value) for name, value in chosen.items()}

    def check_values(self, *, lr: float, damping: float, weight_decay: float) -> None:
        """Check the numbers that live in the parameter groups.

        Raises:
            ArgumentError: if one is out of range, also for the parts (double damping needs damping < 1).
        """
        if not 0.0 <= lr < float("inf"):
            raise ArgumentError(f"lr must be a finite number >= 0, got {lr!r}")
        require_finite_nonnegative("damping", damping)
        require_finite_nonnegative("weight_decay", weight_decay)
        self._check_adaptation(damping, weight_decay)
        for part in leaves(self.preconditioner):
            if part.needs & (Needs.VECTORS | Needs.ROOTS | Needs.MATRIX) and not damping > 0.0:
                raise ArgumentError(
                    f"damping must be > 0 for {type(part).__name__}, whose averaged curvature is only semi-definite, "
                    f"got {damping!r}; a composed Method names its own with defaults={{'damping': 0.1}}"
                )
            if part.needs:
                self._sides(damping)
            pairs: PairDamping | None = declared(part, StructureDeclarations).pairs
            if pairs is not None:
                pairs.validate(self._pair_damping(part, damping))
                self._check_bounds(part, pairs)

    def _pair_damping(self, part: Preconditioner, damping: float) -> float:
        """mu2 of a structure: that of its side in a Kronecker product, else the whole lambda."""
        sides = self._sides(damping)
        return sides.outputs if isinstance(part, Kronecker) else sides.whole

    def _sides(self, damping: float) -> SideDamping:
        """What the damping rule makes of lambda, where a layer has one position and nothing else is known of it."""
        sides = self.damping.sides(damping, 1)
        if not all(hasattr(sides, entry.name) for entry in fields(SideDamping)):
            raise ArgumentError(
                f"sides({damping!r}, 1) of the damping {type(self.damping).__name__} must return a SideDamping, got "
                f"{sides!r}; return osculate.SideDamping(whole=..., inputs=..., outputs=...), the damping of a whole "
                "matrix and of the two factors of a Kronecker product"
            )
        return sides

    def _check_answers(self) -> None:
        """What the checks here ask of the parts is answered in kind."""
        asked: list[tuple[str, object, str, Any, str]] = [
            *(("structure", part, "needs", *_NEEDS) for part in leaves(self.preconditioner)),
            ("fallback", self.fallback, "needs", *_NEEDS),
            ("step size", self.step_size, "needs", *_NEEDS),
            ("guard", self.guard, "needs", *_NEEDS),
            ("guard", self.guard, "attempts", int, "how often a step may be shortened, 0 for never"),
            ("curvature", self.curvature, "provides", *_NEEDS),
        ]
        if self.warm_start is not None:
            asked.append(("warm start", self.warm_start, "provides", *_NEEDS))
        if self.adaptive_damping is not None:
            bounds = "lambda stays between minimum and maximum"
            asked += [("damping", self.damping, name, float, bounds) for name in ("minimum", "maximum")]
        for role, part, name, kind, way_out in asked:
            require_kind(f"{name} of the {role} {type(part).__name__}", getattr(part, name), kind, way_out)

    def _check_bounds(self, part: Preconditioner, pairs: PairDamping) -> None:
        """A pair damping takes every lambda that an adaptive rule may reach."""
        rule = self.adaptive_damping
        for value in () if rule is None else (rule.minimum, rule.maximum):
            try:
                pairs.validate(self._pair_damping(part, value))
            except ArgumentError as error:
                raise CompatibilityError(
                    f"{type(rule).__name__} may move damping to {value:g}, where {type(pairs).__name__} refuses it: "
                    f"{error}; or narrow the bounds, e.g. maximum=0.9"
                ) from None

    def _check_adaptation(self, damping: float, weight_decay: float) -> None:
        """Check what a damping rule that changes lambda needs of the numbers."""
        rule = self.adaptive_damping
        if rule is None:
            return
        name = type(rule).__name__
        if not rule.minimum <= damping <= rule.maximum:
            raise ArgumentError(
                f"damping must lie between the bounds of {name}, [{rule.minimum:g}, {rule.maximum:g}], got {damping!r}"
                f"; a composed Method names its own with defaults={{'damping': 0.1}}"
            )
        if self.weight_decay.shrinkage(weight_decay, 1.0):
            raise CompatibilityError(
                f"{name} compares the loss with a model of the step along the directions, and "
                f"{type(self.weight_decay).__name__} moves the parameters besides; use Coupled() or weight_decay=0"
            )

    def _check_eigenvalues(self) -> None:
        """A damping rule that balances Kronecker factors finds two in every Kronecker structure, and one structure."""
        if not self.balances_eigenvalues:
            return
        name = type(self.damping).__name__
        missing = {
            _describe(part): part.without_eigenvalues()
            for part in leaves(self.preconditioner)
            if isinstance(part, TwoSided) and part.without_eigenvalues() is not None
        }
        single = self.measures_matrices and any(
            declared(part, StructureDeclarations).mean_eigenvalue is not None for part in leaves(self.preconditioner)
        )
        if not missing and not single:
            found = ", ".join(sorted({type(part).__name__ for part in leaves(self.preconditioner)}))
            measured = "balances the two factors of Kronecker structures by their traces"
            if self.measures_matrices:
                measured = "measures lambda by the mean eigenvalue of a layer's matrix, or of the two factors of it"
            raise CompatibilityError(
                f"{name} {measured}, and {found} has none; use ConstantDamping(), whose lambda is absolute, or a "
                f"structure that has: {_measurable(self.measures_matrices)}"
            )
        for structure, factors in missing.items():
            if factors:
                raise CompatibilityError(
                    f"{name} balances both factors by their traces, and {' and '.join(factors)} in {structure} has "
                    "none; use Split(), or Covariance() on both sides"
                )

    def _check_needs(self, role: str, estimator: Estimator) -> None:
        for part in leaves(self.preconditioner):
            for need in _MEASURED:
                if need in part.needs and need not in estimator.provides:
                    raise CompatibilityError(
                        f"{_describe(part)} needs {_names(need)}, which the {role} {type(estimator).__name__} does not "
                        f"provide; estimators that do: {_suppliers(part.needs)}"
                    )
            if Needs.MATRIX in part.needs and not (
                estimator.definite or declared(part, StructureDeclarations).takes_indefinite
            ):
                raise CompatibilityError(
                    f"{_describe(part)} inverts a positive semi-definite matrix, but the {role} "
                    f"{type(estimator).__name__} may have negative eigenvalues; take {_suppliers(part.needs)}, or a "
                    "structure that declares takes_indefinite (Dense with a rule for its spectrum)"
                )


def _measurable(whole: bool) -> str:
    """Registered structures with two factors that have traces, and with one matrix that says its mean eigenvalue."""
    single = [
        cls.__name__
        for cls in parts()["structure"].values()
        if any(declared(part, StructureDeclarations).mean_eigenvalue is not None for part in instances(cls))
    ]
    return " or ".join(["Kronecker(Covariance(), Covariance())", *(f"{name}(...)" for name in single if whole)])


def _suppliers(needs: Needs) -> str:
    """Registered estimators that provide all of ``needs`` with a matrix that has no negative eigenvalue."""
    entries = [part for cls in parts()["curvature"].values() for part in instances(cls) if part.definite]
    wanted = [need for need in _MEASURED if need in needs]
    names = dict.fromkeys(type(part).__name__ for part in entries if all(need in part.provides for need in wanted))
    return ", ".join(f"{name}()" for name in names) or "none that is registered"


def _describe(part: Preconditioner) -> str:
    if isinstance(part, Kronecker):
        return f"Kronecker(inputs={type(part.inputs).__name__}, outputs={type(part.outputs).__name__})"
    return type(part).__name__


def _names(needs: Needs) -> str:
    words = {
        Needs.ROOTS: "per-sample gradients at the pre-activations (Needs.ROOTS)",
        Needs.VECTORS: "gradient vectors (Needs.VECTORS)",
        Needs.MATRIX: "the layer's dense curvature matrix (Needs.MATRIX)",
        Needs.PAIRS: "secant pairs (Needs.PAIRS)",
        Needs.CHANGES: "secant pairs of the parameters (Needs.CHANGES)",
        Needs.INPUTS: "layer inputs (Needs.INPUTS)",
    }
    return " and ".join(words.get(need, str(need.name)) for need in needs)
