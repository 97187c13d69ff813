"""State shared by rules that average quadratic forms over steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["AveragedForms"]


@dataclass
class AveragedForms:
    """Moving averages of the normalised forms (L, L) and the last step sizes (L,), with the weight gathered so far."""

    forms: Tensor
    last: Tensor
    weight: float = 0.0
    steps: int = 0

    @classmethod
    def zeros(cls, count: int, like: Tensor) -> AveragedForms:
        """Nothing gathered yet."""
        return cls(like.new_zeros(count, count), like.new_zeros(count))

    def take(self, forms: Tensor, decay: float) -> None:
        """Average without start-up bias; a form that is not finite does not enter."""
        total = decay * self.weight + 1.0 - decay
        mixed = torch.lerp(self.forms, forms, (1.0 - decay) / total)
        self.forms.copy_(torch.where(torch.isfinite(mixed).all(), mixed, self.forms))
        self.weight = total

    def to_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"forms": self.forms, "last": self.last, "weight": self.weight, "steps": self.steps}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Copy saved values into place."""
        self.forms.copy_(values["forms"])
        self.last.copy_(values["last"])
        self.weight, self.steps = float(values["weight"]), int(values["steps"])
