"""Floor 3: how parts become an optimizer. Method, registry, optimizer, published methods."""

from .methods import registry
from .methods.method import Method
from .methods.momentum import EMA, CorrectedEMA, Coupled, Decoupled, HeavyBall, Nesterov, NoMomentum
from .optimizer.build import build
from .optimizer.layer_table import LayerTable
from .optimizer.report import LayerRow, StepReport
from .optimizer.second_order import SecondOrder
from .whole_model.method import WholeMethod
from .whole_model.optimizer import WholeModel

__all__ = [
    "EMA",
    "CorrectedEMA",
    "Coupled",
    "Decoupled",
    "HeavyBall",
    "LayerRow",
    "LayerTable",
    "Method",
    "Nesterov",
    "NoMomentum",
    "SecondOrder",
    "StepReport",
    "WholeMethod",
    "WholeModel",
    "build",
    "registry",
]
