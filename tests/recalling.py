"""For whole runs of rules that recall: optimizers, what they remember, and a guard that refuses as it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import osculate as osc
from osculate.stepsize.guard import Trial
from small_nets import make
from torch import Tensor, nn

__all__ = ["Verdicts", "built", "sampled", "steps_kept"]


def sampled(**parts: Any) -> osc.Method:
    """Momentum directions, sampled scores."""
    return osc.Method(**({"momentum": osc.EMA(0.5)} | parts), defaults={"lr": 1.0})


def built(method: Any, net: str = "mlp", **options: Any) -> tuple[osc.SecondOrder, nn.Module]:
    """An optimizer of a network of the table, and the network."""
    model = make(net)
    return osc.build(method, model, likelihood="categorical", **options), model


def steps_kept(optimizer: osc.SecondOrder) -> dict[str, Tensor]:
    """Last steps, or ways back, by the parameter's name in the model."""
    saved = optimizer.state_dict()["step_size"]["last_steps"]
    return {f"{layer}.{name}": value for layer, values in saved.items() for name, value in values.items()}


@dataclass(frozen=True)
class Verdicts(osc.Backtrack):
    """Refuses as often as it is told, step by step."""

    refusals: Any = (0,)
    attempts: int = 3
    seen: list[int] = field(default_factory=lambda: [0, 0])

    def accepts(self, state: None, trial: Trial) -> bool:
        step, count = self.seen
        self.seen[1] += 1
        accepted = count >= self.refusals[step]
        if accepted or self.seen[1] == self.attempts:
            self.seen[:] = [step + 1, 0]
        return bool(accepted)
