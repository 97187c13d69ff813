"""Every composition of registered parts: which are legal, and why the others are refused.

The parts that have to fit each other mathematically (structure, estimator, damping) are crossed in full. The others
(step size, momentum, weight decay, guard) meet them only through numbers; they are dealt out so that every pair of
parts of different kinds occurs together somewhere, which keeps the number of compositions in the hundreds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...curvature.estimators import InputsOnly, SecantPairs
from ...curvature.records.needs import Needs
from ...errors import ArgumentError
from ...preconditioners.damping.split import ConstantDamping
from ...preconditioners.structures.by_layer import leaves
from .method import Method

__all__ = ["CROSSED", "DEALT", "Composition", "compositions"]

CROSSED = {"preconditioner": "structure", "curvature": "curvature", "damping": "damping"}
"""Fields of :class:`Method` that are crossed in full, with the kind of part in the registry."""

DEALT = {"step_size": "step size", "momentum": "momentum", "weight_decay": "weight decay", "guard": "guard"}
"""Fields that are dealt out over the crossed ones."""

_VALUES = {"lr": 0.02, "damping": 0.3}
"""Inside the range of every damping rule (double damping needs less than 1)."""


@dataclass(frozen=True)
class Composition:
    """One choice of a part for every field.

    Attributes:
        labels: short name of the part by field of :class:`Method`.
        method: the method, or ``None`` if it was refused.
        refusal: why it was refused at construction, or ``None``.
    """

    labels: Mapping[str, str]
    method: Method | None
    refusal: str | None = None

    def __str__(self) -> str:
        return " + ".join(self.labels.values())


def compositions(examples: Mapping[str, Mapping[str, Any]]) -> Iterator[Composition]:
    """Every choice of crossed parts, legal or refused, with the other parts dealt out over the legal ones.

    A part that the rest would ignore is not varied: an estimator whose curvature nobody reads, a damping rule without
    a matrix to damp.

    Args:
        examples: parts by kind and short name, from :func:`osculate.registry.examples`.
    """
    dealer = _Dealer({field: examples[kind] for field, kind in DEALT.items()})
    options = [list(examples[kind].items()) for kind in CROSSED.values()]
    for choice in product(*options):
        parts = dict(zip(CROSSED, choice, strict=True))
        if not _superfluous(**{field: part for field, (_, part) in parts.items()}):
            yield dealer.complete(parts)


def _superfluous(preconditioner: Any, curvature: Any, damping: Any) -> bool:
    """Whether another choice of estimator or damping gives the very same method."""
    needs = Needs.NOTHING
    for part in leaves(preconditioner):
        needs |= part.needs
    read = needs & ~Needs.INPUTS
    plain = {Needs.NOTHING: InputsOnly, Needs.PAIRS: SecantPairs, Needs.CHANGES: SecantPairs}.get(read)
    unread = plain is not None and read in curvature.provides and type(curvature) is not plain
    undamped = not needs and not isinstance(damping, ConstantDamping)
    return unread or undamped


class _Dealer:
    """Completes crossed parts so that pairs of parts which have not met yet meet."""

    def __init__(self, options: Mapping[str, Mapping[str, Any]]):
        self.options = options
        self.met: set[tuple[str, str]] = set()
        self.count: dict[str, int] = {}

    def complete(self, parts: Mapping[str, tuple[str, Any]]) -> Composition:
        """The crossed parts with a choice for every other field; refused choices are tried with other ones first."""
        bare = {field: part for field, (_, part) in parts.items()}
        labels = {field: name for field, (name, _) in parts.items()}
        refusal = _refusal(bare)
        if refusal is not None:
            return Composition(labels, None, refusal)
        for field, table in self.options.items():
            for name in self._order(list(labels.values()), list(table)):
                if _refusal(bare | {field: table[name]}) is None:
                    bare, labels = bare | {field: table[name]}, labels | {field: name}
                    break
        self._note(list(labels.values()))
        return Composition(labels, Method(**bare, defaults=_VALUES))

    def _order(self, chosen: Sequence[str], names: Sequence[str]) -> list[str]:
        """Most new pairs first; then the least used."""

        def rank(name: str) -> tuple[int, int]:
            known = sum((entry, name) in self.met for entry in chosen)
            return known, self.count.get(name, 0)

        return sorted(names, key=rank)

    def _note(self, names: Sequence[str]) -> None:
        self.met.update((first, second) for first in names for second in names)
        for name in names:
            self.count[name] = self.count.get(name, 0) + 1


def _refusal(parts: Mapping[str, Any]) -> str | None:
    try:
        Method(**parts, defaults=_VALUES)
    except ArgumentError as error:
        return str(error)
    return None
