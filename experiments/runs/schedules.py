r"""Learning rates that change over a run, as tuned baselines have them: a linear warm-up, then a decline to zero.

With s in [0, 1) the share of the budget that is spent before a step and w the warm-up's share, the rate is multiplied
by :math:`\min(1, (s + d) / w)` up to w, d being the share of one step, and then, with :math:`u = (s - w) / (1 - w)`, by
:math:`(1 + \cos \pi u) / 2` (``cosine``), by 1 - u (``linear``) or by 1 (``constant``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import Budget, RunConfig

__all__ = ["Declining", "schedule_of"]

_SHARE_OF_A_STEP = 0.01
"""Of a run that is bounded by seconds alone, whose number of steps nobody knows."""


@dataclass(frozen=True)
class Declining:
    """A factor on the learning rate.

    Args:
        kind: ``cosine``, ``linear`` or ``constant``.
        warm_up: share of the budget over which the rate rises, in [0, 1).
        budget: what the shares are of.
        batches: mini-batches in an epoch, >= 1.
    """

    kind: str
    warm_up: float
    budget: Budget
    batches: int

    def factor(self, iterations: int, seconds: float) -> float:
        """The factor of the next step.

        Args:
            iterations: steps so far.
            seconds: training time so far, which counts only where epochs are not bounded: a run of so many epochs is
                the same on every machine.
        """
        if self.budget.epochs is not None:
            whole = max(1, self.budget.epochs * self.batches)
            share, step = iterations / whole, 1 / whole
        else:
            share, step = self.budget.spent(0.0, seconds), _SHARE_OF_A_STEP
        share = min(share, 1.0)
        if share < self.warm_up:
            return min(1.0, (share + step) / self.warm_up)
        left = (1 - share) / (1 - self.warm_up)
        return {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[self.kind]


def schedule_of(config: RunConfig, budget: Budget | None, batches: int) -> Declining | None:
    """What multiplies the learning rate of a run; ``None`` where nothing does.

    Args:
        config: what is run.
        budget: of the run; ``None`` where it is only looked at, and the learning rate stands still.
        batches: mini-batches in an epoch.
    """
    if budget is None or (config.lr_schedule is None and not config.lr_warm_up):
        return None
    return Declining(config.lr_schedule or "constant", config.lr_warm_up, budget, batches)
