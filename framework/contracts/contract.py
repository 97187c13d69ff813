"""What a contract is: one sentence that every part of a kind promises, and a check that can fail.

Whether a contract applies is read from what the part declares (``needs``, ``linear``, ``sides``, ``keeps_positive``,
...), never from its name. A check hands out copies of everything, so that a part which breaks one promise is caught by
that contract and by no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...curvature.declarations import Declarations, declared
from ...errors import OsculateError
from .cases import Case

__all__ = [
    "Contract",
    "ContractViolation",
    "NotApplicable",
    "contract",
    "contracts_of",
    "require",
    "require_bound",
    "require_close",
    "require_equal",
    "require_finite",
    "require_same_state",
    "require_symmetric",
    "require_unchanged",
    "undeclared",
]

Check = Callable[[Any, Case], None]
Excuse = Callable[[Any], str | None]
Relation = Literal["at most", "at least", "more than", "less than", "exactly"]


class ContractViolation(OsculateError, AssertionError):  # noqa: N818 - the word that users read in a report
    """A part does not keep a contract.

    Args:
        message: what was found, where, and what should have been found, in words.
        value: the measured number, if there is one.
        bound: what it was held against.

    Attributes:
        ratio: ``value / bound``; ``None`` unless both are numbers and the bound is not zero.
    """

    def __init__(self, message: str, *, value: float | None = None, bound: float | None = None):
        self.value, self.bound = value, bound
        self.ratio = value / bound if value is not None and bound else None
        super().__init__(message)


class NotApplicable(Exception):  # noqa: N818 - not an error: a case that says nothing about this part
    """A case says nothing about a part, e.g. because the part serves no layer of its network."""


@dataclass(frozen=True)
class Contract:
    """One promise of every part of some kinds.

    Args:
        name: short, with hyphens.
        kinds: kinds of part it is about, as in :func:`osculate.registry.parts`, or ``"method"``.
        claim: the promise in one sentence.
        check: ``check(part, case)`` raises :class:`ContractViolation` if the promise is broken in this case, and
            :class:`NotApplicable` if the case says nothing about the part.
        excuse: from a part to the declaration that exempts it, or ``None``.
    """

    name: str
    kinds: tuple[str, ...]
    claim: str
    check: Check
    excuse: Excuse = lambda part: None


def contract(
    name: str, kinds: str | tuple[str, ...], claim: str, *, unless: Excuse | Iterable[Excuse] = ()
) -> Callable[[Check], Contract]:
    """Decorator that turns a check into a :class:`Contract`.

    Args:
        name: short, with hyphens.
        kinds: one kind or several.
        claim: the promise in one sentence.
        unless: excuses; the first that returns a reason exempts the part.

    Example:
        >>> @contract("even", "average", "the weight is even")
        ... def even(part, case):
        ...     require(part.weight % 2 == 0, "odd weight")
        >>> even.name
        'even'
    """
    excuses = (unless,) if callable(unless) else tuple(unless)

    def excuse(part: Any) -> str | None:
        return next((reason for reason in (rule(part) for rule in excuses) if reason), None)

    def wrap(check: Check) -> Contract:
        return Contract(name, (kinds,) if isinstance(kinds, str) else kinds, claim, check, excuse)

    return wrap


def require(
    condition: bool,
    message: str,
    *,
    value: float | None = None,
    bound: float | None = None,
    relation: Relation = "at most",
) -> None:
    """Check a condition.

    Args:
        condition: what must be true.
        message: what was found; where a value and a bound are given, the name of the value.
        value: the measured number.
        bound: what it was held against.
        relation: what the value must be of the bound.

    Raises:
        ContractViolation: if the condition is false; "NAME is VALUE, but must be RELATION BOUND".
    """
    if condition:
        return
    if value is not None and bound is not None:
        message = f"{message} is {value:.6g}, but must be {relation} {bound:.6g}"
    raise ContractViolation(message, value=value, bound=bound)


def require_bound(what: str, value: Any, relation: Relation, bound: Any, *, slack: float = 0.0) -> None:
    """Check a number against a bound; a number that is not a number is beyond every bound.

    Args:
        what: name of the number.
        value: the number, or a tensor with one entry.
        relation: what it must be of the bound.
        bound: likewise.
        slack: rounding allowed, >= 0.

    Raises:
        ContractViolation: "WHAT is VALUE, but must be RELATION BOUND".
    """
    value, bound = float(value), float(bound)
    fits = {
        "at most": value <= bound + slack,
        "at least": value >= bound - slack,
        "more than": value > bound,
        "less than": value < bound,
        "exactly": abs(value - bound) <= slack,
    }
    require(fits[relation], what, value=value, bound=bound, relation=relation)


@contextmanager
def require_unchanged(what: str, *tensors: Tensor) -> Iterator[None]:
    """Check that tensors are bitwise after the ``with`` block what they were before.

    Raises:
        ContractViolation: naming the first entry that differs.
    """
    kept = [tensor.clone() for tensor in tensors]
    yield
    for tensor, copy in zip(tensors, kept, strict=True):
        require_equal(what, tensor, copy)


def undeclared(kind: type[Declarations], name: str) -> Excuse:
    """Excuse of parts that do not declare ``name``, a declaration of their ``kind``."""
    return lambda part: None if getattr(declared(part, kind), name) else f"does not declare {name}"


def contracts_of(names: Mapping[str, Any]) -> tuple[Contract, ...]:
    """All contracts among the names of a module, in the order of their definition."""
    return tuple(value for value in names.values() if isinstance(value, Contract))


def _entry(index: tuple[int, ...]) -> str:
    """Which entry of a tensor, in words; nothing for a number."""
    return f" at entry {index}" if index else ""


def _too_much(error: float, bound: float) -> str:
    return f"they differ by {error:.3g}, {error / bound:.3g} times the {bound:.3g} allowed"


def require_finite(what: str, *tensors: Tensor) -> None:
    """Check that every entry is finite.

    Raises:
        ContractViolation: naming the first entry that is not.
    """
    for tensor in tensors:
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            index = tuple(torch.nonzero(bad)[0].tolist())
            raise ContractViolation(f"{what} is not finite: it is {float(tensor[index])}{_entry(index)}")


def require_equal(what: str, actual: Tensor, expected: Tensor) -> None:
    """Check that two tensors are bitwise equal (NaN equals NaN).

    Raises:
        ContractViolation: naming the first entry that differs.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ContractViolation(
            f"{what} has shape {tuple(actual.shape)} and {actual.dtype}, expected {tuple(expected.shape)} and "
            f"{expected.dtype}"
        )
    different = (actual != expected) & ~((actual != actual) & (expected != expected))
    if bool(different.any()):
        index = tuple(torch.nonzero(different)[0].tolist())
        one, other = float(actual[index]), float(expected[index])
        raise ContractViolation(f"{what} is not bitwise the same: it is {one!r}{_entry(index)}, expected {other!r}")


def require_close(
    what: str, actual: Tensor, expected: Tensor, *, tolerance: float = 1e-8, scale: Tensor | None = None
) -> None:
    """Check that two tensors agree up to ``tolerance`` times the largest entry of ``scale`` (default: expected).

    Raises:
        ContractViolation: with the worst entry, both values, how far they are apart and how far they may be.
    """
    if actual.shape != expected.shape:
        raise ContractViolation(f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    require_finite(what, actual)
    if not actual.numel():
        return
    size = float((expected if scale is None else scale).abs().max())
    bound = tolerance * size if size else tolerance
    error = (actual - expected).abs()
    worst = float(error.max())
    if not worst <= bound:
        index = tuple(torch.nonzero(error == error.max())[0].tolist())
        raise ContractViolation(
            f"{what} is {float(actual[index]):.9g}{_entry(index)}, expected {float(expected[index]):.9g}: "
            f"{_too_much(worst, bound)}",
            value=worst,
            bound=bound,
        )


def require_symmetric(what: str, matrix: Tensor, *, tolerance: float = 1e-8) -> None:
    """Check that a square matrix equals its transpose up to ``tolerance`` times its largest entry.

    Raises:
        ContractViolation: with the worst pair of entries, both values, and how far they are and may be apart.
    """
    require_finite(what, matrix)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    require(square, f"{what} is no square matrix, its shape is {tuple(matrix.shape)}")
    error = (matrix - matrix.T).abs()
    if not error.numel():
        return
    worst, bound = float(error.max()), tolerance * (float(matrix.abs().max()) or 1.0)
    if worst > bound:
        row, column = torch.nonzero(error == error.max())[0].tolist()
        one, other = float(matrix[row, column]), float(matrix[column, row])
        raise ContractViolation(
            f"{what} is not symmetric: entry ({row}, {column}) is {one:.9g}, but entry ({column}, {row}) is "
            f"{other:.9g}: {_too_much(worst, bound)}",
            value=worst,
            bound=bound,
        )


def require_same_state(what: str, actual: Any, expected: Any, *, tolerance: float | None = None) -> None:
    """Compare two nested saved states entry by entry, bitwise or to a tolerance.

    Raises:
        ContractViolation: naming the path of the first difference.
    """
    if isinstance(expected, dict):
        require(isinstance(actual, dict) and set(actual) == set(expected), f"{what} has other entries")
        for key in expected:
            require_same_state(f"{what}/{key}", actual[key], expected[key], tolerance=tolerance)
    elif isinstance(expected, list | tuple):
        require(len(actual) == len(expected), f"{what} has another length")
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            require_same_state(f"{what}[{index}]", *pair, tolerance=tolerance)
    elif isinstance(expected, Tensor):
        if tolerance is None or not expected.is_floating_point():
            require_equal(what, actual, expected)
        else:
            require_close(what, actual, expected, tolerance=tolerance)
    else:
        same = actual == expected or (actual != actual and expected != expected)
        require(bool(same), f"{what} is {actual!r}, expected {expected!r}")
