"""Floor 3: how parts become an optimizer. Method, registry, optimizer, published methods."""

from . import registry
from .build import build
from .method import Method
from .momentum import EMA, CorrectedEMA, Coupled, Decoupled, HeavyBall, Nesterov, NoMomentum
from .optimizer import SecondOrder
from .report import LayerRow, StepReport

__all__ = [
    "EMA",
    "CorrectedEMA",
    "Coupled",
    "Decoupled",
    "HeavyBall",
    "LayerRow",
    "Method",
    "Nesterov",
    "NoMomentum",
    "SecondOrder",
    "StepReport",
    "build",
    "registry",
]
