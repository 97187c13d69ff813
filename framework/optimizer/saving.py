"""Saving and loading: what does not fit is found and named before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import ArgumentError
from ..methods.parts import label
from .groups import numbers_of
from .lagging import Lagging, restored
from .session import Session
from .stepping import LAST

__all__ = ["consolidated", "require_same_layout", "restore_state", "saved_state", "with_pending"]

_WAY_OUT = "load into an optimizer built for the same model and method"
_FORMAT = 2
"""Layout of saved states; 1 was that of osculate 0.1, which said neither its number nor its method."""

_PENDING = "pending"
"""Of a block, only while there is something: older versions read states without, and this one theirs."""


def saved_state(optimizer: Session, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tensors, numbers and nested dictionaries keyed by name; tensors are not copied.

    Args:
        optimizer: whose state.
        groups: its parameter groups as torch saves them, parameters numbered.
    """
    return {
        "format": _FORMAT,
        "method": _described(optimizer),
        "state": {block.key: block.to_dict() for block in optimizer.own_blocks},
        "step_size": optimizer._rule.to_dict(),
        "guard": {} if optimizer.guard_state is None else dict(optimizer.guard_state.to_dict()),
        "progress": {
            "step": optimizer._step,
            "warm": optimizer._warm,
            "gradient_evaluations": optimizer.gradient_evaluations,
            "skipped_steps": optimizer.skipped_steps,
            "seed": optimizer.capture.seed,
        },
        "param_groups": list(groups),
        "group_of": _group_of(optimizer),
    }


def with_pending(saved: dict[str, Any], lagging: Lagging) -> dict[str, Any]:
    """A saved state with the inverses that are to be used at a later step, each in its block's; waits for them."""
    if not lagging.pending:
        return saved
    found = lagging.to_dict()
    return {**saved, "state": {k: v | {_PENDING: found[k]} if k in found else v for k, v in saved["state"].items()}}


def _without_pending(saved: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The inverse of :func:`with_pending`: (the rest, by block what is pending)."""
    found = {k: v[_PENDING] for k, v in saved["state"].items() if isinstance(v, Mapping) and _PENDING in v}
    if not found:
        return saved, found
    states = dict(saved["state"])
    for key in found:
        states[key] = {name: value for name, value in states[key].items() if name != _PENDING}
    return {**saved, "state": states}, found


def restore_state(optimizer: Session, saved: Mapping[str, Any]) -> None:
    """Copy a saved state into an optimizer; ``saved`` is not modified.

    Raises:
        ArgumentError: if it is of another optimizer, format or method, layers, parts or groups are missing or unknown,
            a number is out of range or a shape differs; no tensor was written.
    """
    _require_format(saved)
    _require_same_method(_described(optimizer), saved["method"])
    for index, group in enumerate(saved["param_groups"]):
        optimizer.method.check_values(**numbers_of(group, index))
    _add_missing_groups(optimizer, saved)
    own = saved_state(optimizer, optimizer.param_groups)
    saved, pending = _without_pending(of_own_layers(optimizer, saved))
    nested = ("state", "step_size", "guard", "progress")
    require_same_layout({key: own[key] for key in nested}, {key: saved[key] for key in nested})
    if own["group_of"] != saved["group_of"]:
        raise ArgumentError(f"saved parameter groups differ from this optimizer's; {_WAY_OUT} and groups")
    found = restored({block.key: block for block in optimizer.own_blocks}, pending)
    for block in optimizer.own_blocks:
        block.load_dict(saved["state"][block.key])
    optimizer.lagging.pending = found
    optimizer._rule.load_dict(saved["step_size"])
    if optimizer.guard_state is not None:
        optimizer.guard_state.load_dict(dict(saved["guard"]))
    progress = saved["progress"]
    optimizer._step, optimizer._warm = int(progress["step"]), bool(progress["warm"])
    optimizer.gradient_evaluations = int(progress["gradient_evaluations"])
    optimizer.skipped_steps = int(progress["skipped_steps"])
    optimizer.capture.seed = optimizer._rule.seed = int(progress["seed"])
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in values.items() if name != "params"})


def of_own_layers(optimizer: Session, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a saved state what this process owns; as it is where it owns everything."""
    if optimizer.together is None or optimizer.together.owners is None:
        return saved
    others = {block.key for block in optimizer.blocks} - {block.key for block in optimizer.own_blocks}
    found = {key: value for key, value in saved["state"].items() if key not in others}
    rule = dict(saved["step_size"])
    if isinstance(rule.get(LAST), Mapping):
        away = {layer.name for layer in optimizer.layers if not optimizer.together.owns(layer)}
        rule[LAST] = {name: value for name, value in rule[LAST].items() if name not in away}
    return {**saved, "state": found, "step_size": rule}


def consolidated(optimizer: Session, own: Mapping[str, Any], to: int) -> dict[str, Any] | None:
    """The state of all processes' layers, at one of them; ``None`` elsewhere. Every process must ask.

    Args:
        optimizer: of this process.
        own: its state, see :func:`saved_state`.
        to: the process that gets the whole.

    Memory: the whole state, in the memory of the host.
    """
    parts = optimizer.ranks.gathered(_on_host({"state": own["state"], "step_size": own["step_size"]}), to)
    if parts is None:
        return None
    states = {key: value for part in parts for key, value in part["state"].items()}
    rule = dict(own["step_size"])
    if LAST in rule:
        lasts = {name: value for part in parts for name, value in part["step_size"][LAST].items()}
        rule[LAST] = {layer.name: lasts[layer.name] for layer in optimizer.layers}
    return {**own, "state": {block.key: states[block.key] for block in optimizer.blocks}, "step_size": rule}


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_host(entry) for key, entry in value.items()}
    return [_on_host(entry) for entry in value] if isinstance(value, list | tuple) else value


def _require_format(saved: Any) -> None:
    """Check that this is a state of this library and of this format."""
    if not isinstance(saved, Mapping):
        raise ArgumentError(f"a state is the dictionary that state_dict() returned, got {type(saved).__name__}")
    found = saved.get("format", 1)
    if not {"state", "progress", "param_groups"} <= set(saved):
        raise ArgumentError(f"not a state of an osculate optimizer: it has {sorted(map(str, saved))}; {_WAY_OUT}")
    if found != _FORMAT:
        raise ArgumentError(
            f"the state has format {found!r}{' (osculate 0.1)' if found == 1 else ''}, this version reads format "
            f"{_FORMAT}; load it with the version that saved it, or start from the model's parameters alone"
        )
    for key in ("method", "state", "step_size", "guard", "progress", "group_of", "param_groups"):
        kind = list | tuple if key == "param_groups" else Mapping
        if not isinstance(saved.get(key), kind):
            raise ArgumentError(f"the state is damaged: its {key!r} is {type(saved.get(key)).__name__}; {_WAY_OUT}")


def _described(optimizer: Session) -> dict[str, str]:
    """The parts on which the meaning of a saved state depends, in words; schedules and damping may change in a run."""
    method = optimizer.method
    names = ["preconditioner", "curvature", "momentum", "fallback"]
    names += ["step_size"] if optimizer._rule.state is not None or optimizer._rule.last is not None else []
    names += ["guard"] if optimizer.guard_state is not None else []
    return {name: label(getattr(method, name)) for name in names}


def _require_same_method(own: Mapping[str, str], saved: Mapping[str, str]) -> None:
    for name in dict.fromkeys((*own, *saved)):
        if own.get(name) != saved.get(name):
            raise ArgumentError(
                f"the state was saved with {name} {saved.get(name)}, this optimizer has {own.get(name)}; {_WAY_OUT}, "
                "or change a part in the middle of a run on purpose: state['method'] = optimizer.state_dict()['method']"
            )


def _group_of(optimizer: Session) -> dict[str, int]:
    """Index of the group of every parameter, by the parameter's name in the model."""
    names = {id(parameter): name for name, parameter in optimizer.model.named_parameters()}
    groups = enumerate(optimizer.param_groups)
    return {names[id(parameter)]: index for index, group in groups for parameter in group["params"]}


def _add_missing_groups(optimizer: Session, saved: Mapping[str, Any]) -> None:
    """Groups that joined the saved optimizer in the middle of its run join this one too."""
    parameters: dict[str, nn.Parameter] = dict(optimizer.model.named_parameters())
    owned = _group_of(optimizer)
    for index in range(len(optimizer.param_groups), len(saved["param_groups"])):
        names = [name for name, group in saved["group_of"].items() if group == index]
        if any(name not in parameters or name in owned or not parameters[name].requires_grad for name in names):
            raise ArgumentError(
                f"saved parameter group {index} ({', '.join(names)}) was added during the run, and cannot be added "
                "here: its parameters must be in the model, unfrozen, and in no group of this optimizer yet"
            )
        values = {key: value for key, value in saved["param_groups"][index].items() if key != "params"}
        optimizer.add_param_group(
            {"params": [parameters[name] for name in names]}
            | {key: values[key] for key in ("lr", "damping", "weight_decay")}
        )


def require_same_layout(own: Any, saved: Any, where: str = "") -> None:
    """Check that two nested states have the same keys, lengths and shapes.

    Args:
        own: state of the optimizer that loads.
        saved: what is to be loaded; not modified.
        where: path to the two, for the message.

    Raises:
        ArgumentError: naming the first place where they differ.
    """
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        missing, unknown = [sorted(map(str, set(a) - set(b))) for a, b in ((own, saved), (saved, own))]
        if missing or unknown:
            raise ArgumentError(f"saved state{where} does not match: missing {missing}, unknown {unknown}; {_WAY_OUT}")
        for key in own:
            require_same_layout(own[key], saved[key], f"{where} of {key!r}" if not where else f"{where}, {key}")
    elif isinstance(own, list | tuple) and isinstance(saved, list | tuple) and len(own) == len(saved):
        for index, pair in enumerate(zip(own, saved, strict=True)):
            require_same_layout(*pair, f"{where}[{index}]")
    elif _shape(own) != _shape(saved):
        raise ArgumentError(f"saved state{where} has {_shape(saved)}, this model needs {_shape(own)}; {_WAY_OUT}")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{len(value)} entries"
    return "a number" if isinstance(value, int | float) else type(value).__name__
