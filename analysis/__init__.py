"""Floor 4: is it true. Theorems with checks and controls; monitors; approximation quality; counterfactual steps."""

from .monitors.eigenvalue_monitor import EigenvalueBounds
from .monitors.monitors import Descent, PairCurvature, RelativeStep, SecantEquation, StepSizeCurvature
from .monitors.readings import JsonLines, Memory, TensorBoard, WatchCertificate
from .monitors.watching import Watch, default_monitors, watch
from .quality.approximation import BlockQuality, Effort, measure_approximation
from .quality.compared_structures import StructureQuality, compare_structures
from .quality.exact_blocks import Probe
from .quality.microscope import StepQuality, compare_steps
from .theorem import Control, Curve, Evidence, Inequality, Plot, Setting, Theorem, Verdict, agreement, verify, worst
from .theorems.catalogue import THEOREMS, find_theorems
from .theorems.instances import Draws, each, eigenvalues

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
