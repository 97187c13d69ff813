"""What parts may declare about themselves, with the value that stands where a part says nothing.

Each kind of part has one base class here. A part that inherits from it has every declaration of its kind as a typed
attribute, and overrides what it wants to promise, as a class attribute or as a property. A part that only has the verbs
of its kind stays a part: whoever reads a declaration reads it through :func:`declared`, which falls back on the base
class. So a default is written once, and nobody who reads it has to know it.

A part around another part names the field that holds it, ``class Bound(StepSizeDeclarations, forwards="rule")``, and
then declares what the inner part declares, except for what its own class states. A declaration that is added to a base
class is so forwarded by every wrapper from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

from .records.needs import Needs

__all__ = [
    "AverageDeclarations",
    "CouplingDeclarations",
    "DampingDeclarations",
    "Declarations",
    "EstimatorDeclarations",
    "FactorDeclarations",
    "FormDeclarations",
    "MomentumDeclarations",
    "PairDampingDeclarations",
    "SignDeclarations",
    "StepSizeDeclarations",
    "StructureDeclarations",
    "declared",
]

_UNSAID = object()


class Declarations:
    """Base of the bases: makes wrappers forward."""

    _names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, kind: bool = False, forwards: str | None = None, **arguments: Any) -> None:
        """Collect what a kind declares, or forward it to the part in the field ``forwards``."""
        super().__init_subclass__(**arguments)
        if kind:
            own = (name for name, value in vars(cls).items() if isinstance(value, property))
            cls._names = (*cls._names, *own)
            cls._kind = cls
        if forwards is not None:
            for name in cls._names:
                if name not in vars(cls):
                    setattr(cls, name, _forwarded(cls._kind, forwards, name))

    _kind: ClassVar[type[Declarations]]


def _forwarded(kind: type[Declarations], field: str, name: str) -> property:
    def read(self: Any) -> Any:
        return getattr(declared(getattr(self, field), kind), name)

    read.__doc__ = f"As the part in ``{field}``."
    return property(read)


class _Resolved:
    """The declarations of a part that does not inherit them: its own attributes before the defaults of its kind."""

    def __init__(self, part: Any, kind: type[Declarations]) -> None:
        self._part, self._base = part, kind

    def __getattr__(self, name: str) -> Any:
        said = getattr(self._part, name, _UNSAID)
        if said is not _UNSAID:
            return said
        default = getattr(self._base, name)
        # A default may follow from the verbs, so it is asked of the part itself.
        return default.__get__(self._part) if isinstance(default, property) else default


Kind = TypeVar("Kind", bound=Declarations)


def declared(part: Any, kind: type[Kind]) -> Kind:
    """What ``part``, a part of the kind ``kind``, declares: itself if it inherits, else its attributes and defaults."""
    return part if isinstance(part, kind) else cast(Kind, _Resolved(part, kind))


class StructureDeclarations(Declarations, kind=True):
    """Of a structure (``Preconditioner``)."""

    @property
    def linear(self) -> bool:
        """Whether the direction is a matrix times the momentum, and ``to_dense`` the inverse of that matrix."""
        return True

    @property
    def takes_indefinite(self) -> bool:
        """Whether it can take curvature with negative eigenvalues."""
        return False

    @property
    def definite(self) -> bool:
        """Whether ``to_dense`` has no negative eigenvalue."""
        return True

    @property
    def additive(self) -> bool:
        """Whether its matrices are means over samples."""
        return True

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """Precisions beyond float32 and float64."""
        return ()

    @property
    def scaling(self) -> Any:
        """Its ``ScalingLaw``; ``None``: it states none."""
        return None

    @property
    def numbers(self) -> Callable[..., int | None] | None:
        """``numbers(layer)``: how many numbers its state holds; ``None``: not stated."""
        return None

    @property
    def bounds(self) -> Callable[..., Any] | None:
        """``bounds(state, layer, damping)``: lowest and highest eigenvalue of ``to_dense``; ``None``: not stated."""
        return None

    @property
    def reference(self) -> Callable[[], Any] | None:
        """``reference()``: a structure with the same directions, computed plainly; ``None``: made from ``to_dense``."""
        return None

    @property
    def refines(self) -> bool:
        """Whether it has the verb of ``Refining``."""
        return hasattr(self, "refine")

    @property
    def partition(self) -> Any:
        """How it cuts its layers into blocks, where it does."""
        return None

    @property
    def pairs(self) -> Any:
        """The rule that damps its secant pairs, where it has one."""
        return None


class FactorDeclarations(Declarations, kind=True):
    """Of a factor of a Kronecker structure."""

    @property
    def linear(self) -> bool:
        """As for structures."""
        return True

    @property
    def definite(self) -> bool:
        """As for structures."""
        return True

    @property
    def additive(self) -> bool:
        """As for structures."""
        return True

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """As for structures."""
        return ()

    @property
    def scaling(self) -> Callable[..., Any] | None:
        """``scaling(side)``: powers of c by which its inverse and its damping grow; ``None``: not stated."""
        return None

    @property
    def numbers(self) -> Callable[[int], int] | None:
        """``numbers(size)``: how many numbers its state holds; ``None``: not stated."""
        return None

    @property
    def pairs(self) -> Any:
        """The rule that damps its secant pairs, where it has one."""
        return None


class PairDampingDeclarations(Declarations, kind=True):
    """Of a rule that damps secant pairs."""

    @property
    def keeps_positive(self) -> bool:
        """Whether s'y > 0 afterwards for every pair with s or y not zero."""
        return False

    @property
    def curvature_floor(self) -> Callable[[float], float] | None:
        """``curvature_floor(damping)``: c with s'y >= c s's; ``None``: no promise."""
        return None

    @property
    def bounds(self) -> Callable[..., Any] | None:
        """``bounds(damping, low, high)``: its ``PairBounds`` for H with these eigenvalues; ``None``: no promise."""
        return None


class AverageDeclarations(Declarations, kind=True):
    """Of an average over steps."""

    @property
    def normalised(self) -> bool:
        """Whether the coefficients sum to one."""
        return True

    @property
    def unbiased(self) -> bool:
        """Whether the average of a constant is that constant from the first value on."""
        return True


class MomentumDeclarations(Declarations, kind=True):
    """Of a momentum."""

    @property
    def unbiased(self) -> bool:
        """Whether the vector of a constant gradient is that gradient at every step."""
        return False


class DampingDeclarations(Declarations, kind=True):
    """Of a damping rule."""

    @property
    def uses_eigenvalues(self) -> bool:
        """Whether it wants the mean eigenvalues of Kronecker factors."""
        return False

    @property
    def splits(self) -> bool:
        """Whether the dampings of the two sides multiply to that of the whole."""
        return False

    @property
    def adapts(self) -> bool:
        """Whether it also changes lambda, as ``AdaptiveDamping``."""
        verbs = ("minimum", "maximum", "sides", "curvature", "needs", "due", "adapted")
        return all(hasattr(self, verb) for verb in verbs)

    @property
    def scheduled(self) -> bool:
        """Whether lambda follows the number of the step, as ``ScheduledDamping``."""
        return hasattr(self, "at") and hasattr(self, "sides")


class EstimatorDeclarations(Declarations, kind=True):
    """Of a curvature estimator."""

    @property
    def per_sample(self) -> bool:
        """Whether a summed loss gives the same matrix as its mean; if not, it is in the units of the user's loss."""
        return True

    @property
    def estimates(self) -> str | None:
        """``"fisher"`` if its mean is the Fisher information."""
        return None

    @property
    def exact(self) -> bool:
        """Whether it needs a likelihood but draws no labels."""
        return False

    @property
    def asks(self) -> Needs:
        """What it asks of the backend beside its records."""
        return Needs.NOTHING


class FormDeclarations(Declarations, kind=True):
    """Of a quadratic form."""

    @property
    def definite(self) -> bool:
        """Whether M never has a negative eigenvalue."""
        return False

    @property
    def estimates(self) -> str | None:
        """``"fisher"`` or ``"hessian"`` if the mean of its diagonal is that of this matrix."""
        return None

    @property
    def couples(self) -> bool:
        """Whether it measures curvature between layers."""
        return True

    @property
    def random(self) -> bool:
        """Whether it draws directions or labels of its own."""
        return False


class StepSizeDeclarations(Declarations, kind=True):
    """Of a step-size rule."""

    @property
    def signed(self) -> bool:
        """Whether steps may go against their direction."""
        return False

    @property
    def length_free(self) -> bool:
        """Whether directions c times as long get steps 1/c times as long."""
        return False

    @property
    def proportional(self) -> bool:
        """Whether the step is lr and depends on nothing else."""
        return False

    @property
    def recalls(self) -> bool:
        """Whether steps go along the layers' last steps too."""
        return False


class SignDeclarations(Declarations, kind=True):
    """Of a sign rule."""

    @property
    def signed(self) -> bool:
        """Whether some steps may be < 0."""
        return False

    @property
    def descends(self) -> bool:
        """Whether the model falls at least as far as with the steps r_l / (L M_ll), for M semi-definite and r >= 0."""
        return False


class CouplingDeclarations(Declarations, kind=True):
    """Of a coupling between layers."""

    @property
    def majorises(self) -> bool:
        """Whether along the common step its curvature is no less than that of all layers together."""
        return False
