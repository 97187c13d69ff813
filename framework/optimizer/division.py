"""Who has the states where several processes share a mini-batch, chosen when an optimizer is built.

- ``"replicated"``: every process has all states and computes all inverses, as ``DistributedDataParallel`` has all
  parameters. What travels is what the structures take of everybody's samples.
- ``"owners"``: each layer has one owner, which alone keeps its momentum and state, computes its inverses and
  directions, and spreads the directions.
- ``"owners-only"``: besides, the gradient of a layer is reduced to its owner instead of to all, by a communication
  hook of ``DistributedDataParallel``: gradients down and directions back are then together what its own exchange was.
  Between ``backward`` and ``step`` other processes have NaN in ``.grad`` of layers that they do not own.
- ``"auto"``: ``"owners"`` where parameters are sharded (FSDP2, tensor parallelism), else ``"replicated"``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...curvature.layers.layer import Layer
from ...curvature.layers.sharding import is_managed, is_sharded
from ...curvature.records.needs import Needs
from ...errors import ArgumentError, CompatibilityError
from ...preconditioners.protocol import Preconditioner
from ...preconditioners.structures.by_layer import ByLayer
from ..methods.method import Method
from ..methods.parts import label
from ..processes.ranks import Ranks
from .together import Together
from .workload import owners_of_layers

__all__ = ["divided"]


def divided(
    division: str,
    ranks: Ranks,
    model: nn.Module,
    layers: Sequence[Layer],
    structures: Preconditioner | ByLayer,
    method: Method,
    backend: str,
) -> Together | None:
    """The processes and who owns what; ``None`` for one process.

    Args:
        division: a name from this module's table.
        ranks: the processes.
        model: without its wrapper.
        layers: all.
        structures: of the method, for this model.
        method: the composition.
        backend: that measures.

    Raises:
        ArgumentError: if the model is sharded and nobody shares it, or in a way that cannot be right; or if
            ``division`` does not go with it.
        CompatibilityError: if the method cannot be right in several processes.
    """
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded and not ranks.known:
        raise ArgumentError(
            f"parameter {sharded[0]!r} is sharded over processes, and process_group=None says that this process is for "
            "itself; leave process_group out"
        )
    if ranks.count == 1 and not sharded:
        return None  # it owns everything
    if division == "auto":
        division = "owners" if sharded else "replicated"
    if sharded:
        _require_right(model, layers, division, method, backend, sharded[0])
    if Needs.PRODUCTS in method.measures_at(None) | method.asks:
        raise CompatibilityError(
            "this method needs products with the Hessian of the joint mini-batch, which are not exchanged between "
            f"processes as gradients are, and {ranks.count} share a mini-batch here; use sampled curvature "
            "(SampledScores(), ExactGGN()), or build with process_group=None for a process of its own"
        )
    _require_same(ranks, {"division": division, "method": label(method), "layers": [layer.name for layer in layers]})
    owners = None if division == "replicated" else owners_of_layers(layers, structures, method, ranks.count)
    together = Together(ranks, model, layers, owners, division == "owners-only")
    if together.reduces_gradients:
        _reduce_to_owners(together)
    return together


def _require_same(ranks: Ranks, own: dict[str, object]) -> None:
    """Check that all processes build the same optimizer.

    Raises:
        ArgumentError: naming what differs.
    """
    told = ranks.objects(own)
    for name, value in own.items():
        found = [entry.get(name) for entry in told]
        if any(other != value for other in found):
            raise ArgumentError(
                f"the processes build different optimizers: their {name} are {found}; give all the same"
            )


def _require_right(
    model: nn.Module, layers: Sequence[Layer], division: str, method: Method, backend: str, name: str
) -> None:
    """Check that sharded parameters are sharded in a way that can be right.

    Raises:
        ArgumentError: if not, naming the parameter or the setting.
    """
    if division != "owners":
        raise ArgumentError(
            f"division={division!r} does not go with sharded parameters ({name!r}): whoever shards them reduces their "
            "gradients; use 'owners' or 'auto'"
        )
    if backend != "hooks":
        raise ArgumentError(
            f"parameter {name!r} is sharded over processes, and backend={backend!r} runs the layers itself, with whole "
            "parameters; use backend='hooks'"
        )
    if any(map(is_managed, model.modules())):
        for key, parameter in model.named_parameters():
            if not is_sharded(parameter) and parameter.requires_grad:
                raise ArgumentError(
                    f"parameter {key!r} is outside of fully_shard (ignored_params?), so nobody averages its gradient "
                    "over the processes; shard it too, or freeze it"
                )
    for key, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and is_managed(module) and method.needs | method.measures_at(None):
            raise CompatibilityError(
                f"fully_shard on {key or '(root)'!r}, a MultiheadAttention itself, hands it its input as three "
                "tensors, so that its projections are no longer one map; shard the block around it"
            )
    known = {id(parameter) for parameter in model.parameters()}
    for layer in layers:
        for key, parameter in layer.parameters.items():
            if id(parameter) not in known:
                raise ArgumentError(
                    f"layer {layer.name!r} reads {key!r} as a part of another parameter, which sharding cuts in "
                    "another way; freeze it, or use DistributedDataParallel"
                )


def _reduce_to_owners(together: Together) -> None:
    """Let ``DistributedDataParallel`` reduce each gradient to the owner of its layer.

    Raises:
        ArgumentError: if the model is not wrapped, or has a hook already.
    """
    ranks, wrapper = together.ranks, together.ranks.wrapper
    if wrapper is None:
        raise ArgumentError(
            "division='owners-only' changes how DistributedDataParallel reduces gradients, and the model is not "
            "wrapped; build on the DistributedDataParallel, or use division='owners'"
        )
    owner_of = {
        id(parameter): together.owners[layer.name]
        for layer in together.layers
        for parameter in layer.parameters.values()
        if together.owners is not None
    }

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, which are words here
        handles = []
        views = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        for parameter, gradient in views:
            gradient.div_(ranks.count)
            owner = owner_of.get(id(parameter))
            handles.append(ranks.begin_gradient(gradient, owner))

        def finish(_: object) -> Tensor:
            for handle, (parameter, gradient) in zip(handles, views, strict=True):
                handle.wait()
                if owner_of.get(id(parameter), ranks.rank) != ranks.rank:
                    gradient.fill_(torch.nan)
            buffer: Tensor = bucket.buffer()
            return buffer

        ready: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        ready.set_result([])
        return ready.then(finish)

    try:
        wrapper.register_comm_hook(None, hook)
    except RuntimeError as error:
        raise ArgumentError(
            f"division='owners-only' needs the communication hook of DistributedDataParallel, which is taken "
            f"({error}); use division='owners'"
        ) from error
