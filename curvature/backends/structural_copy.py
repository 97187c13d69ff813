"""A copy of a model that shares the memory of its parameters and buffers, but neither modules nor hooks."""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import Tensor, nn

from .capture import Hook

__all__ = ["structural_copy"]


def structural_copy(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Copy the tree of modules.

    Parameters of the copy are new ``nn.Parameter`` objects on the same memory: gradients and attributes that somebody
    writes to them never reach the model. Buffers are copied. In-place activations work out of place in the copy, which
    computes the same. Hooks are kept, because they may be part of the function, except those of osculate.

    Returns:
        The copy, and its modules by ``id`` of the module they stand for.
    """
    modules: dict[int, nn.Module] = {}
    parameters: dict[int, nn.Parameter] = {}
    return _module(model, modules, parameters), modules


def _module(module: nn.Module, modules: dict[int, nn.Module], parameters: dict[int, nn.Parameter]) -> nn.Module:
    if id(module) in modules:
        return modules[id(module)]
    twin = copy.copy(module)
    modules[id(module)] = twin
    own = twin.__dict__
    own["_parameters"] = {name: _parameter(value, parameters) for name, value in module._parameters.items()}
    own["_buffers"] = {name: _buffer(value) for name, value in module._buffers.items()}
    own["_modules"] = {
        name: None if child is None else _module(child, modules, parameters) for name, child in module._modules.items()
    }
    for name, value in list(own.items()):
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            own[name] = OrderedDict((key, hook) for key, hook in value.items() if not isinstance(hook, Hook))
    if getattr(twin, "inplace", False) is True:
        own["inplace"] = False
    return twin


def _parameter(value: nn.Parameter | None, parameters: dict[int, nn.Parameter]) -> nn.Parameter | None:
    if value is None:
        return None
    if id(value) not in parameters:
        parameters[id(value)] = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
    return parameters[id(value)]


def _buffer(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()
