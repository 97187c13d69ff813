"""Uses of a layer's weight: one per call of its module, or per linear map inside an attention module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ..layers.attention import ProjectionCall, ProjectionWatch
from ..layers.layer import Layer
from ..records.calls import EMPTY, Arrange, BatchSecond, Call

__all__ = ["Observer", "Use", "attention_modules", "is_borrowed", "observed", "use_of", "watch_attention"]

Observer = Callable[[Sequence["Use"], Tensor], Tensor | None]
"""Takes the uses that made an output, and the output; may return a tensor that takes its place."""

_groups = itertools.count()


class Use(NamedTuple):
    """One use of a layer's weight.

    Attributes:
        layer: the layer.
        value: its input, batch axis first.
        arrange: how the output is read; ``None``: as it is.
        group: number of the module's call that this is a part of, if it has several.
    """

    layer: Layer
    value: Tensor
    arrange: Arrange | None = None
    group: int | None = None

    def call(self, pass_index: int, output: Tensor) -> Call:
        """An empty record of this use.

        Raises:
            ArgumentError: if the output has no batch axis, or the batch is empty.
        """
        layer, _, arrange, group = self
        adapter = layer.adapter
        if adapter is None:
            return Call(layer.name, pass_index, output.shape[0] if output.ndim else 1, 1)
        if group is None and output.ndim < adapter.batched_ndim(layer.module):
            raise ArgumentError(f"layer {layer.name!r} was called on one unbatched sample; give it a batch of size 1")
        shaped = output if arrange is None else arrange.tokens(output.detach())
        if shaped.shape[0] == 0:
            raise ArgumentError(f"layer {layer.name!r} was called on a batch of 0 samples; {EMPTY}")
        positions = adapter.positions(layer.module, shaped)
        return Call(layer.name, pass_index, shaped.shape[0], positions, arrange, group)


def use_of(layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Use | None:
    """The use that a module's call with these arguments is.

    ``None`` if it has no argument, as learned positions and reparametrised weights have none: it saw no samples.
    """
    value = args[0] if args else next(iter(kwargs.values()), None)
    if value is None:
        return None
    if isinstance(value, Tensor) and value.layout is not torch.strided:
        value = value.detach().to_dense()  # records are matrices that are multiplied with each other
    return Use(layer, value.transpose(0, 1), BatchSecond()) if layer.batch_axis else Use(layer, value)


def is_borrowed(value: Tensor) -> bool:
    """Whether a tensor's memory is not torch's own (``from_numpy``): others refill it, and no version counts that."""
    try:
        return value.device.type == "cpu" and not value.untyped_storage().resizable()
    except (NotImplementedError, RuntimeError):  # wrappers of tensors have no storage
        return False


def watch_attention(layers: Sequence[Layer], observer: Observer) -> ProjectionWatch:
    """What tells ``observer`` about the projections of one call of an attention module.

    Args:
        layers: layers of one attention module.
        observer: see :data:`Observer`.
    """
    named, group = {layer.name: layer for layer in layers}, next(_groups)

    def record(calls: Sequence[ProjectionCall], output: Tensor) -> Tensor:
        replaced = observer([Use(named[call.name], call.value, call.arrange, group) for call in calls], output)
        return output if replaced is None else replaced

    return ProjectionWatch(layers, record)


def attention_modules(layers: Sequence[Layer]) -> dict[nn.Module, list[Layer]]:
    """The attention modules with the layers that are parts of them."""
    found: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        if layer.kind == "Attention":
            found.setdefault(layer.module, []).append(layer)
    return found


@contextmanager
def observed(layers: Sequence[Layer], observer: Observer) -> Iterator[None]:
    """Tell ``observer`` about every use of the layers' weights inside the block."""
    handles: list[Any] = []
    for layer in layers:
        if layer.kind != "Attention":
            hook = _module_hook(layer, observer)
            handles += [own.register_forward_hook(hook, with_kwargs=True, prepend=True) for own in layer.modules]
    for module, parts in attention_modules(layers).items():
        enter, leave = _attention_hooks(parts, observer)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module_hook(layer: Layer, observer: Observer) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        use = use_of(layer, args, kwargs)
        return observer([use], output) if use is not None and isinstance(output, Tensor) else None

    return hook


def _attention_hooks(layers: Sequence[Layer], observer: Observer) -> tuple[Callable[..., None], Callable[..., None]]:
    watches: list[ProjectionWatch] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        watches.append(watch_attention(layers, observer))
        watches[-1].start()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if watches:
            watches.pop().stop()

    return enter, leave
