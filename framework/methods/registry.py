"""The table of everything registered: the methods, and beside them the table of parts (:mod:`.parts`).

It imports the methods; no method imports it. Third parties add with :func:`register` and :func:`register_part`, or
through the entry-point group ``osculate.parts``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...checking import require_kind
from ...errors import ArgumentError, UnknownNameError
from .catalogue import first_order, gradient, kfac, layer_steps, mini_block, quasi_newton
from .compositions import Composition, compositions
from .method import Method
from .options import composed
from .parts import examples, instances, load_entry_points, parts, register_part

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
        MethodEntry("kbfgs", _K_BFGS, quasi_newton.kbfgs),
        MethodEntry("kbfgs-l", _K_BFGS, quasi_newton.kbfgs_limited),
        MethodEntry("mbf", _MBF, mini_block.mbf),
        MethodEntry("mbf-released", _MBF, mini_block.mbf_released),
        MethodEntry("lw-sgdm", _LAYERWISE, layer_steps.layerwise_sgdm),
        MethodEntry("lw-adamw", _LAYERWISE, layer_steps.layerwise_adamw),
        MethodEntry("joint-kfac", "osculate", layer_steps.joint_kfac),
        MethodEntry("joint-kfac-momentum", "osculate", layer_steps.joint_kfac_momentum),
        MethodEntry("joint-kfac-noise-aware", "osculate", layer_steps.joint_kfac_noise_aware),
        MethodEntry("joint-kbfgs", "osculate", layer_steps.joint_kbfgs),
        MethodEntry("joint-sgdm", "osculate", layer_steps.joint_sgdm),
        MethodEntry("mini-block-lbfgs", "osculate", mini_block.mini_block_lbfgs),
        MethodEntry("kfac", "arXiv:1503.05671", kfac.kfac),
        MethodEntry("ekfac", "arXiv:1806.03884", kfac.ekfac),
        MethodEntry("ngd-exact", "Neural Computation 10:251", kfac.ngd_exact),
        MethodEntry("kfac-conv", "arXiv:2102.06737", kfac.kfac_conv),
        MethodEntry("kbfgs-conv", "arXiv:2102.06737", quasi_newton.kbfgs_conv),
        MethodEntry("shampoo", "arXiv:1802.09568", gradient.shampoo),
        MethodEntry("tnt", "arXiv:2106.02925", gradient.tnt),
        MethodEntry("soap", "arXiv:2409.11321", gradient.soap),
        MethodEntry("muon", "kellerjordan.github.io/posts/muon", gradient.muon),
        MethodEntry("sgdm", "baseline", first_order.sgdm),
        MethodEntry("adam", "arXiv:1412.6980", first_order.adam),
        MethodEntry("adamw", "arXiv:1711.05101", first_order.adamw),
        MethodEntry("adagrad", "JMLR 12:2121", first_order.adagrad),
        MethodEntry("rmsprop", "baseline", first_order.rmsprop),
    )
}


def methods() -> dict[str, MethodEntry]:
    """All registered methods by name."""
    load_entry_points()
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
            where = f"'osculate methods {name}' in a shell explains all"
            raise UnknownNameError(f"option of {name}", option, entry.options, where)
    result = composed(name, entry.factory, options)
    require_kind(f"what the factory of {name!r} returns", result, Method, "end it with `return osculate.Method(...)`")
    return result


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


def compatible_methods() -> list[Composition]:
    """Every legal composition of registered parts; :mod:`.compositions` says what is crossed."""
    return [entry for entry in compositions(examples()) if entry.method is not None]


def refused_compositions() -> list[Composition]:
    """Every composition that is refused at construction, each with the reason."""
    return [entry for entry in compositions(examples()) if entry.method is None]
