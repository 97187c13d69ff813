"""Parameter groups: numbers for part of the model, as torch writes them, read layer by layer.

A step has one length per layer and one damping per layer, so a layer whose parameters lie in several groups needs the
same ``lr`` and ``damping`` in all of them. Weight decay acts on each parameter for itself and may differ inside a layer
(none on biases is the usual case).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature.layers.discovery import discover_layers
from ...curvature.layers.layer import Layer
from ...errors import ArgumentError, UnknownNameError
from .arguments import as_number
from .blocks import Block

__all__ = [
    "GroupValues",
    "chosen_parameters",
    "late_layers",
    "numbers_of",
    "require_nobody_left_out",
    "split_into_groups",
    "unowned_parameters",
]

_NUMBERS = ("lr", "damping", "weight_decay")
_KEYS = ("params", *_NUMBERS, "name", "initial_lr")


def split_into_groups(
    model: nn.Module, layers: Sequence[Layer], given: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Torch's parameter groups from the user's: theirs in order, then one with every other trainable parameter.

    Args:
        model: the model.
        layers: its layers; their parameters are the ones to distribute.
        given: dictionaries with ``"params"`` (shell patterns of parameter names, e.g. ``"backbone.*"`` or ``"*.bias"``,
            or parameters) and any of ``lr``, ``damping``, ``weight_decay``, ``name``.

    Raises:
        ArgumentError: for an unknown key, a pattern that matches nothing, a parameter in two groups.
    """
    owned = [parameter for layer in layers for parameter in layer.parameters.values()]
    if given is None:
        return [{"params": owned}]
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ArgumentError(
            "groups must be a list of dictionaries, e.g. [{'params': ['*.bias'], 'weight_decay': 0.0}], got "
            f"{given!r}"
        )
    if not given:
        return [{"params": owned}]
    result: list[dict[str, Any]] = []
    taken: dict[int, int] = {}
    for index, entry in enumerate(given):
        chosen = [p for p in chosen_parameters(model, entry) if any(p is other for other in owned)]
        if not chosen:
            raise ArgumentError(f"groups[{index}] has no trainable parameter; unfreeze them first, or leave it out")
        for parameter in chosen:
            if id(parameter) in taken:
                raise ArgumentError(
                    f"parameter {_name_of(model, parameter)!r} is in groups[{taken[id(parameter)]}] and in "
                    f"groups[{index}]; give each parameter one group"
                )
            taken[id(parameter)] = index
        result.append({**entry, "params": chosen})
    rest = [parameter for parameter in owned if id(parameter) not in taken]
    return [*result, {"params": rest}] if rest else result


def numbers_of(group: Mapping[str, Any], index: int) -> dict[str, float]:
    """``lr``, ``damping`` and ``weight_decay`` of a group, whatever a user has written into it.

    Raises:
        ArgumentError: if one is missing or no number.
    """
    missing = [name for name in _NUMBERS if name not in group]
    if missing:
        raise ArgumentError(f"param_groups[{index}] lacks {', '.join(missing)}; set it to a number")
    return {name: as_number(f"{name} of param_groups[{index}]", group[name]) for name in _NUMBERS}


def chosen_parameters(model: nn.Module, group: Mapping[str, Any]) -> list[nn.Parameter]:
    """The parameters that a group's ``"params"`` means, in the order given.

    Raises:
        ArgumentError: for an unknown key, a missing ``"params"``, or something that is no parameter of the model.
        UnknownNameError: for a pattern that matches no parameter.
    """
    if not isinstance(group, Mapping) or "params" not in group:
        raise ArgumentError(f"a parameter group is a dictionary with 'params', got {group!r}")
    for key in group:
        if key not in _KEYS:
            raise UnknownNameError("key of a parameter group", str(key), _KEYS)
    given = group["params"]
    entries: Iterable[Any] = [given] if isinstance(given, str | Tensor) else given
    named = dict(model.named_parameters(remove_duplicate=False))
    own = {id(parameter) for parameter in named.values()}
    found: dict[int, nn.Parameter] = {}
    for entry in entries:
        value = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry  # named_parameters() works too
        if isinstance(value, str):
            matching = [parameter for name, parameter in named.items() if fnmatchcase(name, value)]
            if not matching:
                raise UnknownNameError("parameter name or pattern", value, named)
            found |= {id(parameter): parameter for parameter in matching}
        elif isinstance(value, Tensor) and id(value) in own:
            found[id(value)] = value  # type: ignore[assignment]
        else:
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentError(
                f"'params' holds {kind}, which is no parameter of the model; give parameters of the model that was "
                "given to osculate.build, or patterns of their names"
            )
    return list(found.values())


class GroupValues:
    """The numbers of the parameter groups, read by layer and by parameter.

    Keyed by names, not by the parameters' identity, so that a deep copy of the optimizer reads its own groups.
    """

    def __init__(self) -> None:
        self.indices: dict[str, dict[str, int]] = {}

    def assign(self, layers: Sequence[Layer], groups: Sequence[Mapping[str, Any]]) -> None:
        """Note in which group each parameter of ``layers`` lies."""
        where = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
        for layer in layers:
            self.indices[layer.name] = {name: where[id(parameter)] for name, parameter in layer.parameters.items()}

    def of_layer(self, groups: Sequence[Mapping[str, Any]], layer: str, key: str) -> float:
        """The one value of ``key`` ("lr" or "damping") in a layer.

        Raises:
            ArgumentError: if its parameters lie in groups that differ.
        """
        if len(groups) == 1:
            return float(groups[0][key])
        values = {float(groups[index][key]) for index in self.indices[layer].values()}
        if len(values) > 1:
            parts = ", ".join(f"{name} {groups[index][key]}" for name, index in self.indices[layer].items())
            raise ArgumentError(
                f"the parameters of layer {layer!r} lie in groups with different {key} ({parts}); a layer is one step "
                f"with one {key}: put them into one group, or give both groups the same {key} (weight_decay may differ)"
            )
        return values.pop()

    def of_block(self, groups: Sequence[Mapping[str, Any]], block: Block, key: str) -> tuple[float, ...]:
        """The value of ``key`` for each parameter of a block; 0 for one that is frozen, or has no gradient."""
        if not any(group[key] for group in groups):
            return (0.0,) * len(block.names)
        indices = self.indices[block.layer.name]
        return tuple(
            float(groups[indices[name]][key]) if parameter.requires_grad and parameter.grad is not None else 0.0
            for name, parameter in zip(block.names, block.parameters, strict=True)
        )

    def common(self, groups: Sequence[Mapping[str, Any]], key: str) -> float | dict[str, float]:
        """One number where all layers agree, else one per layer."""
        if len(groups) == 1:
            return float(groups[0][key])
        values = {layer: self.of_layer(groups, layer, key) for layer in self.indices}
        first = next(iter(values.values()))
        return first if all(value == first for value in values.values()) else values

    def per_layer(
        self, groups: Sequence[Mapping[str, Any]], layers: Sequence[Layer], key: str, like: Tensor
    ) -> float | Tensor:
        """One number where all layers agree, else (L,) in the order of ``layers`` on the device of ``like``."""
        if len(groups) == 1:
            return float(groups[0][key])
        values = [self.of_layer(groups, layer.name, key) for layer in layers]
        if all(value == values[0] for value in values):
            return values[0]
        return torch.tensor(values, dtype=like.dtype, device=like.device)

    def by_parameter(self) -> dict[str, int]:
        """Group of every parameter by its qualified name within the layer table: what is saved."""
        return {f"{layer}/{name}": index for layer, names in self.indices.items() for name, index in names.items()}


def _name_of(model: nn.Module, parameter: nn.Parameter) -> str:
    return next((name for name, other in model.named_parameters() if other is parameter), "?")


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
    """Parameters of the model that no layer has (frozen ones, and those that joined it later), by name."""
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
            f"parameters {', '.join(waiting)} have a gradient, but were frozen when the optimizer was built, or not "
            'in the model yet, and would never be trained; call optimizer.add_param_group({"params": [...]}) after '
            "unfreezing them, or freeze them"
        )
