"""Floor 2: how far to go along a direction, layer by layer, and whether a step stays."""

from .bounded import RelativeBound
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
from .trail_scaled import TrailScaled

__all__ = [
    "Armijo",
    "Backtrack",
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
    "TrailScaled",
    "Trial",
    "Unrestricted",
]
