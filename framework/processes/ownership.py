"""Which process owns which layer: the one that keeps its state, computes its inverses and its directions.

Longest processing time first: layers in the order of their work, the heaviest first, each to the process that has
least to do. No process then has more than 4/3 - 1/(3P) times what the best division would give the busiest one
(R. L. Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17:416-429, 1969). Every process works
out the same table from shapes alone: nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Work", "owners_of"]


@dataclass(frozen=True)
class Work:
    """Of one layer, in floating-point operations.

    Attributes:
        inverses: of all its matrices, whenever they are renewed.
        directions: of one step.
        numbers: that its state and momentum hold.
    """

    inverses: float
    directions: float
    numbers: int

    @property
    def total(self) -> float:
        """Of a step in which inverses are renewed, which is the one that others wait for; a number counts as one."""
        return self.inverses + self.directions + self.numbers


def owners_of(work: Mapping[str, Work], count: int) -> dict[str, int]:
    """The owner of every layer.

    Args:
        work: by layer, in the order of the model.
        count: number of processes P >= 1.
    """
    loads = [0.0] * count
    owners: dict[str, int] = {}
    for name in sorted(work, key=lambda name: -work[name].total):  # stable: equal layers in the order of the model
        chosen = min(range(count), key=lambda rank: (loads[rank], rank))
        owners[name] = chosen
        loads[chosen] += work[name].total
    return {name: owners[name] for name in work}
