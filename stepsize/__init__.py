"""Floor 2: how far to go along a direction, layer by layer, and whether a step stays."""

from .bounded import RelativeBound
from .ceiling import Ceiling
from .constant import ConstantStep
from .global_quadratic import GlobalQuadratic
from .guard import Armijo, Backtrack, Guard, NoGuard, Nonmonotone, Trial
from .joint import JointLayerwise
from .kl_clip import KLClip
from .last_step import JointWithLastStep
from .layerwise import LayerwiseQuadratic, LeadingSlope, MomentumSlope, RowSums, Separate
from .protocol import StepEvidence, StepSize
from .self_concordant import SelfConcordant
from .signs import Clipped, Safeguarded, Unrestricted

__all__ = [
    "Armijo",
    "Backtrack",
    "Ceiling",
    "Clipped",
    "ConstantStep",
    "GlobalQuadratic",
    "Guard",
    "JointLayerwise",
    "JointWithLastStep",
    "KLClip",
    "LayerwiseQuadratic",
    "LeadingSlope",
    "MomentumSlope",
    "NoGuard",
    "Nonmonotone",
    "RelativeBound",
    "RowSums",
    "Safeguarded",
    "SelfConcordant",
    "Separate",
    "StepEvidence",
    "StepSize",
    "Trial",
    "Unrestricted",
]
