"""What parts may declare about themselves, with the value that stands where a part says nothing.

Each kind of part has one base class here, and every part of this library inherits that of its kind: each declaration is
a typed attribute with a default, which the part overrides by a class attribute, a field or a method, or by a function
under :func:`derived` where it follows from the part's own parts. Parts are frozen, so an answer never changes.

A part that only has the verbs of its kind stays a part: :func:`declared` takes it in, once, where it enters; who asks
more than once keeps the answer (a method, a block, a Kronecker structure of its factors).

A part around another part names the field that holds it, ``class Bound(StepSizeDeclarations, forwards="rule")``, and
then declares what the inner part declares, except for what its own class states. A declaration that is added to a base
class is so forwarded by every wrapper from the start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor

from .layers.layer import Layer
from .records.needs import Needs
from .records.statistics import Tensors

__all__ = [
    "AverageDeclarations",
    "CouplingDeclarations",
    "DampingDeclarations",
    "Declarations",
    "EstimatorDeclarations",
    "FactorDeclarations",
    "FormDeclarations",
    "Measure",
    "MomentumDeclarations",
    "PairDampingDeclarations",
    "SignDeclarations",
    "StepSizeDeclarations",
    "StructureDeclarations",
    "declared",
    "derived",
]

Value = TypeVar("Value")

Measure = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]
"""A statistic of one call of a layer, ``measure(layer, inputs, outputs, gradients)``, added up over all calls.

Inputs as the layer's adapter records them, pre-activations (N, S, d_out) and the gradients of the user's loss there, N
samples and S positions, all without a graph; ``inputs`` are those of an attention's projection where it is one.
"""


def derived(read: Callable[[Any], Value]) -> Value:
    """A declaration that is worked out from the part itself: once, then it is kept. To type checkers an attribute."""
    return cast(Value, cached_property(read))


class Declarations:
    """Base of every kind.

    Attributes:
        together: which of the optional verbs for many blocks hold for this part: those that it has, unless a subclass
            replaced the verb for one block and inherits the one for many, which then says nothing of it.
    """

    together: ClassVar[frozenset[str]] = frozenset()
    _kind: ClassVar[type[Declarations]]
    _names: ClassVar[tuple[str, ...]]
    _many: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Optional verbs for many blocks, each with the verb for one."""

    def __init_subclass__(cls, *, forwards: str | None = None, **arguments: Any) -> None:
        """Collect what a kind declares, or forward it to the part in the field ``forwards``."""
        super().__init_subclass__(**arguments)
        if Declarations in cls.__bases__:
            stated = {name: value for name, value in vars(cls).items() if name[0] != "_"}
            cls._kind = cls
            cls._names = tuple(name for name, value in stated.items() if not inspect.isfunction(value))
            for name in cls._names:
                if not isinstance(stated[name], cached_property):
                    setattr(cls, name, _Default(name, stated[name]))
            return
        cls.together = _together(cls, cls._many)
        if forwards is not None:
            for name in cls._names:
                if name not in vars(cls) and name not in inspect.get_annotations(cls):
                    _forward(cls, forwards, name)


class _Default:
    """A declaration where a part says nothing.

    The class itself does not show it: a dataclass would take it for the default of a field of the same name.
    """

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def __get__(self, part: Any, owner: type) -> Any:
        if part is None:
            raise AttributeError(self.name)
        return self.value


def _together(cls: type, many: Iterable[tuple[str, str]]) -> frozenset[str]:
    """Verbs for many blocks that were written with the class's own verb for one, or after it."""

    def holds(verb: str, single: str) -> bool:
        owner = next((entry for entry in cls.__mro__ if verb in vars(entry) or single in vars(entry)), None)
        return owner is not None and verb in vars(owner)

    return frozenset(verb for verb, single in many if holds(verb, single))


def _forward(cls: type[Declarations], field: str, name: str) -> None:
    """Let a wrapper declare what the part in ``field`` declares."""

    def read(part: Any) -> Any:
        return getattr(declared(getattr(part, field), cls._kind), name)

    read.__doc__ = f"As the part in ``{field}``."
    found = cached_property(read)
    found.__set_name__(cls, name)
    setattr(cls, name, found)


Kind = TypeVar("Kind", bound=Declarations)


def declared(part: Any, kind: type[Kind]) -> Kind:
    """What ``part``, a part of the kind ``kind``, declares: itself if it inherits, else the part as taken in."""
    return part if isinstance(part, kind) else _taken_in(part, kind)


def _taken_in(part: Any, kind: type[Kind]) -> Kind:
    """A part that does not inherit, as one that does: what it has of its kind, before the defaults."""
    found, known = kind(), vars(kind)
    together = _together(type(part), kind._many)
    verbs = (*(single for _, single in kind._many), *together)
    for name in (*kind._names, *verbs):
        if hasattr(part, name):
            vars(found)[name] = getattr(part, name)
        elif isinstance(default := known.get(name), cached_property):
            # It follows from the verbs, so it is asked of the part itself.
            vars(found)[name] = default.func(part)
    vars(found)["together"] = together
    return found


class StructureDeclarations(Declarations):
    """Of a structure (``Preconditioner``)."""

    linear: bool = True
    """Whether the direction is a matrix times the momentum, and ``to_dense`` the inverse of that matrix."""

    takes_indefinite: bool = False
    """Whether it can take curvature with negative eigenvalues."""

    definite: bool = True
    """Whether ``to_dense`` has no negative eigenvalue."""

    additive: bool = True
    """Whether its matrices are means over samples."""

    dtypes: tuple[Any, ...] = ()
    """Precisions beyond float32 and float64."""

    waits: bool = False
    """Whether nobody reads what ``update`` writes before the step is looked back at, unless inverses are renewed: it is
    then called after the second evaluation, and a look back that fails has nothing to undo in its state."""

    scaling: Any = None
    """Its ``ScalingLaw``; ``None``: it states none."""

    numbers: Callable[..., int | None] | None = None
    """``numbers(layer)``: how many numbers its state holds; ``None``: not stated."""

    declines: Callable[..., str] | None = None
    """``declines(layer)``: why a limit of size keeps a layer out, with the bytes that it would take; else empty."""

    bounds: Callable[..., Any] | None = None
    """``bounds(state, layer, damping)``: lowest and highest eigenvalue of ``to_dense``; ``None``: not stated."""

    reference: Callable[[], Any] | None = None
    """``reference()``: a structure with the same directions, computed plainly; ``None``: made from ``to_dense``."""

    mean_eigenvalue: Callable[[Any], Tensor] | None = None
    """``mean_eigenvalue(state)`` of the undamped matrix over the layer that is inverted, 0-dimensional; ``None``: it
    has none, or several."""

    partition: Any = None
    """The rule by which it cuts its layers into blocks, where it does."""

    pairs: Any = None
    """The rule that damps its secant pairs, where it has one."""

    measures: Mapping[str, Measure] = MappingProxyType({})
    """Statistics of its own, by the name under which ``update`` finds them in ``statistics.measured``."""

    takes_moments: Mapping[str, Any] = MappingProxyType({})
    """By side (``"inputs"``, ``"outputs"``) the sharing rule of the second moment that is all it takes of the layer's
    rows on that side, beside the mean input row: several processes may then add up moments and leave the rows where
    they are. A side that is missing takes the rows themselves, if any."""

    work: Callable[..., float] | None = None
    """``work(layer)``: floating-point operations of ``precondition``; ``None``: two products with dense matrices where
    it computes some, else one operation per parameter. To divide the work over processes."""

    _many = (("update_many", "update"), ("precondition_many", "precondition"), ("takes_moments", "update"))
    update: Callable[..., None]
    update_many: Callable[..., None]
    precondition: Callable[..., Tensors]
    precondition_many: Callable[..., list[Tensors]]

    @derived
    def refines(self) -> bool:
        """Whether it has the verb of ``Refining``."""
        return hasattr(self, "refine")

    def update_blocks(self, states: Sequence[Any], observations: Sequence[Any]) -> None:
        """``update`` of several blocks: at once by ``update_many(states, observations)``, if it has that verb."""
        if "update_many" in self.together:
            self.update_many(states, observations)
            return
        for state, observation in zip(states, observations, strict=True):
            self.update(state, observation)

    def precondition_blocks(self, states: Sequence[Any], momenta: Sequence[Tensors]) -> list[Tensors]:
        """``precondition`` of several blocks: at once by ``precondition_many(states, momenta)``, if it has it."""
        if "precondition_many" in self.together:
            return self.precondition_many(states, momenta)
        return [self.precondition(state, momentum) for state, momentum in zip(states, momenta, strict=True)]


class FactorDeclarations(Declarations):
    """Of a factor of a Kronecker structure.

    A factor with the verbs ``kind(state, before)`` and ``observe_many(states, befores, afters, side, damping)`` looks
    back at all blocks whose states are of one kind at once; else each is asked by ``observe_step``.
    """

    linear: bool = True
    """As for structures."""

    definite: bool = True
    """As for structures."""

    additive: bool = True
    """As for structures."""

    dtypes: tuple[Any, ...] = ()
    """As for structures."""

    waits: bool = False
    """As for structures."""

    scaling: Callable[..., Any] | None = None
    """``scaling(side)``: powers of c by which the inverse of H and its damping grow when every gradient grows by c."""

    numbers: Callable[[int], int] | None = None
    """``numbers(size)``: how many numbers its state holds; ``None``: not stated."""

    mean_eigenvalue: Callable[[Any], Tensor] | None = None
    """``mean_eigenvalue(state)`` of the undamped matrix that is inverted, 0-dimensional; ``None``: it has none."""

    pairs: Any = None
    """The rule that damps its secant pairs, where it has one."""

    takes_moment: Callable[..., Any] | None = None
    """``takes_moment(side)``: the sharing rule of the second moment that is all it takes of the rows on this side."""

    kind: Callable[..., tuple[Any, ...]] | None = None
    """``kind(state, before)``: what states must share to be looked back at together."""

    _many = (("observe_many", "observe_step"), ("takes_moment", "update"))


class PairDampingDeclarations(Declarations):
    """Of a rule that damps secant pairs."""

    keeps_positive: bool = False
    """Whether s'y > 0 afterwards for every pair with s or y not zero."""

    curvature_floor: Callable[[float], float] | None = None
    """``curvature_floor(damping)``: c with s'y >= c s's; ``None``: no promise."""

    bounds: Callable[..., Any] | None = None
    """``bounds(damping, low, high)``: its ``PairBounds`` for H with these extreme eigenvalues; ``None``: no promise."""


class AverageDeclarations(Declarations):
    """Of an average over steps."""

    normalised: bool = True
    """Whether the coefficients sum to one."""

    unbiased: bool = True
    """Whether the average of a constant is that constant from the first value on."""


class MomentumDeclarations(Declarations):
    """Of a momentum."""

    unbiased: bool = False
    """Whether the vector of a constant gradient is that gradient at every step."""


class DampingDeclarations(Declarations):
    """Of a damping rule."""

    uses_eigenvalues: bool = False
    """Whether it wants the mean eigenvalues of Kronecker factors."""

    uses_whole: bool = False
    """Whether it wants the mean eigenvalue of a structure's single matrix too."""

    splits: bool = False
    """Whether the dampings of the two sides multiply to that of the whole."""

    @derived
    def adapts(self) -> bool:
        """Whether it also changes lambda, as ``AdaptiveDamping``."""
        verbs = ("minimum", "maximum", "sides", "curvature", "needs", "due", "adapted")
        return all(hasattr(self, verb) for verb in verbs)

    @derived
    def scheduled(self) -> bool:
        """Whether lambda follows the number of the step, as ``ScheduledDamping``."""
        return hasattr(self, "at") and hasattr(self, "sides")


class EstimatorDeclarations(Declarations):
    """Of a curvature estimator."""

    per_sample: bool = True
    """Whether a summed loss gives the same matrix as its mean; if not, it is in the units of the user's loss (N times
    the gradient for a summed one)."""

    estimates: str | None = None
    """``"fisher"`` if its mean is the Fisher information."""

    exact: bool = False
    """Whether it needs a likelihood but draws no labels."""

    asks: Needs = Needs.NOTHING
    """What it asks of the backend beside its records."""


class FormDeclarations(Declarations):
    """Of a quadratic form."""

    definite: bool = False
    """Whether M never has a negative eigenvalue."""

    estimates: str | None = None
    """``"fisher"`` or ``"hessian"`` if the mean of its diagonal is that of this matrix."""

    couples: bool = True
    """Whether it measures curvature between layers."""

    random: bool = False
    """Whether it draws directions or labels of its own."""

    adds_up: bool = False
    """Whether it takes the statistics of a share of the mini-batch, and puts the shares together by ``evidence.share``
    and ``evidence.total``; if not, every process is given the rows of all."""


class StepSizeDeclarations(Declarations):
    """Of a step-size rule."""

    signed: bool = False
    """Whether steps may go against their direction."""

    length_free: bool = False
    """Whether directions c times as long get steps 1/c times as long."""

    proportional: bool = False
    """Whether the step is lr and depends on nothing else."""

    recalls: bool = False
    """Whether steps go along the layers' last steps too."""

    keeps: Callable[[int], float] | None = None
    """``keeps(step)``, in [0, 1), of a rule that recalls: remembered of a layer is then not its last step but the sum
    of its steps alpha d so far, which keeps this share of itself after every step: the way back from the weights to an
    average of theirs. ``None``: its last step."""

    uses_loss: bool = False
    """Whether it takes the loss of the mini-batch into account, where that is known."""


class SignDeclarations(Declarations):
    """Of a sign rule."""

    signed: bool = False
    """Whether some steps may be < 0."""

    descends: bool = False
    """Whether the model falls at least as far as with the steps r_l / (L M_ll), for M semi-definite and r >= 0."""


class CouplingDeclarations(Declarations):
    """Of a coupling between layers."""

    majorises: bool = False
    """Whether along the common step its curvature is no less than that of all layers together."""
