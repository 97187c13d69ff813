"""Mixing structures: one part per kind or name of layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from ...checking import require_fields
from ...curvature.layers.layer import Layer
from ...curvature.layers.recognition import known_kinds
from ...curvature.records.needs import Needs
from ...errors import ArgumentError, UnknownNameError
from ..protocol import Preconditioner

__all__ = [
    "LAST",
    "ByLayer",
    "by_default",
    "leaves",
    "require_matching_keys",
    "select",
    "serving_order",
    "with_last",
]

LAST = "(last)"
"""In a table: the layer that owns the last matrix of the model, in the order of its modules."""


@dataclass(frozen=True)
class ByLayer:
    """Structures chosen by layer; not a structure itself but a table of them.

    Args:
        table: from a layer's kind (``"Linear"``, ``"Conv1d"``, ``"ConvTranspose2d"``, ``"Embedding"``, ``"LayerNorm"``,
            ``"Attention"``, ``"Other"``, ...; ``osculate.curvature.layers.adapters.KINDS``) or a shell pattern of its
            qualified name (``"encoder.*"``) to a structure, or a table of them. Names win over kinds; among names the
            first match wins. The name ``"(last)"`` (:data:`LAST`) stands for the layer that owns the last matrix of the
            model, its output layer, which is found when the optimizer is built.
        otherwise: the structure for every parameter that its layer's entry does not serve (a convolution's bias under
            kernel blocks) and for layers without an entry. ``None``: they get the method's fallback.

    Raises:
        ArgumentError: if the table is empty, a key is no name (``"Linear"``, not ``nn.Linear``), an entry no structure.
    """

    table: Mapping[str, Preconditioner | ByLayer]
    otherwise: Preconditioner | None = None

    def __post_init__(self) -> None:
        require_fields(self)
        if not self.table:
            raise ArgumentError("ByLayer needs at least one entry, e.g. ByLayer({'Linear': MiniBlock()})")
        object.__setattr__(self, "table", MappingProxyType(dict(self.table)))

    def __reduce__(self) -> tuple[type[ByLayer], tuple[dict[str, Preconditioner | ByLayer], Preconditioner | None]]:
        """For copies and pickles: a read-only view of a dictionary has neither."""
        return type(self), (dict(self.table), self.otherwise)

    @property
    def needs(self) -> Needs:
        """Union over all entries."""
        total = Needs.NOTHING
        for part in leaves(self):
            total |= part.needs
        return total


def leaves(preconditioner: Preconditioner | ByLayer) -> Iterator[Preconditioner]:
    """Every structure inside."""
    if not isinstance(preconditioner, ByLayer):
        yield preconditioner
        return
    for part in preconditioner.table.values():
        yield from leaves(part)
    if preconditioner.otherwise is not None:
        yield from leaves(preconditioner.otherwise)


def select(preconditioner: Preconditioner | ByLayer, layer: Layer) -> list[tuple[Preconditioner, tuple[str, ...]]]:
    """Which structures serve which parameters of a layer; parameters that nobody serves are left out."""
    if not isinstance(preconditioner, ByLayer):
        served = preconditioner.serves(layer)
        return [(preconditioner, served)] if served else []
    entry = _entry(preconditioner, layer)
    chosen = [] if entry is None else select(entry, layer)
    taken = {name for _, names in chosen for name in names}
    rest = tuple(name for name in layer.parameters if name not in taken)
    other = preconditioner.otherwise
    if rest and other is not None and _can_take(other, layer, rest):
        chosen.append((other, rest))
    return chosen


def with_last(preconditioner: Preconditioner | ByLayer, last: str | None) -> Preconditioner | ByLayer:
    """The same table with a layer's name in the place of ``"(last)"``.

    Args:
        preconditioner: a structure, or a table of them.
        last: the name; ``None``: the model has no matrix.

    Raises:
        ArgumentError: if there is no such layer, and no other entry in its table.
    """
    if not isinstance(preconditioner, ByLayer):
        return preconditioner
    table: dict[str, Preconditioner | ByLayer] = {}
    for key, part in preconditioner.table.items():
        name = last if key == LAST else key
        if name is not None:
            table.setdefault(name, with_last(part, last))
    if not table:
        raise ArgumentError(f"ByLayer has an entry for {LAST!r} alone, and the model has no trainable matrix")
    return ByLayer(table, preconditioner.otherwise)


def serving_order(preconditioner: Preconditioner | ByLayer, layer: Layer) -> Iterator[Preconditioner]:
    """The structures that are asked for a layer's parameters, in turn; the method's fallback comes after them."""
    if not isinstance(preconditioner, ByLayer):
        yield preconditioner
        return
    entry = _entry(preconditioner, layer)
    if entry is not None:
        yield from serving_order(entry, layer)
    if preconditioner.otherwise is not None:
        yield preconditioner.otherwise


def by_default(preconditioner: Preconditioner | ByLayer, layer: Layer) -> set[str]:
    """Parameters of a layer that a table serves by its ``otherwise``: nobody has named a structure for them."""
    if not isinstance(preconditioner, ByLayer):
        return set()
    entry = _entry(preconditioner, layer)
    own = set() if entry is None else {name for _, names in select(entry, layer) for name in names}
    inner = set() if entry is None else by_default(entry, layer)
    return inner | ({name for _, names in select(preconditioner, layer) for name in names} - own)


def require_matching_keys(table: ByLayer, layers: Sequence[Layer]) -> None:
    """Check that every key is a kind of layer, or a pattern that matches the name of one.

    Raises:
        UnknownNameError: naming the near misses; a misspelt key would silently leave its layers to the fallback.
    """
    names, kinds = [layer.name for layer in layers], known_kinds()
    for key in table.table:
        if key not in kinds and not any(fnmatchcase(name, key) for name in names):
            raise UnknownNameError("layer kind or name in ByLayer", key, [*kinds, *names])


def _entry(table: ByLayer, layer: Layer) -> Preconditioner | ByLayer | None:
    """What a table names for a layer: names win over kinds, the first name over the others."""
    for key, part in table.table.items():
        if fnmatchcase(layer.name, key):
            return part
    return table.table.get(layer.kind)


def _can_take(part: Preconditioner, layer: Layer, names: tuple[str, ...]) -> bool:
    """A structure on joint matrices takes a layer whole or not at all."""
    served = part.serves(layer)
    return names == served if part.joint else set(names) <= set(served)
