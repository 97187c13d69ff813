"""Floor 2: how far to go along a direction, layer by layer, and whether a step stays."""

from .bounded import RelativeBound
from .constant import ConstantStep
from .guard import Backtrack, Guard, NoGuard
from .joint import JointLayerwise
from .layerwise import LayerwiseQuadratic, LeadingSlope, MomentumSlope, RowSums, Separate
from .protocol import StepEvidence, StepSize

__all__ = [
    "Backtrack",
    "ConstantStep",
    "Guard",
    "JointLayerwise",
    "LayerwiseQuadratic",
    "LeadingSlope",
    "MomentumSlope",
    "NoGuard",
    "RelativeBound",
    "RowSums",
    "Separate",
    "StepEvidence",
    "StepSize",
]
