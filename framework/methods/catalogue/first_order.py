"""First-order methods as diagonal preconditioners: the baselines."""

from __future__ import annotations

from ....preconditioners.averages import MovingAverage, RunningSum, ZeroStartAverage
from ....preconditioners.structures.diagonal import Diagonal
from ..method import Method
from ..momentum import CorrectedEMA, Coupled, Decoupled, HeavyBall, NoMomentum, WeightDecay

__all__ = ["adagrad", "adam", "adamw", "rmsprop", "sgdm"]


def sgdm(*, momentum: float = 0.9) -> Method:
    """SGD with heavy-ball momentum, as ``torch.optim.SGD``.

    Args:
        momentum: decay in [0, 1).
    """
    return Method(momentum=HeavyBall(momentum), defaults={"lr": 0.003})


def _adam(beta1: float, beta2: float, epsilon: float, weight_decay: WeightDecay, tau: float) -> Method:
    """Adam; lr three times torch's, whose 1e-3 ends behind default SGD-momentum on five of twelve shipped problems."""
    diagonal = Diagonal(average=MovingAverage(beta2), epsilon=epsilon)
    return Method(
        diagonal,
        momentum=CorrectedEMA(beta1),
        weight_decay=weight_decay,
        fallback=diagonal,
        defaults={"lr": 3e-3, "weight_decay": tau},
    )


def adam(*, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> Method:
    """Adam (arXiv:1412.6980v9, Algorithm 1); weight decay coupled, as ``torch.optim.Adam``.

    The default lr is 3e-3, three times that of torch: ahead of default SGD-momentum on more of the shipped problems.

    Args:
        beta1: decay in [0, 1) of the momentum.
        beta2: decay in [0, 1) of the squared gradients.
        epsilon: >= 0, added to the root.
    """
    return _adam(beta1, beta2, epsilon, Coupled(), 0.0)


def adamw(*, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> Method:
    """AdamW (arXiv:1711.05101v3, Algorithm 2); decoupled decay, default 1e-2 as ``torch.optim.AdamW``.

    The default lr is 3e-3, three times that of torch, as for :func:`adam`.

    Args:
        beta1: decay in [0, 1) of the momentum.
        beta2: decay in [0, 1) of the squared gradients.
        epsilon: >= 0, added to the root.
    """
    return _adam(beta1, beta2, epsilon, Decoupled(), 1e-2)


def adagrad(*, epsilon: float = 1e-10) -> Method:
    """AdaGrad with a diagonal (JMLR 12:2121-2159), as ``torch.optim.Adagrad``.

    The default lr is 3e-2, three times that of torch, as for :func:`adam`.

    Args:
        epsilon: >= 0, added to the root of the sum of squared gradients.
    """
    diagonal = Diagonal(average=RunningSum(), epsilon=epsilon)
    return Method(diagonal, momentum=NoMomentum(), fallback=diagonal, defaults={"lr": 3e-2})


def rmsprop(*, decay: float = 0.99, epsilon: float = 1e-8) -> Method:
    """RMSprop (Hinton's lecture 6e), as ``torch.optim.RMSprop``; no bias correction.

    The default lr is 3e-3. torch has 1e-2 here, whose first steps are 0.1, because nothing corrects the first averages.

    Args:
        decay: of the squared gradients, in [0, 1).
        epsilon: >= 0, added to the root.
    """
    diagonal = Diagonal(average=ZeroStartAverage(decay), epsilon=epsilon)
    return Method(diagonal, momentum=NoMomentum(), fallback=diagonal, defaults={"lr": 3e-3})
