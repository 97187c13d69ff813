"""``nn.MultiheadAttention``: its projections are never called as modules, so they are watched while it runs.

Between the module's forward pre-hook and its forward hook a torch function mode sees every call of
``torch.nn.functional.linear`` whose weight is one of the module's parameters, or some of their rows. The mode is only
entered when something is to be recorded; ``torch.no_grad()`` evaluation keeps torch's fused path.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...errors import ArgumentError
from .adapters import LayerAdapter, ProjectionAdapter, ProjectionBiasAdapter
from .adapters.forwards import keeps_forward
from .layer import Layer

__all__ = ["Arrangement", "ProjectionCall", "ProjectionWatch", "attention_parts", "is_attention", "sequence_first"]

LayerFields = tuple[str, str, nn.Module, dict[str, nn.Parameter], LayerAdapter | None]
_SEPARATE = ("q_proj", "k_proj", "v_proj")


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """``nn.MultiheadAttention`` and subclasses that keep its forward."""
    return keeps_forward(module, nn.MultiheadAttention)


def sequence_first(model: nn.Module) -> set[int]:
    """Ids of the modules inside torch's own transformer layers with ``batch_first=False``: samples are their axis 1."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer | nn.Transformer):
            attention = next((entry for entry in module.modules() if isinstance(entry, nn.MultiheadAttention)), None)
            if attention is not None and not attention.batch_first:
                found.update(id(entry) for entry in module.modules())
    return found


def attention_parts(name: str, module: nn.MultiheadAttention, own: Mapping[str, nn.Parameter]) -> Iterator[LayerFields]:
    """The layers of one attention module, as the first fields of ``Layer``.

    ``in_proj`` (packed: rows of query, key and value), or ``q_proj``, ``k_proj``, ``v_proj`` and the packed bias; then
    ``out_proj``. The learned extra tokens ``bias_k``, ``bias_v`` are no linear map: kind ``"Other"``.

    Args:
        name: qualified name of the module.
        module: the module.
        own: its trainable parameters by name; those of ``out_proj`` as ``weight`` and ``bias``.
    """
    prefix = f"{name}." if name else ""
    plain, bias_only = ProjectionAdapter(), ProjectionBiasAdapter()
    groups: dict[str, tuple[dict[str, str], LayerAdapter]] = {
        **{key: ({"weight": f"{key}_weight"}, plain) for key in _SEPARATE},
        "in_proj": (
            {"weight": "in_proj_weight", "bias": "in_proj_bias"},
            plain if module._qkv_same_embed_dim else bias_only,
        ),
        "out_proj": ({"weight": "weight", "bias": "bias"}, plain),
    }
    for key, (names, adapter) in groups.items():
        parameters = {role: own[attribute] for role, attribute in names.items() if attribute in own}
        if parameters:
            yield f"{prefix}{key}", adapter.kind, module, parameters, adapter
    extra = {key: own[key] for key in ("bias_k", "bias_v") if key in own}
    if extra:
        yield name or "(root)", "Other", module, extra, None


@dataclass(frozen=True)
class Arrangement:
    """How tensors of one call of ``linear`` inside attention become (N, S, features).

    Attributes:
        samples: N.
        first_row: of the rows of the layer's matrix that this call uses.
        rows: number of all rows of the layer's matrix; the others are filled with zeros.
    """

    samples: int
    first_row: int
    rows: int

    def tokens(self, value: Tensor) -> Tensor:
        """(L, N, d), or (L N, d) with the token slowest, to (N, L, d); a view."""
        return value.reshape(-1, self.samples, value.shape[-1]).transpose(0, 1)

    def __call__(self, value: Tensor) -> Tensor:
        """An output, or a gradient at it, with zeros in the rows that this call does not use."""
        missing = self.rows - value.shape[-1]
        arranged = self.tokens(value)
        return functional.pad(arranged, (self.first_row, missing - self.first_row)) if missing else arranged


@dataclass(frozen=True)
class ProjectionCall:
    """One call of ``linear`` for one layer: what a recorder is told."""

    name: str
    value: Tensor
    arrange: Arrangement


Recorder = Callable[[Sequence[ProjectionCall], Tensor], Tensor]
"""Takes the layers that one output belongs to, and the output; returns the output to go on with."""


@dataclass(frozen=True)
class _Use:
    """Where a tensor of the module is used: rows from ``first_row`` of the matrix of a layer with ``rows`` rows."""

    name: str
    tensor: Tensor
    first_row: int
    rows: int


class ProjectionWatch(TorchFunctionMode):
    """Tells ``record`` about every projection while one attention module runs.

    Args:
        layers: layers of one attention module.
        record: what to do with a projection.
    """

    def __init__(self, layers: Sequence[Layer], record: Recorder):
        super().__init__()
        module = layers[0].module
        assert isinstance(module, nn.MultiheadAttention)
        self.record = record
        self.samples = 1
        self.inside = False
        self.uses = list(_uses(module, {layer.name.rpartition(".")[2]: layer.name for layer in layers}))

    def start(self) -> None:
        """Watch from now on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Watch no longer."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``linear`` is recorded, the attention function is entered, everything else passes."""
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward and not self.inside:
            query = args[0] if args else kwargs["query"]
            if query.ndim < 3:
                raise ArgumentError("attention was called on one unbatched sample; give it a batch of size 1")
            self.samples, self.inside = query.shape[1], True
            try:
                with self:
                    return _without_dispatch(func)(*args, **kwargs)
            finally:
                self.inside = False
        output = func(*args, **kwargs)
        if func is not functional.linear or len(args) < 2:
            return output
        calls = [
            ProjectionCall(use.name, arrange.tokens(args[0]), arrange)
            for use, first in ((use, _first_row(args[1], use.tensor)) for use in self.uses)
            if first is not None
            for arrange in [Arrangement(self.samples, use.first_row + first, use.rows)]
        ]
        return self.record(calls, output) if calls else output


def _uses(module: nn.MultiheadAttention, names: Mapping[str, str]) -> Iterator[_Use]:
    width = module.embed_dim
    if "out_proj" in names:
        yield _Use(names["out_proj"], module.out_proj.weight, 0, width)
    if module._qkv_same_embed_dim:
        if "in_proj" in names:
            yield _Use(names["in_proj"], module.in_proj_weight, 0, 3 * width)
        return
    for index, key in enumerate(_SEPARATE):
        weight = getattr(module, f"{key}_weight")
        if key in names:
            yield _Use(names[key], weight, 0, width)
        if "in_proj" in names:
            yield _Use(names["in_proj"], weight, index * width, 3 * width)


def _first_row(weight: Tensor, whole: Tensor) -> int | None:
    """The first row of ``whole`` that ``weight`` shows, or ``None`` if it shows other memory."""
    if weight is whole:
        return 0
    if weight.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or weight.stride() != whole.stride():
        return None
    first, offset = divmod(int(weight.storage_offset()) - int(whole.storage_offset()), whole.stride(0))
    return first if offset == 0 and 0 <= first <= whole.shape[0] - weight.shape[0] else None


def _without_dispatch(function: Any) -> Any:
    """A Python function of torch that does not hand itself to the active mode: what it calls still does."""
    names = {**function.__globals__, "has_torch_function": _never}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(tensors: Sequence[Tensor]) -> bool:
    return False
