"""The table of everything registered. It imports the parts; no part imports it.

Third parties add with :func:`register` / :func:`register_part`, or through the entry-point group ``osculate.parts``:
an entry point names a function without arguments that registers what its package has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from ...checking import require_kind
from ...errors import ArgumentError, UnknownNameError
from .catalogue import first_order as baselines
from .catalogue import gradient as gradient_methods
from .catalogue import kfac as curvature_methods
from .catalogue import layer_steps as variants
from .catalogue import quasi_newton as published
from .compositions import Composition, compositions
from .method import Method
from .parts import EXAMPLES, KINDS, default_examples, label, structure_examples

__all__ = [
    "MethodEntry",
    "compatible_methods",
    "examples",
    "instances",
    "method",
    "methods",
    "parts",
    "refused_compositions",
    "register",
    "register_part",
]

_K_BFGS = "arXiv:2006.08877"
_MBF = "arXiv:2202.04124"
_LAYERWISE = "arXiv:2305.13664"


@dataclass(frozen=True)
class MethodEntry:
    """A registered method.

    Attributes:
        name: what :func:`osculate.build` takes.
        paper: where it comes from.
        factory: function without required arguments that returns a :class:`Method`.
    """

    name: str
    paper: str
    factory: Callable[..., Method]

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").split("\n")[0]

    @property
    def defaults(self) -> dict[str, float]:
        """Default ``lr``, ``damping`` and ``weight_decay``."""
        return self.factory().hyperparameters({})

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the factory with their defaults."""
        return {name: entry.default for name, entry in inspect.signature(self.factory).parameters.items()}


_METHODS: dict[str, MethodEntry] = {
    entry.name: entry
    for entry in (
        MethodEntry("kbfgs", _K_BFGS, published.kbfgs),
        MethodEntry("kbfgs-l", _K_BFGS, published.kbfgs_limited),
        MethodEntry("mbf", _MBF, published.mbf),
        MethodEntry("mbf-released", _MBF, published.mbf_released),
        MethodEntry("lw-sgdm", _LAYERWISE, variants.layerwise_sgdm),
        MethodEntry("lw-adamw", _LAYERWISE, variants.layerwise_adamw),
        MethodEntry("joint-kfac", "osculate", variants.joint_kfac),
        MethodEntry("joint-kfac-momentum", "osculate", variants.joint_kfac_momentum),
        MethodEntry("joint-kbfgs", "osculate", variants.joint_kbfgs),
        MethodEntry("joint-sgdm", "osculate", variants.joint_sgdm),
        MethodEntry("mini-block-lbfgs", "osculate", variants.mini_block_lbfgs),
        MethodEntry("kfac", "arXiv:1503.05671", baselines.kfac),
        MethodEntry("ekfac", "arXiv:1806.03884", curvature_methods.ekfac),
        MethodEntry("ngd-exact", "Neural Computation 10:251", curvature_methods.ngd_exact),
        MethodEntry("kfac-conv", "arXiv:2102.06737", curvature_methods.kfac_conv),
        MethodEntry("kbfgs-conv", "arXiv:2102.06737", curvature_methods.kbfgs_conv),
        MethodEntry("shampoo", "arXiv:1802.09568", gradient_methods.shampoo),
        MethodEntry("tnt", "arXiv:2106.02925", gradient_methods.tnt),
        MethodEntry("soap", "arXiv:2409.11321", gradient_methods.soap),
        MethodEntry("muon", "kellerjordan.github.io/posts/muon", gradient_methods.muon),
        MethodEntry("sgdm", "baseline", baselines.sgdm),
        MethodEntry("adam", "arXiv:1412.6980", baselines.adam),
        MethodEntry("adamw", "arXiv:1711.05101", baselines.adamw),
        MethodEntry("adagrad", "JMLR 12:2121", baselines.adagrad),
        MethodEntry("rmsprop", "baseline", baselines.rmsprop),
    )
}

_PARTS = {kind: dict(table) for kind, table in KINDS.items()}
_EXAMPLES = dict(EXAMPLES)

_loaded = False


def _load_entry_points() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    for entry in entry_points(group="osculate.parts"):
        entry.load()()


def methods() -> dict[str, MethodEntry]:
    """All registered methods by name."""
    _load_entry_points()
    return dict(_METHODS)


def method(name: str, **options: Any) -> Method:
    """A registered method with options of its factory.

    Raises:
        UnknownNameError: for an unknown method or option; near misses are listed.
    """
    table = methods()
    if name not in table:
        raise UnknownNameError("method", name, table)
    entry = table[name]
    for option in options:
        if option not in entry.options:
            raise UnknownNameError(f"option of {name}", option, entry.options)
    result = entry.factory(**options)
    require_kind(f"what the factory of {name!r} returns", result, Method, "end it with `return osculate.Method(...)`")
    return result


def parts() -> dict[str, dict[str, type]]:
    """All registered parts by kind and name."""
    _load_entry_points()
    return {kind: dict(table) for kind, table in _PARTS.items()}


def register(name: str, factory: Callable[..., Method], *, paper: str = "") -> None:
    """Add a method.

    Raises:
        ArgumentError: if the name is taken, or the factory is no function or needs arguments.
    """
    require_kind("name", name, str, "call it register(name, factory)")
    require_kind("factory", factory, Callable, "pass a function that returns a Method, not the method itself")
    if name in _METHODS:
        raise ArgumentError(f"method {name!r} is registered already; choose another name")
    required = [
        key for key, entry in inspect.signature(factory).parameters.items() if entry.default is inspect.Parameter.empty
    ]
    if required:
        raise ArgumentError(f"the factory of {name!r} must need no arguments, but needs {', '.join(required)}")
    _METHODS[name] = MethodEntry(name, paper, factory)


def examples() -> dict[str, dict[str, Any]]:
    """Instances of every registered part, by kind and short name: what compositions and contracts are tried with."""
    found = {kind: [part for cls in table.values() for part in instances(cls)] for kind, table in parts().items()}
    covers_all = [part for part in found["partition"] if part.joint]
    found["structure"] += structure_examples(covers_all, found["factor"], found["pair damping"])
    return {kind: {label(part): part for part in entries} for kind, entries in found.items()}


def instances(cls: type) -> tuple[Any, ...]:
    """Example instances of one part."""
    return _EXAMPLES.get(cls, ()) or default_examples(cls)


def compatible_methods() -> list[Composition]:
    """Every legal composition of registered parts; :mod:`.compositions` says what is crossed."""
    return [entry for entry in compositions(examples()) if entry.method is not None]


def refused_compositions() -> list[Composition]:
    """Every composition that is refused at construction, each with the reason."""
    return [entry for entry in compositions(examples()) if entry.method is None]


def register_part(kind: str, cls: type, *instances: Any) -> None:
    """Add a part to the table of its kind.

    Args:
        kind: one of the kinds that :func:`parts` lists.
        cls: the part, a frozen dataclass.
        *instances: examples that compositions and contracts are tried with; none: ``cls()`` if it needs no arguments.

    Raises:
        UnknownNameError: for an unknown kind.
        ArgumentError: if the name is taken, or an instance takes the place of the class.
    """
    if kind not in _PARTS:
        raise UnknownNameError("kind of part", str(kind), _PARTS)
    if not isinstance(cls, type):
        name = type(cls).__name__
        raise ArgumentError(
            f"register_part takes a class, got {cls!r}; write register_part({kind!r}, {name}, {name}(...))"
        )
    if cls.__name__ in _PARTS[kind]:
        raise ArgumentError(f"{kind} {cls.__name__!r} is registered already; choose another name")
    _PARTS[kind][cls.__name__] = cls
    if instances:
        _EXAMPLES[cls] = instances
