"""Layers that join an optimizer in the middle of a run: parameters that were frozen when it was built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..curvature.layers.discovery import discover_layers
from ..curvature.layers.layer import Layer
from ..errors import ArgumentError

__all__ = ["late_layers", "require_nobody_left_out", "unowned_parameters"]


def late_layers(model: nn.Module, layers: Sequence[Layer], chosen: Sequence[nn.Parameter]) -> list[Layer]:
    """Layers made of ``chosen`` parameters only.

    A module of which the optimizer serves some parameters already gets a second layer for the others, named
    ``module:parameters``.

    Raises:
        ArgumentError: if a chosen parameter is frozen or served already, or none was chosen.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = {id(parameter) for layer in layers for parameter in layer.parameters.values()}
    if not chosen:
        raise ArgumentError("the parameter group is empty; give it trainable parameters of the model")
    for parameter in chosen:
        if id(parameter) in owned:
            raise ArgumentError(f"parameter {names[id(parameter)]!r} is in a group of this optimizer already")
        if not parameter.requires_grad:
            raise ArgumentError(
                f"parameter {names[id(parameter)]!r} is frozen; call requires_grad_(True) before add_param_group"
            )
    wanted = {id(parameter) for parameter in chosen}
    taken = {layer.name for layer in layers}
    result: list[Layer] = []
    for layer in discover_layers(model):
        fresh = {name: parameter for name, parameter in layer.parameters.items() if id(parameter) in wanted}
        if fresh:
            name = f"{layer.name}:{'+'.join(fresh)}" if layer.name in taken else layer.name
            result.append(replace(layer, name=name, parameters=fresh))
    return result


def unowned_parameters(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Parameters of the model that no layer has (frozen ones), by name."""
    owned = {id(parameter) for layer in layers for parameter in layer.parameters.values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in owned}


def require_nobody_left_out(unowned: dict[str, Tensor]) -> None:
    """Check that no parameter waits in vain for a step.

    Raises:
        ArgumentError: if one that the optimizer does not own has a gradient.
    """
    waiting = [name for name, parameter in unowned.items() if parameter.requires_grad and parameter.grad is not None]
    if waiting:
        raise ArgumentError(
            f"parameters {', '.join(waiting)} have a gradient, but were frozen when the optimizer was built and would "
            'never be trained; call optimizer.add_param_group({"params": [...]}) after unfreezing them, or freeze them'
        )
