"""What can be certified: parts by kind, methods, and the objects that a name on the command line stands for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ...curvature.likelihoods import Bernoulli, Categorical, Gaussian
from ...errors import ArgumentError
from ...preconditioners.factors.factor import IdentityFactor
from ...preconditioners.structures.kronecker import Kronecker
from ..methods import registry
from ..methods.method import Method
from ..methods.parts import label

__all__ = ["KINDS", "Subject", "kind_of", "registered_subjects", "resolve", "subjects_of", "views"]

_VERBS: dict[str, tuple[str, ...]] = {
    "structure": ("precondition", "update", "matrices", "install", "serves"),
    "factor": ("left", "right", "update", "matrices", "sides"),
    "curvature": ("fill", "records", "provides"),
    "quadratic form": ("measure",),
    "partition": ("split", "join", "shape", "shared"),
    "pair damping": ("damp", "validate"),
    "damping": ("sides",),
    "momentum": ("correction", "coefficients"),
    "weight decay": ("gradient_factor", "shrinkage"),
    "average": ("coefficients",),
    "step size": ("propose", "due"),
    "guard": ("accepts", "attempts", "shrink"),
    "likelihood": ("sample", "negative_log_likelihood", "curvature_root"),
    "spectrum": ("damped", "operation"),
    "moments": ("squares", "accumulate"),
    "skip rule": ("accepts",),
    "initial scale": ("scale", "initial"),
    "sharing": ("inputs", "outputs"),
    "operation": ("compute",),
    "update scale": ("factor",),
    "coupling": ("curvature",),
    "slope": ("value",),
    "sign": ("choose",),
}

KINDS: tuple[str, ...] = (*_VERBS, "method")
"""Kinds of part that have contracts, as in :func:`osculate.registry.parts`, and ``"method"``."""

_SPECIAL = {"ByLayer": "structure"}
_LIKELIHOODS = (Bernoulli(), Categorical(), Gaussian())


@dataclass(frozen=True)
class Subject:
    """Something to certify.

    Attributes:
        name: as shown.
        kind: one of ``KINDS``.
        part: the object.
    """

    name: str
    kind: str
    part: Any


def kind_of(part: Any) -> str | None:
    """The kind of a part, read from its verbs; ``None`` if it is none."""
    if isinstance(part, Method):
        return "method"
    if isinstance(part, type | ModuleType):
        return None
    known = next((kind for kind, table in registry.parts().items() if type(part) in table.values()), None)
    if known is not None:
        return known if known in _VERBS else None
    for kind, verbs in _VERBS.items():
        if all(hasattr(part, verb) for verb in verbs):
            return kind
    return _SPECIAL.get(type(part).__name__)


def registered_subjects() -> list[Subject]:
    """Every registered part, as one instance or several, every likelihood and every registered method."""
    found = [
        Subject(name, kind, part)
        for kind, table in registry.examples().items()
        if kind in _VERBS
        for name, part in table.items()
    ]
    found += [Subject(type(part).__name__, "likelihood", part) for part in _LIKELIHOODS]
    return found + [Subject(name, "method", entry.factory()) for name, entry in registry.methods().items()]


def views(subject: Subject) -> list[Any]:
    """What the contracts of a subject are checked on: itself; a factor stands on each of its sides in turn."""
    if subject.kind != "factor":
        return [subject.part]
    found: list[Any] = []
    if "inputs" in subject.part.sides:
        found.append(Kronecker(subject.part, IdentityFactor()))
    if "outputs" in subject.part.sides:
        found.append(Kronecker(IdentityFactor(), subject.part))
    return found


def subjects_of(target: Any, name: str | None = None) -> list[Subject]:
    """The subjects that an object stands for.

    Args:
        target: a part, a :class:`Subject`, a :class:`Method`, a class of part or a factory of methods that needs no
            arguments, a module (its registered and its own parts), or a mapping or sequence of any of these.
        name: as shown; default: from the object.

    Raises:
        ArgumentError: if the object is no part and holds none.
    """
    if isinstance(target, Subject):
        return [target]
    if isinstance(target, ModuleType):
        return _of_module(target)
    if isinstance(target, Mapping):
        return [entry for key, value in target.items() for entry in subjects_of(value, str(key))]
    if isinstance(target, list | tuple | set | frozenset) and kind_of(target) is None:
        return [entry for value in target for entry in subjects_of(value)]
    kind = kind_of(target)
    if kind is not None:
        own = "Method" if isinstance(target, Method) else label(target)
        return [Subject(name or own, kind, target)]
    if callable(target):
        return _of_callable(target, name or str(getattr(target, "__name__", target)))
    raise ArgumentError(
        f"{name or repr(target)} is not a part: {type(target).__name__} has the verbs of no kind ({', '.join(KINDS)}); "
        "pass a part, a Method, or a function without arguments that returns one"
    )


def _of_callable(target: Callable[..., Any], name: str) -> list[Subject]:
    known = [
        Subject(label, kind, part)
        for kind, table in registry.examples().items()
        for label, part in table.items()
        if kind in _VERBS and type(part) is target
    ]
    if known:
        return known
    required = _required(target)
    if required:
        raise ArgumentError(
            f"{name} needs the arguments {', '.join(required)}; pass a ready instance, or a function without arguments "
            "that returns one"
        )
    made = target()
    kind = kind_of(made)
    if kind is None:
        raise ArgumentError(
            f"{name}() is a {type(made).__name__}, which has the verbs of no kind of part ({', '.join(KINDS)})"
        )
    return [Subject(name, kind, made)]


def _required(target: Callable[..., Any]) -> list[str]:
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return []
    return [
        key
        for key, entry in parameters.items()
        if entry.default is inspect.Parameter.empty and entry.kind not in optional
    ]


def _of_module(module: ModuleType) -> list[Subject]:
    if module.__name__ == __name__.split(".")[0]:
        return registered_subjects()
    found: dict[tuple[str, str], Subject] = {}
    for subject in _own_parts(module):
        found.setdefault((subject.kind, subject.name), subject)
    if not found:
        raise ArgumentError(f"module {module.__name__} defines no part; name one with {module.__name__}:part")
    return list(found.values())


def _own_parts(module: ModuleType) -> Iterator[Subject]:
    """Instances, and classes and factories defined here that need no arguments and give a part."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if kind_of(value) is not None:
            yield Subject(name, str(kind_of(value)), value)
        elif getattr(value, "__module__", None) == module.__name__ and _makes_a_part(value):
            try:
                yield from subjects_of(value, name)
            except (ArgumentError, TypeError):
                continue


def _makes_a_part(value: Any) -> bool:
    """Classes, and functions that say they return a method: no other function is called to find out."""
    if isinstance(value, type):
        return not getattr(value, "_is_protocol", False)
    made = getattr(value, "__annotations__", {}).get("return")
    return made is Method or (isinstance(made, str) and made.rpartition(".")[2] == "Method")


def resolve(target: str) -> Any:
    """The object behind ``module`` or ``module:attribute`` (dots go deeper).

    Raises:
        ArgumentError: if the module cannot be imported or lacks the attribute.
    """
    module_name, _, path = target.partition(":")
    if not module_name or (":" in target and not path):
        raise ArgumentError(f"a target is written module or module:part, got {target!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ArgumentError(
            f"cannot import {module_name!r} ({error}); a target is written module:part, e.g. osculate:kfac or "
            "mypackage.parts:MyDamping, and the module must be importable from here"
        ) from error
    if path and module_name == __name__.split(".")[0] and path in registry.methods():
        return registry.methods()[path].factory()
    for piece in path.split(".") if path else ():
        if not hasattr(found, piece):
            public = [name for name in dir(found) if not name.startswith("_")]
            if getattr(found, "__name__", "") == __name__.split(".")[0]:
                public += registry.methods()
            raise ArgumentError(_missing(module_name, piece, public))
        found = getattr(found, piece)
    return found


def _missing(module: str, piece: str, public: list[str]) -> str:
    import difflib

    lower = {name.lower(): name for name in public}
    near = [lower[name] for name in difflib.get_close_matches(piece.lower(), lower, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(public[:12])}"
    return f"{module!r} has no {piece!r}; {hint}"
