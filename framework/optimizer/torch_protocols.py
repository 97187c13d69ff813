"""What torch expects of any optimizer beside ``step``: a ``state`` by parameter, and states keyed by parameter.

``torch.distributed.checkpoint.state_dict`` takes a step of its own where ``optimizer.state`` is empty, and keeps of a
saved state what it holds by parameter. Ours is kept by block, since one structure serves several parameters: for
that caller each block's state stands with the first of its parameters, and the rest with the very first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from .blocks import Block

__all__ = [
    "asked_for_checkpoint",
    "by_parameter",
    "from_parameters",
    "numbered_groups",
    "require_eager",
    "shown_state",
]

_MARK = "osculate"
_CHECKPOINT = "torch.distributed.checkpoint.state_dict"


def require_eager(model: nn.Module) -> None:
    """Check that modules take hooks, and that parameters keep their shapes.

    Raises:
        ArgumentError: if a module is a script, or parameters are flattened by the first FSDP.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ArgumentError(
                f"module {name or '(root)'!r} is a script of torch.jit, which takes no hooks; build on the eager "
                "model, and script a copy of it (torch.jit.script(copy.deepcopy(model))), or use torch.compile"
            )
    for name, parameter in model.named_parameters():
        if any(own.__name__ == "FlatParameter" for own in type(parameter).__mro__):
            raise ArgumentError(
                f"parameter {name!r} is a FlatParameter: FullyShardedDataParallel flattens the parameters of many "
                "layers into one, and a structure must see its layer; use FSDP2 (torch.distributed.fsdp.fully_shard), "
                "which keeps their shapes"
            )


def shown_state(blocks: Sequence[Block]) -> dict[Tensor, dict[str, Any]]:
    """``optimizer.state``: the momentum of every parameter, not a copy. To look at; blocks keep their own state."""
    return {
        parameter: {} if view.is_meta else {"momentum": view}  # another process has it
        for block in blocks
        for parameter, view in zip(block.parameters, block.views, strict=True)
    }


def numbered_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups with numbers in the place of parameters, as torch saves them."""
    result: list[dict[str, Any]] = []
    count = 0
    for group in groups:
        size = len(group["params"])
        result.append({**group, "params": list(range(count, count + size))})
        count += size
    return result


def asked_for_checkpoint() -> bool:
    """Whether the caller of the caller is torch's distributed checkpoint, which reads states by parameter."""
    return sys._getframe(2).f_globals.get("__name__") == _CHECKPOINT


def by_parameter(saved: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """A saved state keyed by numbers of parameters.

    Args:
        saved: as :func:`~.saving.saved_state` makes it.
        optimizer: whose.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {id(parameter): index for index, parameter in enumerate(parameters)}
    entries: dict[int, dict[str, Any]] = {index: {} for index in range(len(parameters))}
    for block in optimizer.blocks:
        for parameter in block.parameters:
            entries[number[id(parameter)]]["block"] = block.key  # torch drops what is empty
        if block.key in saved["state"]:
            entries[number[id(_carrier(block.parameters))]][_MARK] = {block.key: saved["state"][block.key]}
    rest = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    entries[number[id(_carrier(parameters))]]["rest"] = rest
    return {"state": entries, "param_groups": saved["param_groups"]}


def _carrier(parameters: Sequence[Tensor]) -> Tensor:
    """The first that is trainable: states of frozen ones are not kept."""
    return next((parameter for parameter in parameters if parameter.requires_grad), parameters[0])


def from_parameters(saved: Any, own: Callable[[], Mapping[str, Any]]) -> Any:
    """The inverse of :func:`by_parameter`, whatever the parameters are called; anything else as it is.

    Args:
        saved: what was given to ``load_state_dict``.
        own: makes the state of the optimizer that loads; its empty parts are put back, which torch's files leave out.
    """
    state = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or "format" in saved:
        return saved
    entries = [entry for entry in state.values() if isinstance(entry, Mapping) and "block" in entry]
    rests = [entry["rest"] for entry in entries if "rest" in entry]
    if len(rests) != 1:
        return saved
    blocks = {key: value for entry in entries for key, value in entry.get(_MARK, {}).items()}
    found = {**rests[0], "state": blocks}
    return _with_empty(own(), found) | {"param_groups": saved["param_groups"]}


def _with_empty(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A nested state with the empty dictionaries and lists that another one has in the same places."""
    result = dict(saved)
    for key, value in own.items():
        if isinstance(value, Mapping):
            inner = result.get(key, {})
            if isinstance(inner, Mapping) and (inner or not _leaves(value)):
                result[key] = _with_empty(value, inner)
        elif isinstance(value, list | tuple) and not value:
            result.setdefault(key, value)
    return result


def _leaves(value: Any) -> bool:
    """Whether there is anything in it."""
    if isinstance(value, Mapping):
        return any(map(_leaves, value.values()))
    return not isinstance(value, list | tuple) or bool(value)
