"""Hypothesis strategies for your own properties: networks with data, matrices, secant pairs, parts, whole methods.

Needs hypothesis, which osculate itself does not. Everything drawn is float64 unless asked, small, and reproducible:
what is drawn is a seed and sizes, from which the tensors follow.

Example:
    >>> import osculate as osc, torch
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5)
    ... @given(method=osc.strategies.methods(), case=osc.strategies.networks())
    ... def loss_stays_finite(method, case):
    ...     training = osc.contracts.Training(method, case)
    ...     assert torch.isfinite(training.step(case.batch()))
    >>> loss_stays_finite()
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...curvature.records.statistics import LayerStatistics
from ...errors import ArgumentError, UnknownNameError
from ...preconditioners.structures.by_layer import ByLayer
from ...preconditioners.structures.identity import Identity
from ..methods import registry
from ..methods.method import Method
from . import Case, MeanOverPositions, Workbench
from .pairs import SecantPair

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:  # pragma: no cover - the tests have it
    raise ModuleNotFoundError(
        "osculate.strategies needs hypothesis: python -m pip install hypothesis; osculate.contracts works without"
    ) from error

__all__ = ["layer_statistics", "methods", "networks", "parts", "secant_pairs", "spd_matrices"]

LAYERS = ("linear", "convolution", "sequence", "bias-free")
LIKELIHOODS = ("gaussian", "bernoulli", "categorical")
_SEEDS = st.integers(0, 2**16)


@dataclass(frozen=True)
class _Maker:
    """Builds a network; equal makers build equal networks."""

    layers: str
    inputs: int
    hidden: int
    outputs: int
    activation: type[nn.Module]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        shapes = {"convolution": (self.inputs, 3, 3), "sequence": (3, self.inputs)}
        return shapes.get(self.layers, (self.inputs,))

    def __call__(self) -> nn.Module:
        """A network with fresh parameters."""
        act = self.activation
        if self.layers == "convolution":
            filters = nn.Conv2d(self.inputs, self.hidden, 2)
            return nn.Sequential(filters, act(), nn.Flatten(), nn.Linear(4 * self.hidden, self.outputs))
        middle = [MeanOverPositions()] if self.layers == "sequence" else []
        bias = self.layers != "bias-free"
        first, last = nn.Linear(self.inputs, self.hidden, bias), nn.Linear(self.hidden, self.outputs, bias)
        return nn.Sequential(first, act(), *middle, last)


@st.composite
def networks(
    draw: Callable[..., Any],
    layers: Sequence[str] = LAYERS,
    likelihoods: Sequence[str] = LIKELIHOODS,
    max_samples: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Small networks with data: two layers, one activation, a loss, mini-batches of 1 to ``max_samples`` samples.

    Args:
        draw: supplied by Hypothesis.
        layers: of ``"linear"``, ``"convolution"``, ``"sequence"`` (shared positions), ``"bias-free"``.
        likelihoods: of ``"gaussian"``, ``"bernoulli"``, ``"categorical"``.
        max_samples: >= 1.
        dtype: of parameters and inputs.

    Returns:
        Strategy of :class:`osculate.contracts.Case`; ``case.model()``, ``case.batch()`` and ``case.loss(...)``.

    Raises:
        UnknownNameError: for an unknown kind of layer or likelihood.

    Example:
        >>> import osculate as osc
        >>> from hypothesis import given
        >>> @given(case=osc.strategies.networks(layers=["convolution"], max_samples=4))
        ... def outputs_have_a_row_per_sample(case):
        ...     inputs, targets = case.batch()
        ...     assert len(case.model()(inputs)) == len(targets) == case.samples <= 4
        >>> outputs_have_a_row_per_sample()
    """
    for kind, given, known in (("layers", layers, LAYERS), ("likelihood", likelihoods, LIKELIHOODS)):
        for name in given:
            if name not in known:
                raise UnknownNameError(kind, name, known)
    maker = _Maker(
        draw(st.sampled_from(list(layers))),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(2, 3)),
        draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.Sigmoid])),
    )
    samples, seed = draw(st.integers(1, max_samples)), draw(_SEEDS)
    likelihood = draw(st.sampled_from(list(likelihoods)))
    return Case(maker.layers, maker, maker.shape, likelihood, samples, dtype, seed=seed)


@st.composite
def spd_matrices(
    draw: Callable[..., Any],
    size: int | st.SearchStrategy[int] = st.integers(1, 6),  # noqa: B008 - a strategy is a constant
    condition: float | st.SearchStrategy[float] = st.floats(1.0, 1e6),  # noqa: B008
) -> Tensor:
    """Symmetric positive definite float64 matrices with a given condition number.

    Args:
        draw: supplied by Hypothesis.
        size: d >= 1, or a strategy of it.
        condition: largest over smallest eigenvalue, >= 1, or a strategy of it; eigenvalues run geometrically from
            1 / sqrt(condition) to sqrt(condition). A matrix of order 1 is the number 1 / sqrt(condition).

    Example:
        >>> import osculate as osc, torch
        >>> from hypothesis import given
        >>> @given(matrix=osc.strategies.spd_matrices(size=4, condition=100.0))
        ... def conditioned(matrix):
        ...     values = torch.linalg.eigvalsh(matrix)
        ...     assert abs(values[-1] / values[0] - 100.0) < 1e-6
        >>> conditioned()
    """
    order = size if isinstance(size, int) else draw(size)
    number = condition if isinstance(condition, float | int) else draw(condition)
    if order < 1 or not number >= 1.0:
        raise ArgumentError(f"an SPD matrix needs size >= 1 and condition >= 1, got {order} and {number}")
    return _example(draw(_SEEDS)).spd(order, float(number))


@st.composite
def secant_pairs(
    draw: Callable[..., Any],
    size: int | st.SearchStrategy[int] = st.integers(1, 6),  # noqa: B008
    curvature: Literal["any", "positive", "negative"] = "any",
    damping: float | st.SearchStrategy[float] = st.floats(1e-3, 0.99),  # noqa: B008
) -> SecantPair:
    """Secant pairs (s, y) with the inverse approximation H they would update, of positive and negative curvature.

    Args:
        draw: supplied by Hypothesis.
        size: d >= 1, or a strategy of it.
        curvature: sign of s'y; ``"any"`` draws both, with s'y between 1e-3 and 1 times |s| |y|.
        damping: mu2 > 0, or a strategy of it.

    Example:
        >>> import osculate as osc, torch
        >>> from hypothesis import given
        >>> @given(pair=osc.strategies.secant_pairs(curvature="negative"))
        ... def damping_mends_it(pair):
        ...     assert torch.dot(pair.step, pair.change) < 0
        ...     damped = pair.damped(osc.DoubleDamping())
        ...     assert torch.dot(damped.step, damped.change) > 0
        >>> damping_mends_it()
    """
    order = size if isinstance(size, int) else draw(size)
    example = _example(draw(_SEEDS))
    sign = {"positive": 1.0, "negative": -1.0}.get(curvature) or draw(st.sampled_from([1.0, -1.0]))
    step, noise = example.randn(order, key=1), example.randn(order, key=2)
    unit = step / step.norm()
    across = noise - (noise @ unit) * unit
    cosine = sign * (draw(st.floats(1e-3, 1.0)) if order > 1 else 1.0)
    change = cosine * unit
    if order > 1:
        change = change + (1.0 - cosine**2) ** 0.5 * across / across.norm()
    lengths = [10.0 ** draw(st.floats(-3.0, 3.0)) for _ in range(2)]
    inverse = draw(spd_matrices(size=order, condition=st.floats(1.0, 1e3)))
    mu2 = damping if isinstance(damping, float | int) else draw(damping)
    return SecantPair(lengths[0] * unit, lengths[1] * change, inverse, float(mu2))


@st.composite
def layer_statistics(draw: Callable[..., Any], case: st.SearchStrategy[Case] | None = None) -> LayerStatistics:
    """Statistics of one layer of a small network, as the hooks record them, with roots and vectors per sample.

    Args:
        draw: supplied by Hypothesis.
        case: networks to measure; default: all of :func:`networks`.

    Example:
        >>> import osculate as osc
        >>> from hypothesis import given
        >>> @given(statistics=osc.strategies.layer_statistics())
        ... def inputs_have_a_row_per_sample_and_position(statistics):
        ...     assert len(statistics.input_rows()) == statistics.samples * statistics.positions
        >>> inputs_have_a_row_per_sample_and_position()
    """
    bench = Workbench(Identity(), draw(networks() if case is None else case))
    measured = bench.measure()
    return measured[draw(st.sampled_from(sorted(measured)))]


def parts(kind: str) -> st.SearchStrategy[Any]:
    """Registered parts of one kind, with the hyper-parameters of their examples.

    Args:
        kind: as in :func:`osculate.registry.parts`, e.g. ``"structure"``, ``"pair damping"``, ``"step size"``.

    Raises:
        UnknownNameError: for an unknown kind.

    Example:
        >>> import osculate as osc
        >>> from hypothesis import given
        >>> @given(average=osc.strategies.parts("average"))
        ... def news_counts(average):
        ...     assert average.coefficients(0.0)[1] > 0
        >>> news_counts()
    """
    table = registry.examples()
    if kind not in table:
        raise UnknownNameError("kind of part", kind, table)
    return st.sampled_from(list(table[kind].values()))


@st.composite
def methods(
    draw: Callable[..., Any], needs_likelihood: bool | None = None, needs_closure: bool | None = None
) -> Method:
    """Whole methods: parts drawn from every kind that fit together.

    A structure is drawn with an estimator that provides what it needs; a combination of the rest that a ``Method``
    refuses is not drawn.

    Args:
        draw: supplied by Hypothesis.
        needs_likelihood: only methods that do (or do not) draw labels from the model; ``None``: both.
        needs_closure: only methods that do (or do not) need a closure; ``None``: both.

    Example:
        >>> import osculate as osc
        >>> from hypothesis import given
        >>> @given(method=osc.strategies.methods(needs_closure=False))
        ... def drop_in(method):
        ...     assert not method.needs_closure
        >>> drop_in()
    """
    wanted = (("needs_likelihood", needs_likelihood), ("needs_closure", needs_closure))
    fitting = [
        base for base in _bases() if all(value is None or getattr(base, name) == value for name, value in wanted)
    ]
    if not fitting:
        raise ArgumentError(f"no registered composition has needs_likelihood={needs_likelihood}, {needs_closure=}")
    found: Method = draw(st.sampled_from(fitting))
    for name in ("damping", "momentum", "weight_decay", "step_size", "guard"):
        found = _refined(found, name, draw(parts(name.replace("_", " "))), wanted)
    return found


def _refined(method: Method, name: str, part: Any, wanted: Sequence[tuple[str, bool | None]]) -> Method:
    """The method with another part, if that is legal and what is wanted; else as it was."""
    try:
        changed = replace(method, **{name: part})
    except ArgumentError:
        return method
    return changed if all(value is None or getattr(changed, key) == value for key, value in wanted) else method


@functools.lru_cache(maxsize=1)
def _bases() -> tuple[Method, ...]:
    """Every legal pair of structure and estimator, as a method with plain parts otherwise."""
    table = registry.examples()
    found: list[Method] = []
    for structure, estimator in itertools.product(table["structure"].values(), table["curvature"].values()):
        if isinstance(structure, ByLayer) and not set(structure.table) <= {"Linear", "Conv2d"}:
            continue  # its keys name layers of another network
        try:
            found.append(Method(structure, estimator, defaults={"lr": 0.01, "damping": 0.3}))
        except ArgumentError:
            continue
    return tuple(found)


def _example(seed: int) -> Case:
    """A source of random tensors."""
    return Case("tensors", nn.Identity, (1,), seed=seed)
