"""Second-order optimizers for deep networks, composed from small parts.

``build`` applies a registered method or your own ``Method`` to a model; everything else here is a part to compose with.
"""

import importlib as _importlib
from typing import Any as _Any

from .curvature import *  # noqa: F403
from .curvature import __all__ as _curvature
from .errors import (
    ArgumentError,
    ClosureRequiredError,
    CompatibilityError,
    FallbackWarning,
    LossWarning,
    NumericalError,
    OsculateError,
    ProcessError,
    UnknownNameError,
)
from .framework import *  # noqa: F403
from .framework import __all__ as _framework
from .preconditioners import *  # noqa: F403
from .preconditioners import __all__ as _preconditioners
from .stepsize import *  # noqa: F403
from .stepsize import __all__ as _stepsize

__version__ = "0.2.0"

__all__ = [
    *_curvature,
    *_preconditioners,
    *_stepsize,
    *_framework,
    "ArgumentError",
    "ClosureRequiredError",
    "CompatibilityError",
    "FallbackWarning",
    "LossWarning",
    "NumericalError",
    "OsculateError",
    "ProcessError",
    "UnknownNameError",
]

_LAZY = {"contracts": ".framework.contracts", "strategies": ".framework.contracts.strategies", "analysis": ".analysis"}


def __getattr__(name: str) -> _Any:
    """``contracts``, ``strategies`` (which needs hypothesis) and ``analysis`` are imported when first asked for."""
    if name in _LAZY:
        return _importlib.import_module(_LAZY[name], __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
