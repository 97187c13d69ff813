"""Floor 4: is it true. Theorems with their checks and controls; convergence, bounds, approximation quality."""

from .catalogue import THEOREMS, find_theorems
from .instances import Draws, each, eigenvalues
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

__all__ = [
    "THEOREMS",
    "Control",
    "Curve",
    "Draws",
    "Evidence",
    "Inequality",
    "Plot",
    "Setting",
    "Theorem",
    "Verdict",
    "agreement",
    "each",
    "eigenvalues",
    "find_theorems",
    "verify",
    "worst",
]
