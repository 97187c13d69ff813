"""State shared by rules that average quadratic forms and slopes over steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["AveragedForms"]


@dataclass
class AveragedForms:
    """Moving averages over steps, each with the weight it has gathered; the first value enters whole.

    Attributes:
        forms: (L, L) quadratic forms along normalised directions.
        slopes: (L,) gradients along normalised directions.
        forms_weight: 0-dimensional, in [0, 1).
        slopes_weight: 0-dimensional, in [0, 1).
    """

    forms: Tensor
    slopes: Tensor
    forms_weight: Tensor
    slopes_weight: Tensor

    @classmethod
    def zeros(cls, count: int, like: Tensor) -> AveragedForms:
        """Nothing gathered yet."""
        return cls(like.new_zeros(count, count), like.new_zeros(count), like.new_zeros(()), like.new_zeros(()))

    def take_forms(self, forms: Tensor, decay: float) -> None:
        """Average the forms; one that is not finite does not enter."""
        _average_(self.forms, forms, self.forms_weight, decay)

    def take_slopes(self, slopes: Tensor, decay: float) -> None:
        """Average the slopes; one that is not finite does not enter."""
        _average_(self.slopes, slopes, self.slopes_weight, decay)

    def along_all(self, forms: Tensor | None, squared_norms: Tensor, decay: float) -> Tensor:
        """d' C d along the direction of all layers together, 0-dimensional, from averaged forms.

        Args:
            forms: (L, L) of this step along the directions themselves, or ``None`` where none was measured; a form of
                an earlier step is scaled to the present lengths.
            squared_norms: (L,) |d_l|^2.
            decay: of the average, in [0, 1).
        """
        norms = squared_norms.clamp(min=torch.finfo(squared_norms.dtype).tiny).sqrt()
        if forms is not None:
            self.take_forms(forms / torch.outer(norms, norms), decay)
        return torch.dot(norms, self.forms @ norms)

    def to_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        weights = {"forms_weight": self.forms_weight, "slopes_weight": self.slopes_weight}
        return {"forms": self.forms, "slopes": self.slopes} | weights

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy saved values into place."""
        self.forms.copy_(values["forms"])
        self.slopes.copy_(values["slopes"])
        self.forms_weight.copy_(values["forms_weight"])
        self.slopes_weight.copy_(values["slopes_weight"])


def _average_(average: Tensor, new: Tensor, weight: Tensor, decay: float) -> None:
    """The weight is a tensor, so that a value that does not enter is not counted either; no synchronisation."""
    total = torch.rsub(weight, 1.0 - decay, alpha=-decay)  # decay * weight + (1 - decay), in one operation
    mixed = torch.lerp(average, new, (1.0 - decay) / total)
    finite = (mixed - mixed == 0).all()  # finite numbers alone: half the operations of isfinite
    torch.where(finite, mixed, average, out=average)
    torch.where(finite, total, weight, out=weight)
