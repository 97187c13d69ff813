"""Floor 4: is it true. Theorems with checks and controls; monitors; approximation quality; counterfactual steps."""

from .approximation import BlockQuality, Effort, measure_approximation
from .catalogue import THEOREMS, find_theorems
from .compared_structures import StructureQuality, compare_structures
from .eigenvalue_monitor import EigenvalueBounds
from .exact_blocks import Probe
from .instances import Draws, each, eigenvalues
from .microscope import StepQuality, compare_steps
from .monitors import Descent, PairCurvature, RelativeStep, SecantEquation, StepSizeCurvature
from .readings import JsonLines, Memory, TensorBoard, WatchCertificate
from .theorem import (
    Control,
    Curve,
    Evidence,
    Inequality,
    Plot,
    Setting,
    Theorem,
    Verdict,
    agreement,
    verify,
    worst,
)
from .watching import Watch, default_monitors, watch

__all__ = [
    "THEOREMS",
    "BlockQuality",
    "Control",
    "Curve",
    "Descent",
    "Draws",
    "Effort",
    "EigenvalueBounds",
    "Evidence",
    "Inequality",
    "JsonLines",
    "Memory",
    "PairCurvature",
    "Plot",
    "Probe",
    "RelativeStep",
    "SecantEquation",
    "Setting",
    "StepQuality",
    "StepSizeCurvature",
    "StructureQuality",
    "TensorBoard",
    "Theorem",
    "Verdict",
    "Watch",
    "WatchCertificate",
    "agreement",
    "compare_steps",
    "compare_structures",
    "default_monitors",
    "each",
    "eigenvalues",
    "find_theorems",
    "measure_approximation",
    "verify",
    "watch",
    "worst",
]
