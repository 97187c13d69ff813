"""Whether a closure that raised had made all its exchanges by then, so that this process can still tell the others.

An error after the closure's backward pass can be told: the others go on to their next meeting, and this process comes
there too. After one before it they wait for its gradients, and whatever it sent would be taken for those. Which of the
two it was is counted: torch numbers the collectives of a group, and evaluations make equally many. Where one makes more
than the last two and raises among them, this process waits in vain for a moment (:meth:`.Ranks.leave`), no longer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor, distributed

from ...curvature.layers.sharding import is_sharded

__all__ = ["Exchanges"]


class Exchanges:
    """Collectives of the evaluations of one optimizer.

    Args:
        groups: in which gradients and parameters may be exchanged, beside those of meshes.
        parameters: of the model; the groups of their meshes count too.
    """

    def __init__(self, groups: Iterable[Any], parameters: Iterable[Tensor]):
        # By name: a group that somebody holds when the process ends is torn down too late.
        self._names = {group.group_name for group in groups}
        sharded: list[Any] = [parameter for parameter in parameters if is_sharded(parameter)]
        self._meshes = list({id(parameter.device_mesh): parameter.device_mesh for parameter in sharded}.values())
        self._made: dict[Hashable, tuple[int, int]] = {}
        self._began = 0

    def _count(self) -> int:
        """All that were ever made; 0 where a backend does not number them."""
        names = self._names.union(*([group.group_name for group in m.get_all_groups()] for m in self._meshes))
        try:
            return sum(_resolved(name)._get_sequence_number_for_group() for name in names)
        except RuntimeError:
            return 0

    def begin(self) -> None:
        """An evaluation begins."""
        self._began = self._count()

    def end(self, kind: Hashable) -> None:
        """It is over.

        Args:
            kind: evaluations of one kind exchange the same, where layers are exchanged one by one.
        """
        kind = kind if self._meshes else None
        self._made[kind] = self._made.get(kind, (0, 0))[1], self._count() - self._began

    def complete(self, kind: Hashable) -> bool:
        """Whether the evaluation that was broken off has made as many as the last two of its kind, and any at all."""
        earlier, last = self._made.get(kind if self._meshes else None, (0, 0))
        return 0 < earlier == last == self._count() - self._began


def _resolved(name: str) -> Any:
    known: Any = distributed.distributed_c10d
    return known._resolve_process_group(name)
