"""What becomes of negative entries of a joint solution: a layer that should go against its own direction. Ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..curvature.declarations import SignDeclarations

__all__ = ["Clipped", "Safeguarded", "SignRule", "Unrestricted"]


class SignRule(Protocol):
    """From the solution of M beta = r to the steps that are taken. May promise more: :class:`.SignDeclarations`."""

    def choose(self, solution: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        """(L,) steps along normalised directions.

        Args:
            solution: (L,) beta.
            matrix: (L, L) M, symmetric, mostly positive semi-definite.
            right: (L,) r, slopes.
        """


@dataclass(frozen=True)
class Clipped(SignDeclarations):
    """max(0, beta), as measured in PAPERS 7.2.

    No theorem covers it: once an entry is clipped the others are no longer a minimum, and where layers are strongly
    coupled a single step can multiply the error of a linear model a thousandfold.
    """

    def choose(self, solution: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        """Zero where beta is negative."""
        return solution.clamp(min=0.0)


@dataclass(frozen=True)
class Unrestricted(SignDeclarations):
    """beta itself: the minimum of the quadratic model, in which a layer may go against its direction."""

    signed = True
    descends = True

    def choose(self, solution: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        """As it is."""
        return solution


@dataclass(frozen=True)
class Safeguarded(SignDeclarations):
    """The better of max(0, beta) and r_l / (L M_ll), each scaled to its own minimum along itself; never negative.

    The second one alone lowers the model by at least sum_l r_l^2 / (2 L M_ll) (PAPERS 3.5), so the guarantees of T18
    hold whatever was clipped; where nothing was, this is beta. No synchronisation.
    """

    descends = True

    def choose(self, solution: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        """Compare what both gain; a matrix that is not semi-definite along both leaves the clipped one."""
        clipped = solution.clamp(min=0.0)
        diagonal = matrix.diagonal()
        alone = torch.where(diagonal > 0, right.clamp(min=0.0) / (len(right) * diagonal), torch.zeros_like(right))
        candidates = torch.stack([clipped, alone])
        slopes = (candidates @ right).clamp(min=0.0)
        forms = ((candidates @ matrix) * candidates).sum(1)
        usable = forms > 0
        scale = torch.where(usable, slopes / forms, torch.zeros_like(forms))
        gains = slopes * scale
        better = torch.where(gains[1] > gains[0], scale[1] * alone, scale[0] * clipped)
        return torch.where(usable.any(), better, clipped)
