"""The hooks that a capture places on a model: they hold it weakly, and belong to the modules they were placed on.

When the capture's optimizer is gone they do nothing. A copy of the model (a teacher, an exponential moving average) and
a pickled model carry hooks without a capture, which do nothing either. Of a capture they know what they tell it, and no
more: :class:`PassRecorder`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ..layers.attention import ProjectionWatch
from ..layers.layer import Layer
from .passes import Pauses
from .sampling import is_extra_backward
from .uses import Use, attention_modules, use_of

__all__ = ["AttentionHooks", "BeginHook", "EndHook", "Hook", "LayerHook", "PassRecorder", "attach"]


class PassRecorder(Protocol):
    """Whom the hooks tell what happens in a model."""

    @property
    def model(self) -> nn.Module:
        """The model: its own calls are the passes."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers whose uses are told."""

    @property
    def pauses(self) -> Pauses:
        """While they last, no pass begins or ends."""

    def wants(self, layer: Layer) -> bool:
        """Whether anything of a layer is to be recorded now."""

    def begin_pass(self) -> None:
        """The model is called: a new pass."""

    def end_pass(self, output: Any) -> None:
        """The model has returned ``output``."""

    def on_use(self, uses: Sequence[Use], output: Any) -> Tensor | None:
        """Layers have made one output; returns what stands in its place, if anything."""

    def watch(self, layers: Sequence[Layer]) -> ProjectionWatch | None:
        """What records the projections of one call of an attention module; ``None`` if there is nothing to record."""


class Hook:
    """Holds a capture weakly."""

    def __init__(self, capture: object | None = None, layer: Layer | None = None):
        self._capture = None if capture is None else weakref.ref(capture)
        self._layer = layer

    def capture(self) -> Any:
        """The capture, if it is still there and what runs now is the user's."""
        return None if self._capture is None or is_extra_backward() else self._capture()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        """A copy of the model, or the model in a file, is nobody's model."""
        return type(self), ()


class LayerHook(Hook):
    """Forward hook of one layer's module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Record the call."""
        capture: PassRecorder | None = self.capture()
        if capture is None or self._layer is None or not capture.wants(self._layer):
            return None
        if not any(module is own for own in self._layer.modules):
            return None  # a replica shares its hooks
        use = use_of(self._layer, args, kwargs)
        return None if use is None else capture.on_use([use], output)


class AttentionHooks(Hook):
    """Forward pre-hook and forward hook of an attention module: between them its projections are watched."""

    def __init__(
        self, capture: PassRecorder | None = None, module: nn.Module | None = None, layers: Sequence[Layer] = ()
    ) -> None:
        super().__init__(capture)
        self._module, self._layers = module, layers
        self._watches: list[ProjectionWatch] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Watch, if anything is to be recorded."""
        while self._watches:  # an interrupt from the keyboard skipped the other hook
            self._watches.pop().stop()
        capture: PassRecorder | None = self.capture()
        if capture is None or module is not self._module:
            return
        watch = capture.watch(self._layers)
        if watch is not None:
            watch.start()
            self._watches.append(watch)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Stop watching, also when the module has raised."""
        if self._watches and module is self._module:
            self._watches.pop().stop()


class BeginHook(Hook):
    """Forward pre-hook of the model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A new pass begins."""
        capture: PassRecorder | None = self.capture()
        if capture is not None and module is capture.model and not capture.pauses:
            capture.begin_pass()


class EndHook(Hook):
    """Forward hook of the model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The pass is complete: its output is the model's."""
        capture: PassRecorder | None = self.capture()
        if capture is not None and module is capture.model and not capture.pauses:
            capture.end_pass(output)


def attach(capture: PassRecorder) -> list[Any]:
    """Place the hooks of a capture; returns their handles."""
    handles: list[Any] = []
    for layer in capture.layers:
        if layer.kind != "Attention":
            hook = LayerHook(capture, layer)
            handles += [module.register_forward_hook(hook, with_kwargs=True) for module in layer.modules]
    for module, layers in attention_modules(capture.layers).items():
        watch = AttentionHooks(capture, module, layers)
        handles.append(module.register_forward_pre_hook(watch.enter))
        handles.append(module.register_forward_hook(watch.leave, always_call=True))
    handles.append(capture.model.register_forward_pre_hook(BeginHook(capture)))
    handles.append(capture.model.register_forward_hook(EndHook(capture)))
    return handles
