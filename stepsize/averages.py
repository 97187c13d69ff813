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
    """

    forms: Tensor
    slopes: Tensor
    forms_weight: float = 0.0
    slopes_weight: float = 0.0

    @classmethod
    def zeros(cls, count: int, like: Tensor) -> AveragedForms:
        """Nothing gathered yet."""
        return cls(like.new_zeros(count, count), like.new_zeros(count))

    def take_forms(self, forms: Tensor, decay: float) -> None:
        """Average the forms; one that is not finite does not enter."""
        self.forms_weight = _average_(self.forms, forms, self.forms_weight, decay)

    def take_slopes(self, slopes: Tensor, decay: float) -> None:
        """Average the slopes; one that is not finite does not enter."""
        self.slopes_weight = _average_(self.slopes, slopes, self.slopes_weight, decay)

    def to_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        weights = {"forms_weight": self.forms_weight, "slopes_weight": self.slopes_weight}
        return {"forms": self.forms, "slopes": self.slopes} | weights

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy saved values into place."""
        self.forms.copy_(values["forms"])
        self.slopes.copy_(values["slopes"])
        self.forms_weight = float(values["forms_weight"])
        self.slopes_weight = float(values["slopes_weight"])


def _average_(average: Tensor, new: Tensor, weight: float, decay: float) -> float:
    total = decay * weight + 1.0 - decay
    mixed = torch.lerp(average, new, (1.0 - decay) / total)
    average.copy_(torch.where(torch.isfinite(mixed).all(), mixed, average))
    return total
