"""The registered methods with the settings of a recorded trajectory, and parts that let a replay watch them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ...curvature.likelihoods import Likelihood
from ...errors import ArgumentError, UnknownNameError
from ...framework import EMA, HeavyBall, Method
from ...framework.methods import registry
from ...preconditioners.averages import Average, MovingAverage, ZeroStartAverage
from ...preconditioners.factors.bfgs import BFGS
from ...preconditioners.factors.factor import Factor
from ...preconditioners.factors.lbfgs import LBFGS
from ...preconditioners.pairs.damping import DampedPair, DoubleDamping, PairDamping, PowellThenLM
from ...preconditioners.pairs.skipping import CurvatureTest
from ...preconditioners.protocol import Events
from ...preconditioners.structures.by_layer import ByLayer
from ...preconditioners.structures.diagonal import Diagonal
from ...preconditioners.structures.kronecker import Kronecker
from ...preconditioners.structures.mini_block import MiniBlock
from .trajectory import Settings, Trajectory

__all__ = ["Log", "Recipe", "RecordedTargets", "recipe_of"]

_BLOCKS = {
    "per_output": "per-output",
    "per_output_avg": "per-output-averaged",
    "per_input_avg": "per-input-averaged",
    "flat_chunk_avg": "flat-chunk",
    "flat_chunk": "flat-chunk",
}


@dataclass
class Log:
    """What the watched parts did in one step, layer by layer in the model's order."""

    pairs: list[DampedPair] = field(default_factory=list)
    outputs: list[Events] = field(default_factory=list)
    inputs: list[Events] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything."""
        self.pairs.clear()
        self.outputs.clear()
        self.inputs.clear()


@dataclass(frozen=True)
class WatchedDamping:
    """A pair damping that notes the pairs it hands on. Any damping is allowed: the file says what was run."""

    rule: PairDamping
    log: Log

    def validate(self, damping: float) -> None:
        """Nothing to refuse."""

    def damp(self, step: Tensor, change: Tensor, product: Tensor, damping: float) -> DampedPair:
        """The rule's pair."""
        pair = self.rule.damp(step, change, product, damping)
        if pair.step.ndim == 1:
            self.log.pairs.append(pair)
        else:  # a factor hands over a batch, the file has pair by pair
            fields = (pair.step, pair.change, pair.first, pair.second)
            self.log.pairs.extend(DampedPair(*values) for values in zip(*fields, strict=True))
        return pair


class WatchedFactor:
    """A Kronecker factor that notes its events; everything else is the factor's own."""

    def __init__(self, factor: Factor, events: list[Events]):
        self._factor, self._events = factor, events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._factor, name)

    def observe_step(self, *arguments: Any) -> Events:
        """The factor's look at the step."""
        events = self._factor.observe_step(*arguments)
        self._events.append(events)
        return events


class RecordedTargets:
    """A likelihood that hands out recorded labels in the place of its samples; all else is the likelihood's own."""

    def __init__(self, likelihood: Likelihood):
        self._likelihood = likelihood
        self.expected: Tensor | None = None

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """The recorded labels of this mini-batch."""
        if self.expected is None:
            raise ArgumentError("the method samples labels for a mini-batch, but the file has none recorded for it")
        return self.expected

    def __getattr__(self, name: str) -> Any:
        return getattr(self._likelihood, name)


@dataclass(frozen=True)
class Recipe:
    """How to run a trajectory.

    Args:
        method: the composition, with the method's default guard, which the recorded algorithms do not have.
        numbers: keywords for ``osculate.build``.
        log: what the watched parts write to.
    """

    method: Method
    numbers: Mapping[str, Any]
    log: Log


def recipe_of(trajectory: Trajectory, settings: Settings) -> Recipe:
    """The recipe for a file.

    Raises:
        UnknownNameError: for an unknown algorithm or rule.
        ArgumentError: for settings that are missing, contradictory, or that the library cannot reproduce.
    """
    name = re.sub(r"[^a-z0-9]+", "", str(trajectory.meta["algorithm"]).lower())
    if name not in _BUILDERS:
        raise UnknownNameError("algorithm", str(trajectory.meta["algorithm"]), ("K-BFGS", "K-BFGS(L)", "KFAC", "MBF"))
    log = Log()
    damping = settings.number("damping")
    for side in ("input_damping", "output_damping"):
        given = settings.number(side, math.sqrt(damping))
        if not math.isclose(given, math.sqrt(damping), rel_tol=1e-12):
            raise ArgumentError(f"setting {side!r} must be the root of the damping {damping}, got {given}")
    method = _BUILDERS[name](trajectory, settings, log)
    numbers = {"lr": settings.number("lr"), "weight_decay": settings.number("weight_decay", 0.0)}
    return Recipe(method, numbers | {"damping": damping}, log)


def _average(trajectory: Trajectory, settings: Settings) -> Average:
    """After a warm start the average continues from it; without one it starts from zero, not bias-corrected."""
    decay = settings.number("statistics_decay", 0.9)
    return MovingAverage(decay) if len(trajectory.warm_batches) else ZeroStartAverage(decay)


def _quasi_newton(name: str, trajectory: Trajectory, settings: Settings, log: Log) -> Method:
    memory = {"memory": settings.count("memory", 100)} if name == "kbfgs-l" else {}
    base = registry.method(name, limit=math.inf, **memory)
    own = CurvatureTest().tolerance
    threshold = settings.number("skip_threshold", own)
    if threshold != own:
        raise ArgumentError(f"setting 'skip_threshold' must be {own}, the library's own, got {threshold}")
    kronecker = base.preconditioner
    assert isinstance(kronecker, Kronecker)
    decay = settings.number("pair_decay", 0.9)  # read in any case: a setting that is there counts as used
    average = ZeroStartAverage(0.0 if trajectory.full_batch else decay)
    outputs = kronecker.outputs
    initial = settings.number("initial", 1.0)
    if isinstance(outputs, LBFGS):
        outputs = replace(outputs, initial=initial)
    elif initial != 1.0:
        raise ArgumentError(f"setting 'H_g_initial' must be 1 for K-BFGS, whose H_g starts as identity, got {initial}")
    assert isinstance(outputs, BFGS | LBFGS)
    rules: dict[str, Callable[[float], PairDamping]] = {"double": DoubleDamping, "powell-then-lm": PowellThenLM}
    rule = str(settings.get("pair_damping", "double"))
    if rule not in rules:
        raise UnknownNameError("pair damping", rule, rules)
    pairs = WatchedDamping(rules[rule](settings.number("mu1", 0.2)), log)
    outputs = replace(outputs, pairs=pairs, average=average)
    inputs: Any = replace(cast(Any, kronecker.inputs), average=_average(trajectory, settings))
    structure = replace(
        kronecker,
        inputs=cast(Factor, WatchedFactor(inputs, log.inputs)),
        outputs=cast(Factor, WatchedFactor(outputs, log.outputs)),
        schedule=replace(kronecker.schedule, statistics=settings.count("statistics_every", 1)),
    )
    return replace(base, preconditioner=structure, momentum=EMA(settings.number("momentum", 0.9)))


def _kfac(trajectory: Trajectory, settings: Settings, log: Log) -> Method:
    base = registry.method(
        "kfac",
        limit=math.inf,
        momentum=settings.number("momentum", 0.9),
        statistics_every=settings.count("statistics_every", 1),
        inverses_every=settings.count("inverses_every", 20),
        eager=settings.count("eager", 20),
    )
    kronecker = base.preconditioner
    assert isinstance(kronecker, Kronecker)
    average = _average(trajectory, settings)
    inputs, outputs = (replace(cast(Any, side), average=average) for side in (kronecker.inputs, kronecker.outputs))
    return replace(base, preconditioner=replace(kronecker, inputs=inputs, outputs=outputs))


def _mbf(trajectory: Trajectory, settings: Settings, log: Log) -> Method:
    name = str(settings.get("blocks", "per_output")).replace("-", "_").replace("averaged", "avg")
    if name not in _BLOCKS:
        raise UnknownNameError("rule 'fc_blocks'", name, _BLOCKS)
    base = registry.method(
        "mbf",
        blocks=_BLOCKS[name],
        units="absolute",
        limit=math.inf,
        statistics_every=settings.count("statistics_every", 2),
        inverses_every=settings.count("inverses_every", 25),
    )
    structure, momentum = base.preconditioner, settings.number("momentum", 0.9)
    assert isinstance(structure, ByLayer) and isinstance(structure.otherwise, Diagonal)
    if settings.number("diagonal_momentum", momentum) != momentum:
        raise ArgumentError("settings 'diag_beta1' and 'momentum_rho' must be equal: a method has one momentum")
    average = _average(trajectory, settings)
    table = {
        key: replace(part, average=average) for key, part in structure.table.items() if isinstance(part, MiniBlock)
    }
    diagonal = replace(  # e = (1 - rho) M, so that the epsilon beside M is the one beside e divided by (1 - rho)
        structure.otherwise,
        average=MovingAverage(settings.number("diagonal_decay", 0.999)),
        epsilon=settings.number("diagonal_epsilon", 1e-8) / (1.0 - momentum),
    )
    return replace(
        base, preconditioner=ByLayer(table, otherwise=diagonal), fallback=diagonal, momentum=HeavyBall(momentum)
    )


_BUILDERS: dict[str, Callable[[Trajectory, Settings, Log], Method]] = {
    "kbfgs": partial(_quasi_newton, "kbfgs"),
    "kbfgsl": partial(_quasi_newton, "kbfgs-l"),
    "kfac": _kfac,
    "mbf": _mbf,
}
