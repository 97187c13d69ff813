"""How a model is searched for layers: which module owns a parameter, and which can be read as a linear map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from ...errors import ArgumentError
from .adapters import ADAPTERS, LayerAdapter
from .attention import attention_parts, is_attention, sequence_first
from .layer import Layer
from .recognition import adapter_of, why_unread

__all__ = ["discover_layers", "has_plain_weights", "last_matrix"]

_ROLES = ("weight", "bias", "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def discover_layers(model: nn.Module, adapters: Sequence[LayerAdapter] = ADAPTERS) -> list[Layer]:
    """All layers of ``model`` with at least one trainable parameter, in the model's order.

    Modules of one kind and configuration that share all their parameters are one layer, under the first one's name.
    Any other shared parameter belongs to the first module that has it, and every module with a part in it is of kind
    ``"Other"``: statistics would count only some of its uses. So is a module whose weight is computed from other
    parameters (``weight_norm``, ``spectral_norm``, pruning, ``torch.nn.utils.parametrize``).

    Raises:
        ArgumentError: if a parameter is not initialised yet, or a trainable embedding has sparse gradients.
    """
    owners = _owners(model)
    sequences = sequence_first(model)
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = _unseen(name, module, seen)
        if (
            is_attention(module)
            and has_plain_weights(module)
            and all(len(owners[id(p)]) == 1 for p in module.parameters())
        ):
            own |= _unseen(name, module.out_proj, seen)
            layers += [Layer(*part) for part in attention_parts(name, module, own)]
        elif own:
            layers.append(_layer(name, module, own, owners, adapters, id(module) in sequences))
        seen.update(id(parameter) for parameter in own.values())
    return layers


def last_matrix(model: nn.Module, layers: Sequence[Layer]) -> str | None:
    """Name of the layer that owns the last matrix of a model, in the order of its modules: usually its output layer.

    A weight that the last module shares with an earlier one (an output layer tied to an embedding) is owned by that.

    Args:
        model: the model.
        layers: its layers.

    Returns:
        ``None`` if no trainable weight has two axes or more.
    """
    owners = {id(parameter): layer.name for layer in layers for parameter in layer.parameters.values()}
    found = None
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                found = owners.get(id(parameter), found)
    return found


def _layer(
    name: str,
    module: nn.Module,
    own: dict[str, nn.Parameter],
    owners: dict[int, list[nn.Module]],
    adapters: Sequence[LayerAdapter],
    sequence: bool,
) -> Layer:
    adapter = adapter_of(module, adapters)
    note = "" if adapter is not None else why_unread(module)
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        note = "parameters of a reparametrised weight"
    elif (adapter is not None or is_attention(module)) and not has_plain_weights(module):
        adapter, note = None, "its weight is computed from other parameters (parametrize, weight_norm, pruning)"
    users = list({id(user): user for parameter in own.values() for user in owners[id(parameter)]}.values())
    others = tuple(user for user in users if user is not module)
    if adapter is None or not all(_interchangeable(module, other) for other in others):
        if adapter is not None:
            note = f"shares parameters with a {type(others[0]).__name__} that uses them in another way"
        adapter, others = None, ()
    axis = int(sequence and adapter is not None)
    return Layer(name or "(root)", adapter.kind if adapter else "Other", module, own, adapter, others, axis, note)


def _interchangeable(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules are the same function: one type, one configuration, the same parameters."""
    own, other = dict(first.named_parameters(recurse=False)), dict(second.named_parameters(recurse=False))
    same = own.keys() == other.keys() and all(own[name] is other[name] for name in own)
    return same and type(first) is type(second) and first.extra_repr() == second.extra_repr()


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Which modules have each parameter."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return owners


def _unseen(name: str, module: nn.Module, seen: set[int]) -> dict[str, nn.Parameter]:
    """A module's own trainable parameters that belong to no earlier layer."""
    own: dict[str, nn.Parameter] = {}
    for key, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, UninitializedParameter):
            raise ArgumentError(
                f"parameter {key!r} of {name or 'the model'!r} is not initialised yet; run the model once before "
                "building the optimizer"
            )
        if parameter.requires_grad and id(parameter) not in seen:
            own[key] = parameter
    return own


def has_plain_weights(module: nn.Module) -> bool:
    """Whether every weight and bias that the module (or attention's output projection) multiplies with is a parameter.

    Both of torch's ways to reparametrise take the name out of the module's parameters: ``weight_norm``,
    ``spectral_norm`` and ``prune`` leave a plain tensor, ``parametrize`` a property of the class.
    """
    parts = [module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module]
    return all(name in part._parameters or getattr(part, name, None) is None for part in parts for name in _ROLES)
