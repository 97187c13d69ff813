"""Theorems about eigenbases, and what every structure with an order limit does with layers beyond it."""

import re

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, measure, refreshed
from osculate.curvature import Gaussian, LayerStatistics, Record, SampledFisher, discover_layers
from osculate.preconditioners import (
    Covariance,
    Dense,
    Eigenbasis,
    GradientMoments,
    Kronecker,
    Observation,
    SideDamping,
    ZeroStartAverage,
)
from torch import Tensor, nn

NONE = SideDamping(0.0, 0.0, 0.0)
LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (12, 3)),
    "linear, no bias": (lambda: nn.Linear(4, 2, bias=False), (9, 4)),
    "sequences": (lambda: nn.Linear(2, 3), (8, 4, 2)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), (7, 2, 3, 3)),
}


def seen(kind: str, seed: int) -> tuple[osc.Layer, LayerStatistics]:
    """One layer and its sampled statistics."""
    make, shape = LAYERS[kind]
    torch.manual_seed(seed)
    model = make().double()
    x = torch.randn(shape, generator=generator_of(seed), dtype=torch.float64)
    statistics = measure(model, [x], Record.INPUTS | Record.GRADIENTS | Record.SAMPLED, likelihood=Gaussian())
    (layer,) = discover_layers(model)
    return layer, SampledFisher().fill(statistics["(root)"])


def dense_form(part: osc.Preconditioner, layer: osc.Layer, statistics: LayerStatistics) -> Tensor:
    """The undamped matrix of a structure that has seen one mini-batch."""
    parameters = tuple(parameter.detach() for parameter in layer.parameters.values())
    state = part.init(layer, parameters)
    observation = Observation(statistics, statistics.gradients, parameters)
    part.update(state, observation)
    refreshed(part, state, NONE)
    if isinstance(part, osc.Refining):
        part.refine(state, observation)
    if isinstance(part, Kronecker):  # its own dense form inverts factors, which are singular without damping
        product = torch.kron(state.outputs.second_moment, state.inputs.second_moment)
        order = layer.entries()
        return product[order][:, order]
    return part.to_dense(state, layer, NONE)


EKFAC = Eigenbasis(average=ZeroStartAverage(0.0))


@pytest.mark.parametrize("kind", LAYERS)
@given(seed=st.integers(0, 10_000))
def test_ekfac_is_at_least_as_close_to_the_fisher_as_kfac(kind: str, seed: int) -> None:
    """arXiv:1806.03884, Theorem 1: in Frobenius norm, for whatever mini-batch."""
    layer, statistics = seen(kind, seed)
    assert statistics.matrix is not None
    exact = statistics.matrix()
    distances = {
        name: float(torch.linalg.matrix_norm(dense_form(part, layer, statistics) - exact))
        for name, part in (("ekfac", EKFAC), ("kfac", Kronecker(Covariance(), Covariance())))
    }
    assert distances["ekfac"] <= distances["kfac"] * (1 + 1e-12)
    close(exact, dense_form(Dense(), layer, statistics))


@pytest.mark.parametrize("kind", LAYERS)
def test_ekfac_has_the_exact_second_moments_in_its_basis(kind: str) -> None:
    """Its diagonal in the basis is that of the exact Fisher, so their traces agree as well."""
    layer, statistics = seen(kind, 3)
    exact, approximate = statistics.matrix(), dense_form(EKFAC, layer, statistics)
    close(approximate.trace(), exact.trace())
    state = EKFAC.init(layer, tuple(parameter.detach() for parameter in layer.parameters.values()))
    EKFAC.update(state, Observation(statistics, statistics.gradients, ()))
    refreshed(EKFAC, state, NONE)
    order = layer.entries()
    basis = torch.kron(state.outputs_basis, state.inputs_basis)[order]
    close((basis.T @ approximate @ basis).diag(), (basis.T @ exact @ basis).diag())


def test_ekfac_is_kfac_where_second_moments_factorise() -> None:
    """Every input with every gradient, one position: E[(g a')^2] is the product of E[g^2] and E[a^2] in any basis."""
    layer, statistics = seen("linear", 1)
    inputs = torch.randn(5, 3, generator=generator_of(0), dtype=torch.float64)
    gradients = torch.randn(6, 4, generator=generator_of(1), dtype=torch.float64)
    paired = LayerStatistics(
        layer, 30, 1, inputs=inputs.repeat_interleave(6, 0), sampled_gradient=gradients.repeat(5, 1),
        gradients=statistics.gradients,
    )  # fmt: skip
    filled = SampledFisher().fill(paired)
    close(dense_form(EKFAC, layer, filled), dense_form(Kronecker(Covariance(), Covariance()), layer, filled))


def test_a_failed_side_keeps_both_bases() -> None:
    """A basis of the inputs belongs to squares that were measured with it."""
    layer, statistics = seen("linear", 0)
    state = EKFAC.init(layer, tuple(parameter.detach() for parameter in layer.parameters.values()))
    EKFAC.update(state, Observation(statistics, statistics.gradients, ()))
    refreshed(EKFAC, state, NONE)
    before = [tensor.clone() for tensor in (state.inputs_basis, state.outputs_basis, state.squares)]
    state.outputs[0, 0] = float("nan")
    refreshed(EKFAC, state, NONE)
    for old, new in zip(before, (state.inputs_basis, state.outputs_basis, state.squares), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    "part",
    [
        Kronecker(Covariance(), Covariance(), limit=5),
        Eigenbasis(limit=5),
        Eigenbasis(GradientMoments(), power=0.5, limit=5),
        Dense(limit=29),
    ],
    ids=lambda part: type(part).__name__,
)
def test_layers_beyond_the_limit_get_the_fallback_visibly(part: osc.Preconditioner) -> None:
    """5 x 5 and 5 x 6: the second is one too large, by side or by parameters."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))
    method = osc.Method(part, osc.SampledFisher(), defaults={"damping": 0.1})
    optimizer = osc.build(method, model, likelihood="gaussian")
    assert [row.fallback for row in optimizer.layer_table()] == [False, True]
    with pytest.raises(osc.CompatibilityError, match="strict=True"):
        osc.build(method, model, likelihood="gaussian", strict=True)


@pytest.mark.parametrize("make", [Eigenbasis, Dense, lambda **k: Kronecker(Covariance(), Covariance(), **k)])
def test_limits_and_powers_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(osc.ArgumentError, match="limit must be"):
        make(limit=0)  # type: ignore[operator]
    with pytest.raises(osc.ArgumentError, match="power must be"):
        Eigenbasis(power=2.0)


def test_dense_takes_indefinite_curvature_only_with_a_rule_for_it() -> None:
    assert Dense(osc.Absolute()).takes_indefinite and not Dense().takes_indefinite


@pytest.mark.parametrize("name", ["kfac", "ekfac", "kbfgs", "shampoo"])
def test_a_vocabulary_is_left_out_with_one_warning(name: str) -> None:
    """Named, with its bytes, before anything of it is allocated; kernels of 512 channels are no vocabulary."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 6000))
    with pytest.warns(
        UserWarning, match=r"fallback.*2 .*a side of 6000 is beyond limit=5120.* MiB.*higher limit"
    ) as seen:
        rows = osc.build(name, model, likelihood="categorical").layer_table()
    assert len(seen) == 1
    assert [row.layer for row in rows if row.fallback] == ["2"]
    assert sum(row.bytes for row in rows) < 2**20
    deep = nn.Sequential(nn.Conv2d(512, 2, 3))
    assert not osc.build("kfac", deep, likelihood="categorical").layer_table()[0].fallback


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Kronecker(Covariance(), Covariance(), limit=500), "a side of 3000 is beyond limit=500.* 69 MiB"),
        (Eigenbasis(limit=500), "a side of 3000 is beyond limit=500.* 69 MiB"),
        (Dense(limit=500), "15000 parameters are beyond limit=500.* 1,717 MiB"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_declined_layer_says_what_it_would_take(part: osc.Preconditioner, words: str) -> None:
    """A vocabulary: in the table and in the refusal of strict=True, with its bytes; nothing of it is allocated."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3000))
    for method in (
        osc.Method(table, osc.SampledFisher(), defaults={"damping": 0.1}) for table in (part, osc.ByLayer({"*": part}))
    ):
        first, second = osc.build(method, model, likelihood="categorical").layer_table()
        assert not first.note and second.fallback
        assert re.search(words, second.note)
        with pytest.raises(osc.CompatibilityError, match=words):
            osc.build(method, model, likelihood="categorical", strict=True)
