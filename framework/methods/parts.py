"""The table of parts, with example instances of each: what the compositions and the contract suite run over.

It imports the parts; no part imports it, and it knows no method, so that a method may look its parts up. Third parties
add with :func:`register_part`, or through the entry-point group ``osculate.parts``: an entry point names a function
without arguments that registers what its package has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from importlib.metadata import entry_points
from inspect import Parameter, signature
from itertools import product
from typing import Any

from ... import curvature, preconditioners, stepsize
from ...curvature.declarations import FactorDeclarations, declared
from ...errors import ArgumentError, CompatibilityError, UnknownNameError
from ...preconditioners import Kronecker, MiniBlock, Schedule, SecantBlocks
from . import momentum

__all__ = [
    "EXAMPLES",
    "KINDS",
    "examples",
    "instances",
    "label",
    "load_entry_points",
    "parts",
    "register_part",
    "structure_examples",
]


def _named(*classes: type) -> dict[str, type]:
    return {cls.__name__: cls for cls in classes}


KINDS: dict[str, dict[str, type]] = {
    "curvature": _named(
        curvature.InputsOnly,
        curvature.BatchMean,
        curvature.SampledBatchMean,
        curvature.EmpiricalFisher,
        curvature.SampledFisher,
        curvature.ExactGGN,
        curvature.ExactHessianBlock,
        curvature.SecantPairs,
        curvature.WithPairs,
    ),
    "quadratic form": _named(
        curvature.SampledScores,
        curvature.SampledBatchScores,
        curvature.SignedHessian,
        curvature.ExactHessian,
        curvature.HessianRowSums,
    ),
    "structure": _named(
        preconditioners.Identity,
        preconditioners.Diagonal,
        preconditioners.MiniBlock,
        preconditioners.SecantBlocks,
        preconditioners.Kronecker,
        preconditioners.Eigenbasis,
        preconditioners.Dense,
        preconditioners.Spectral,
        preconditioners.ByLayer,
    ),
    "partition": _named(
        preconditioners.PerOutput,
        preconditioners.PerOutputAveraged,
        preconditioners.PerInputAveraged,
        preconditioners.FlatChunk,
        preconditioners.Kernel,
    ),
    "factor": _named(
        preconditioners.Covariance,
        preconditioners.HessianActionBFGS,
        preconditioners.BFGS,
        preconditioners.LBFGS,
        preconditioners.IdentityFactor,
        preconditioners.Root,
        preconditioners.GradientCovariance,
    ),
    "sharing": _named(preconditioners.Expand, preconditioners.Reduce, preconditioners.Sum),
    "moments": _named(preconditioners.LayerMoments, preconditioners.GradientMoments),
    "spectrum": _named(preconditioners.Semidefinite, preconditioners.Absolute),
    "update scale": _named(preconditioners.AspectRatio, preconditioners.MatchAdam),
    "operation": _named(
        preconditioners.Inverse,
        preconditioners.InverseRoot,
        preconditioners.AbsoluteInverse,
        preconditioners.Eigenvectors,
        preconditioners.PowerIteration,
    ),
    "damping": _named(
        preconditioners.ConstantDamping,
        preconditioners.Split,
        preconditioners.Factored,
        preconditioners.LevenbergMarquardt,
        preconditioners.Scheduled,
    ),
    "pair damping": _named(
        preconditioners.DoubleDamping,
        preconditioners.PowellThenLM,
        preconditioners.PowellH,
        preconditioners.MergedDoubleDamping,
        preconditioners.PowellB0,
        preconditioners.NoDamping,
    ),
    "initial scale": _named(preconditioners.ConstantScale, preconditioners.NewestPair),
    "skip rule": _named(
        preconditioners.CurvatureTest, preconditioners.TwoSidedCurvatureTest, preconditioners.AngleTest
    ),
    "average": _named(
        preconditioners.MovingAverage,
        preconditioners.ZeroStartAverage,
        preconditioners.PlainAverage,
        preconditioners.RunningSum,
    ),
    "momentum": _named(momentum.EMA, momentum.CorrectedEMA, momentum.HeavyBall, momentum.Nesterov, momentum.NoMomentum),
    "weight decay": _named(momentum.Coupled, momentum.Decoupled),
    "step size": _named(
        stepsize.ConstantStep,
        stepsize.LayerwiseQuadratic,
        stepsize.JointLayerwise,
        stepsize.JointWithLastStep,
        stepsize.GlobalWithLastStep,
        stepsize.GlobalQuadratic,
        stepsize.SelfConcordant,
        stepsize.RelativeBound,
        stepsize.KLClip,
    ),
    "coupling": _named(stepsize.RowSums, stepsize.Separate),
    "slope": _named(stepsize.LeadingSlope, stepsize.MomentumSlope),
    "sign": _named(stepsize.Clipped, stepsize.Safeguarded, stepsize.Unrestricted),
    "guard": _named(stepsize.Backtrack, stepsize.Armijo, stepsize.Nonmonotone, stepsize.NoGuard),
}
"""Every part by kind and by the name under which ``osculate`` exports it."""

EXAMPLES: dict[type, tuple[Any, ...]] = {
    preconditioners.ByLayer: (
        preconditioners.ByLayer({"Linear": MiniBlock()}, otherwise=preconditioners.Diagonal(source="momentum")),
    ),
    preconditioners.Diagonal: (preconditioners.Diagonal(), preconditioners.Diagonal(power=1.0, epsilon=0.1)),
    preconditioners.Dense: (
        preconditioners.Dense(schedule=Schedule(inverses=2)),
        preconditioners.Dense(preconditioners.Absolute(), schedule=Schedule(inverses=2)),
    ),
    preconditioners.Eigenbasis: (
        preconditioners.Eigenbasis(schedule=Schedule(inverses=2)),
        preconditioners.Eigenbasis(preconditioners.GradientMoments(), power=0.5, schedule=Schedule(inverses=2)),
    ),
    preconditioners.LBFGS: (preconditioners.LBFGS(memory=3),),
    preconditioners.SecantBlocks: (preconditioners.SecantBlocks(memory=2),),
    preconditioners.LevenbergMarquardt: (preconditioners.LevenbergMarquardt(every=2, maximum=0.9),),
    preconditioners.Scheduled: (preconditioners.Scheduled(factor=preconditioners.Geometric(0.8)),),
    stepsize.RelativeBound: (
        stepsize.RelativeBound(stepsize.JointLayerwise()),
        stepsize.RelativeBound(stepsize.JointWithLastStep()),
    ),
}
"""Instances to try, for parts whose default construction is missing or not telling."""


_PARTS = {kind: dict(table) for kind, table in KINDS.items()}
_EXAMPLES = dict(EXAMPLES)
_loaded = False


def load_entry_points() -> None:
    """Let installed packages register what they have; later calls do nothing."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for entry in entry_points(group="osculate.parts"):
        entry.load()()


def parts() -> dict[str, dict[str, type]]:
    """All registered parts by kind and name."""
    load_entry_points()
    return {kind: dict(table) for kind, table in _PARTS.items()}


def register_part(kind: str, cls: type, *instances: Any) -> None:
    """Add a part to the table of its kind.

    Args:
        kind: one of the kinds that :func:`parts` lists.
        cls: the part, a frozen dataclass.
        *instances: examples that compositions and contracts are tried with; none: ``cls()`` if it needs no arguments.

    Raises:
        UnknownNameError: for an unknown kind.
        ArgumentError: if the name is taken, an instance takes the place of the class, or the class has none of the
            kind's verbs.
    """
    if kind not in _PARTS:
        raise UnknownNameError("kind of part", str(kind), _PARTS)
    if not isinstance(cls, type):
        name = type(cls).__name__
        raise ArgumentError(
            f"register_part takes a class, got {cls!r}; write register_part({kind!r}, {name}, {name}(...))"
        )
    verbs = _verbs(kind)
    if verbs and not any(hasattr(cls, verb) for verb in verbs):
        raise ArgumentError(
            f"{cls.__name__} is no {kind}: it has none of the verbs {', '.join(verbs)}; see osculate's own, or "
            "docs/examples/own_parts"
        )
    if cls.__name__ in _PARTS[kind]:
        raise ArgumentError(f"{kind} {cls.__name__!r} is registered already; choose another name")
    _PARTS[kind][cls.__name__] = cls
    if instances:
        _EXAMPLES[cls] = instances


def _verbs(kind: str) -> list[str]:
    """What all parts of a kind that ship can be asked."""
    classes = [cls for cls in KINDS[kind].values() if cls is not preconditioners.ByLayer]  # which only points to others
    shared = set.intersection(*({name for name in dir(cls) if not name.startswith("_")} for cls in classes))
    return sorted(name for name in shared if all(callable(getattr(cls, name, None)) for cls in classes))


def examples() -> dict[str, dict[str, Any]]:
    """Instances of every registered part, by kind and short name: what compositions and contracts are tried with."""
    found = {kind: [part for cls in table.values() for part in instances(cls)] for kind, table in parts().items()}
    covers_all = [part for part in found["partition"] if part.joint]
    found["structure"] += structure_examples(covers_all, found["factor"], found["pair damping"])
    return {kind: {label(part): part for part in entries} for kind, entries in found.items()}


def instances(cls: type) -> tuple[Any, ...]:
    """Example instances of one part: those of the table, else the part with its defaults, if it has them all."""
    if cls in _EXAMPLES:
        return _EXAMPLES[cls]
    required = [name for name, entry in signature(cls).parameters.items() if _is_required(entry)]
    return () if required else (cls(),)


def _is_required(entry: Parameter) -> bool:
    return entry.default is Parameter.empty and entry.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def structure_examples(
    partitions: Iterable[Any], factors: Iterable[Any], pair_dampings: Iterable[Any]
) -> tuple[Any, ...]:
    """Mini-blocks of both kinds with every partition, and Kronecker structures with every pair of factors that fits.

    Inverses are renewed at every second step, so that stale ones are tried too. Where a factor takes secant pairs,
    every pair damping is tried beside the Hessian-action factor of K-BFGS; and on mini-blocks.
    """
    schedule = Schedule(statistics=1, inverses=2)
    found: list[Any] = []
    for partition in partitions:
        found += [MiniBlock(partition, schedule=schedule), SecantBlocks(partition, memory=2)]
    usual = SecantBlocks().pairs
    found += [SecantBlocks(memory=2, pairs=rule) for rule in pair_dampings if rule != usual]
    sides = list(factors)
    for inner, outer in product(sides, sides):
        found.extend(_kronecker(inner, outer, schedule))
    hessian_action = preconditioners.HessianActionBFGS()
    for outer, pairs in product(sides, pair_dampings):
        if declared(outer, FactorDeclarations).pairs not in (None, pairs):
            found.extend(_kronecker(hessian_action, dataclasses.replace(outer, pairs=pairs), schedule))
    return tuple(found)


def _kronecker(inner: Any, outer: Any, schedule: Schedule) -> Iterable[Kronecker]:
    if isinstance(inner, preconditioners.HessianActionBFGS):
        schedule = Schedule(statistics=1, inverses=None)
    try:
        yield Kronecker(inner, outer, schedule)
    except CompatibilityError:
        return


def label(part: Any) -> str:
    """Short name of an instance: its class, and in brackets the parts and numbers that differ from the defaults.

    Example:
        >>> import osculate as osc
        >>> label(osc.Kronecker(osc.Covariance(), osc.LBFGS(memory=3)))
        'Kronecker(Covariance, LBFGS(memory=3))'
    """
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return type(part).__name__ if type(part).__repr__ is object.__repr__ else str(part)
    shown: list[str] = []
    for entry in dataclasses.fields(part):
        value = getattr(part, entry.name)
        if isinstance(value, Schedule) or value == _default(entry):
            continue
        shown.append(label(value) if dataclasses.is_dataclass(value) else f"{entry.name}={_short(value)}")
    return f"{type(part).__name__}({', '.join(shown)})" if shown else type(part).__name__


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default is not dataclasses.MISSING:
        return entry.default
    return None if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _short(value: Any) -> str:
    if hasattr(value, "items"):
        return "{" + ", ".join(f"{key}: {label(entry)}" for key, entry in value.items()) + "}"
    return getattr(value, "__qualname__", None) or str(value)
