"""What is run: problem, method, numbers, seed; and for how long."""

from __future__ import annotations

import ast
import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ... import registry
from ...errors import ArgumentError, UnknownNameError
from ...framework.methods.expressions import with_parts
from ...framework.methods.method import Method
from ...framework.whole_model.method import WholeEntry
from ..rivals.catalogue import runnable
from ..rivals.rival import Rival

__all__ = ["SCHEDULES", "Budget", "RunConfig", "WarmStart", "differences", "parse_options"]

SCHEDULES = ("cosine", "linear", "constant")
"""How a learning rate may change over a run, see :mod:`.schedules`."""

_NUMBERS = ("lr", "damping", "weight_decay")
_RESERVED = {
    "seed": "it has a flag of its own, --seed",
    "likelihood": "the problem decides it",
    "loss_reduction": "the problem decides it",
    "model": "the problem decides it",
    "method": "it is chosen by --method or --methods",
}
_LARGEST_SEED = 2**32 - 1  # the generators of sampled labels multiply it


class WarmStart(enum.Enum):
    """Whether a method that has an initial pass over the data runs it."""

    AUTO = "auto"
    """Run it where the method has one."""
    NONE = "none"
    """Start from the method's plain initial state."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the course of a run, and nothing about the machine or the run's length.

    Args:
        problem: registered problem.
        method: registered method, or a rival.
        lr: learning rate; None is the method's default.
        damping: damping; None is the method's default.
        weight_decay: weight decay; None is the method's default.
        batch_size: samples in a mini-batch, >= 1; None is the problem's own.
        seed: seed of the initial parameters, the order of the data, dropout and the method's sampling, 0 ... 2^32 - 1.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        warm_start: whether the method's initial pass runs.
        problem_options: further keywords of the problem.
        method_options: further keywords of the method.
        parts: parts of the method exchanged for others, see :func:`osculate.framework.methods.expressions.with_parts`.
        lr_schedule: how the learning rate declines over the run's budget: ``cosine`` or ``linear`` to zero, or
            ``constant``; None leaves it alone.
        lr_warm_up: share of the budget over which the learning rate rises linearly first, in [0, 1).

    Raises:
        ArgumentError: ``batch_size``, ``seed`` or ``lr_warm_up`` is out of range, or there is no such schedule.
    """

    problem: str
    method: str
    lr: float | None = None
    damping: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "cpu"
    warm_start: WarmStart = WarmStart.AUTO
    problem_options: Mapping[str, Any] = field(default_factory=dict)
    method_options: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    lr_schedule: str | None = None
    lr_warm_up: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ArgumentError(f"batch_size must be >= 1, got {self.batch_size}; leave it out for the problem's own")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ArgumentError(f"seed must be >= 0 and at most {_LARGEST_SEED}, got {self.seed}")
        if self.lr_schedule is not None and self.lr_schedule not in SCHEDULES:
            raise UnknownNameError("lr_schedule", str(self.lr_schedule), SCHEDULES)
        if not _is_number(self.lr_warm_up, int | float) or not 0 <= self.lr_warm_up < 1:
            raise ArgumentError(f"lr_warm_up is a share of the budget in [0, 1), got {self.lr_warm_up!r}")

    def suited_to(self, settings: Mapping[str, Mapping[str, float | str]]) -> RunConfig:
        """Return the configuration with a problem's own numbers for this method, where the run gives none.

        Args:
            settings: per method some of lr, damping, weight_decay and the method's own keywords.
        """
        suited = settings.get(self.method, {})
        options = {name: value for name, value in suited.items() if name not in _NUMBERS}
        left_open: dict[str, Any] = {
            name: value
            for name, value in suited.items()
            if name in _NUMBERS and getattr(self, name) is None and name not in self.method_options
        }
        return dataclasses.replace(self, **left_open, method_options=options | dict(self.method_options))

    def method_arguments(self) -> dict[str, Any]:
        """Return the keywords for ``osculate.build``, without those left to the method's defaults.

        Raises:
            ArgumentError: a keyword comes twice, or is not the method's to choose.
        """
        for name in _RESERVED.keys() & self.method_options.keys():
            raise ArgumentError(f"{name!r} is no option of a method: {_RESERVED[name]}")
        given = {name: getattr(self, name) for name in _NUMBERS if getattr(self, name) is not None}
        repeated = sorted(given.keys() & self.method_options.keys())
        if repeated:
            raise ArgumentError(f"{', '.join(repeated)} given twice, as a flag and as an option; give it once")
        return given | dict(self.method_options)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file; ``parts`` and what changes the learning rate only where there is any."""
        plain = dataclasses.asdict(self)
        for name in ("parts", "lr_schedule", "lr_warm_up"):
            if not plain[name]:
                del plain[name]
        return plain | {"warm_start": self.warm_start.value}

    def composed(self) -> tuple[str | Method, dict[str, Any]]:
        """Return the method and the keywords that ``osculate.build`` takes with it.

        Raises:
            ArgumentError: an option or a part is unknown or out of range, or the parts do not fit together.
        """
        arguments, entries = self.method_arguments(), runnable()
        if self.method not in entries:
            raise UnknownNameError("method", self.method, entries)
        if self.parts and isinstance(entries[self.method], Rival):
            raise ArgumentError(
                f"{self.method!r} is the optimizer of another package: it has no part {', '.join(self.parts)} to "
                f"exchange; its options: {', '.join(entries[self.method].options)}"
            )
        if self.parts and isinstance(entries[self.method], WholeEntry):
            raise ArgumentError(
                f"{self.method!r} works over the whole model: parts of layers ({', '.join(self.parts)}) have no place "
                f"in it; its options: {', '.join(dict.fromkeys(('damping', *entries[self.method].options)))}"
            )
        if not self.parts:
            return self.method, arguments
        numbers = {name: arguments.pop(name) for name in _NUMBERS if name in arguments}
        return with_parts(registry.method(self.method, **arguments), self.parts, numbers), numbers


@dataclass(frozen=True)
class Budget:
    """How long a run trains: until the first of its bounds is met.

    Args:
        epochs: passes over the training data, >= 0; None sets no bound.
        seconds: training time, evaluation excluded and warm start included, > 0; None sets no bound. The step (or the
            mini-batch of the warm start) in progress when they are over is completed.

    Raises:
        ArgumentError: a bound is out of range, or there is none.
    """

    epochs: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.epochs is None and self.seconds is None:
            raise ArgumentError("a run needs a bound: give epochs, seconds or both")
        if self.epochs is not None and (not _is_number(self.epochs, int) or self.epochs < 0):
            raise ArgumentError(f"epochs must be >= 0, got {self.epochs!r}; give a whole number")
        if self.seconds is not None and not (_is_number(self.seconds, int | float) and 0 < self.seconds < math.inf):
            raise ArgumentError(f"seconds must be positive and finite, got {self.seconds!r}")

    def out_of_time(self, seconds: float) -> bool:
        """Return whether ``seconds`` seconds use up the time, if that is bounded."""
        return self.seconds is not None and seconds >= self.seconds

    def spent(self, epoch: float, seconds: float) -> float:
        """Return the share of the budget used up by ``epoch`` epochs and ``seconds`` seconds; 1 or more is the end."""
        by_epochs = 0.0 if self.epochs is None else (epoch / self.epochs if self.epochs else 1.0)
        by_seconds = 0.0 if self.seconds is None else seconds / self.seconds
        return max(by_epochs, by_seconds)


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Read ``name=value`` texts; a value that is a Python literal becomes that literal, any other stays text.

    Args:
        texts: such as ``memory=100`` or ``estimator=per_sample``; dashes in a name are read as underscores.

    Raises:
        ArgumentError: a text has no ``=``, or a name comes twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ArgumentError(f"an option reads name=value, got {text!r}")
        if name in options:
            raise ArgumentError(f"option {name!r} is given twice")
        options[name] = _literal(value.strip())
    return options


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return one line for each entry in which two configurations differ, sorted by name."""
    absent = "(absent)"
    names = sorted(saved.keys() | asked.keys())
    pairs = [(name, saved.get(name, absent), asked.get(name, absent)) for name in names]
    return [f"{name}: saved {before!r}, asked for {now!r}" for name, before, now in pairs if before != now]


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "inf": math.inf}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
