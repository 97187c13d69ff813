"""Modules of other libraries: read by what they compute, or by an adapter that somebody has registered for them.

Foreign libraries are never imported. A module whose own parameters are a matrix ``weight`` and perhaps a vector
``bias`` is tried out once, when it is discovered: a twin of it with random parameters, without hooks and out of the
autograd graph, is called on random rows. If what comes back is ``x W' + b`` (or ``x W + b``), for rows alone and for
rows in sequences, for training and for evaluation, at two scales of the parameters, it is a linear map. The module
itself, its buffers and the global random state are not touched.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checking import require_kind
from ...errors import ArgumentError
from .adapters import ADAPTERS, KINDS, LayerAdapter, LinearAdapter, TransposedLinearAdapter, keeps_forward, own_forward

__all__ = ["Registration", "adapter_of", "known_kinds", "register_adapter", "why_unread"]


@dataclass(frozen=True, eq=False)
class Registration:
    """What :func:`register_adapter` returns.

    Attributes:
        module_type: the class whose modules are read.
        adapter: how they are read.
    """

    module_type: type[nn.Module]
    adapter: LayerAdapter

    def remove(self) -> None:
        """Forget it: optimizers that exist keep their layers."""
        if self in _REGISTERED:
            _REGISTERED.remove(self)


_REGISTERED: list[Registration] = []


def register_adapter(module_type: type[nn.Module], adapter: LayerAdapter) -> Registration:
    """Say how modules of a class of your own, or of another library, are read as linear maps.

    Counts for every model searched from now on, before the adapters that ship; the newest comes first. Instances of
    subclasses are read as well if they keep the forward of ``module_type``.

    Args:
        module_type: the class.
        adapter: how to read it: an object with the verbs of ``LayerAdapter``. One that ships may do, e.g.
            ``osculate.curvature.layers.adapters.LinearAdapter()`` for a module that computes ``x @ weight.T + bias`` of
            its last axis and ``TransposedLinearAdapter()`` for ``x @ weight + bias``. The parameters that it reads are
            called ``weight`` and ``bias``, and what it multiplies is the first argument of the forward.

    Returns:
        A handle whose ``remove()`` undoes it.

    Example:
        >>> import torch, osculate as osc
        >>> from osculate.curvature.layers.adapters import TransposedLinearAdapter
        >>> class Mix(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(3, 2))
        ...     def forward(self, x, step):
        ...         return x @ self.weight
        >>> handle = osc.register_adapter(Mix, TransposedLinearAdapter())
        >>> [layer.kind for layer in osc.discover_layers(Mix())]
        ['Linear']
        >>> handle.remove()

    Raises:
        ArgumentError: if the first is no class of modules, or the second lacks a verb of an adapter.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)) or module_type is nn.Module:
        raise ArgumentError(
            f"module_type must be a class derived from torch.nn.Module, got {module_type!r}; pass the class itself, "
            "e.g. register_adapter(MyLinear, adapter)"
        )
    require_kind("adapter", adapter, LayerAdapter, "see osculate.curvature.layers.adapters for those that ship")
    registration = Registration(module_type, adapter)
    _REGISTERED.insert(0, registration)
    return registration


def known_kinds() -> list[str]:
    """Every kind of layer, those of registered adapters included."""
    return list(dict.fromkeys([*(entry.adapter.kind for entry in _REGISTERED), *KINDS]))


def adapter_of(module: nn.Module, adapters: Sequence[LayerAdapter] = ADAPTERS) -> LayerAdapter | None:
    """How a module is read: as registered, as its class says, or as what it computes; ``None``: it cannot be read.

    Raises:
        ArgumentError: for a trainable embedding with sparse gradients.
    """
    for entry in _REGISTERED:
        if keeps_forward(module, entry.module_type):
            return entry.adapter
    found = next((adapter for adapter in adapters if adapter.matches(module)), None)
    return found or _linear_map(module)


def why_unread(module: nn.Module) -> str:
    """Why a module that looks as if it could be read is of kind ``"Other"``; else empty."""
    reason = own_forward(module)
    if reason:
        return f"{reason}; osculate.register_adapter can say how it is read"
    if isinstance(module, torch.jit.ScriptModule):
        return "a module of torch.jit, which cannot be looked into; script a copy, or trace the model after training"
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return f"parameters in a {type(module).__name__}, which is never called"
    return ""


def _linear_map(module: nn.Module) -> LayerAdapter | None:
    """The adapter of a module that computes x W' + b or x W + b, found by trying."""
    if not _may_be_linear(module):
        return None
    weight = module.weight
    assert isinstance(weight, Tensor)
    adapters: list[tuple[LayerAdapter, int]] = [(LinearAdapter(), 1), (TransposedLinearAdapter(), 0)]
    devices = [weight.device] if weight.device.type == "cuda" else []
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        for adapter, axis in adapters:
            try:
                if _computes(module, axis, 1.0, True) and _computes(module, axis, 30.0, False):
                    return adapter
            except Exception:  # whatever a stranger's forward raises: it is no such map
                continue
    return None


def _may_be_linear(module: nn.Module) -> bool:
    """Whether a module is worth trying: nothing but a matrix and perhaps a vector, in a forward of its class."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and weight.is_floating_point()
        and weight.numel() > 0
        and (bias is None or (bias.ndim == 1 and bias.shape[0] in weight.shape and bias.dtype == weight.dtype))
        and not weight.is_meta
        and all(name in ("weight", "bias") for name, value in own.items() if value is not None)
        and not module._modules
        and not module._buffers
        and "forward" not in vars(module)
        and not type(module).__module__.startswith("torch.nn.")
    )


def _computes(module: nn.Module, axis: int, scale: float, training: bool) -> bool:
    """Whether a twin with random parameters gives the rows times the matrix whose inputs lie along ``axis``."""
    generator = torch.Generator().manual_seed(0)
    twin = _twin(module, scale, generator)
    twin.training = training
    weight, bias = twin.weight, twin._parameters.get("bias")
    assert isinstance(weight, Tensor)
    matrix = weight.mT if axis else weight
    rows = torch.randn(2, 3, matrix.shape[0], generator=generator).to(weight.device, weight.dtype)
    expected = rows @ matrix if bias is None else rows @ matrix + bias
    tolerance = 64 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    for given, right in ((rows, expected), (rows[:, 0], expected[:, 0]), (rows, expected)):
        found: Any = twin(given.clone())
        if not isinstance(found, Tensor) or found.shape != right.shape or found.dtype != right.dtype:
            return False
        if not torch.allclose(found, right, rtol=0.0, atol=tolerance):
            return False
    return True


def _twin(module: nn.Module, scale: float, generator: torch.Generator) -> nn.Module:
    """A copy of a module without children, with random parameters and without hooks."""
    fresh: dict[int, Any] = {
        id(value): nn.Parameter((scale * torch.randn(value.shape, generator=generator)).to(value), requires_grad=False)
        for value in module._parameters.values()
        if value is not None
    }
    twin = module.__new__(type(module))
    own = {
        name: OrderedDict() if name.endswith("_hooks") else copy.deepcopy(value, fresh)
        for name, value in vars(module).items()
    }
    vars(twin).update(own)
    return twin
