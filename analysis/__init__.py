"""Floor 4: is it true. Theorems with checks and controls; monitors; approximation quality; counterfactual steps."""

from .catalogue import THEOREMS, find_theorems
from .eigenvalue_monitor import EigenvalueBounds
from .instances import Draws, each, eigenvalues
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
    "Control",
    "Curve",
    "Descent",
    "Draws",
    "EigenvalueBounds",
    "Evidence",
    "Inequality",
    "JsonLines",
    "Memory",
    "PairCurvature",
    "Plot",
    "RelativeStep",
    "SecantEquation",
    "Setting",
    "StepSizeCurvature",
    "TensorBoard",
    "Theorem",
    "Verdict",
    "Watch",
    "WatchCertificate",
    "agreement",
    "default_monitors",
    "each",
    "eigenvalues",
    "find_theorems",
    "verify",
    "watch",
    "worst",
]
