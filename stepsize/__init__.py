"""Floor 2: how far to go along a direction, layer by layer, and whether a step stays."""

from .bounded import RelativeBound
from .constant import ConstantStep
from .global_last_step import GlobalWithLastStep
from .global_quadratic import GlobalQuadratic
from .guard import Armijo, Backtrack, Guard, NoGuard, Nonmonotone, Trial
from .joint import JointLayerwise
from .kl_clip import KLClip
from .last_step import JointWithLastStep
from .layerwise import LayerwiseQuadratic, LeadingSlope, MomentumSlope, RowSums, Separate
from .protocol import StepEvidence, StepSize
from .search.levenberg_marquardt import Geodesic, LevenbergMarquardtSearch, Straight
from .search.lines import FullStep, GridSearch, HagerZhang, StrongWolfe
from .search.protocol import Search
from .self_concordant import SelfConcordant
from .signs import Clipped, Safeguarded, Unrestricted

__all__ = [
    "Armijo",
    "Backtrack",
    "Clipped",
    "ConstantStep",
    "FullStep",
    "Geodesic",
    "GlobalQuadratic",
    "GlobalWithLastStep",
    "GridSearch",
    "Guard",
    "HagerZhang",
    "JointLayerwise",
    "JointWithLastStep",
    "KLClip",
    "LayerwiseQuadratic",
    "LeadingSlope",
    "LevenbergMarquardtSearch",
    "MomentumSlope",
    "NoGuard",
    "Nonmonotone",
    "RelativeBound",
    "RowSums",
    "Safeguarded",
    "Search",
    "SelfConcordant",
    "Separate",
    "StepEvidence",
    "StepSize",
    "Straight",
    "StrongWolfe",
    "Trial",
    "Unrestricted",
]
