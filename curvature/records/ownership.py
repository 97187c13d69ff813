"""Whose row is it? The sample of every row of a call, where the call's own first axis does not count the samples.

A row is one entry of a call's first axis at one position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["NOBODY", "Ownership", "regular_order"]

NOBODY = -1
"""The owner of a row that the model's output does not depend on."""


@dataclass(frozen=True)
class Ownership:
    """Which sample each row of one call belongs to.

    Attributes:
        samples: N, of the pass.
        owners: (R, S) on the host, a sample or :data:`NOBODY` for each of R entries of the first axis and S positions;
            ``None``: every row belongs to several samples (learned positions, tables that all samples look into).
    """

    samples: int
    owners: Tensor | None

    def same(self, other: Ownership | None) -> bool:
        """Whether both say the same."""
        if other is None or other.samples != self.samples or (self.owners is None) != (other.owners is None):
            return False
        return self.owners is None or other.owners is None or torch.equal(self.owners, other.owners)

    @cached_property
    def entries(self) -> tuple[int, Tensor | None] | None:
        """How often a sample has an entry of the first axis, and the order that brings a sample's entries together.

        ``None`` if an entry's positions belong to different samples, or samples have different numbers of entries. The
        order is ``None`` if they lie together already.
        """
        if self.owners is None or bool((self.owners != self.owners[:, :1]).any()):
            return None
        return regular_order(self.owners[:, 0], self.samples)

    @cached_property
    def regular(self) -> bool:
        """Whether every row belongs to a sample, and all samples have equally many: then the model's shapes decide."""
        return self.owners is None or regular_order(self.owners.flatten(), self.samples) is not None


def regular_order(owners: Tensor, samples: int) -> tuple[int, Tensor | None] | None:
    """How many rows each sample has, and their order; ``None`` if samples differ or a row is nobody's."""
    if bool((owners < 0).any()):
        return None
    counts = torch.bincount(owners, minlength=samples)
    if bool((counts != counts[0]).any()):
        return None
    order = owners.argsort(stable=True)
    return int(counts[0]), None if torch.equal(order, torch.arange(len(order))) else order
