"""Spectral normalisation against torch and against singular values."""

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of
from osculate.curvature import discover_layers
from osculate.experiments.runs.launches import counting
from osculate.preconditioners.linalg import has_bfloat16_units, newton_schulz, newton_schulz_of_many
from osculate.preconditioners.structures import spectral
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
CUBIC = (1.5, -0.5, 0.0)


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 7))
def test_newton_schulz_maps_singular_values(seed: int, rows: int, columns: int) -> None:
    """The iteration is the scalar polynomial on every singular value, and leaves the singular vectors alone."""
    matrix = torch.randn(rows, columns, generator=generator_of(seed), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    close(newton_schulz(matrix, COEFFICIENTS, 5, 1e-7, None), (left * values) @ right, 1e-9)


def test_the_cubic_converges_to_the_polar_factor() -> None:
    matrix = torch.randn(4, 6, generator=generator_of(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    close(newton_schulz(matrix, CUBIC, 40, 1e-7, None), left @ right, 1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_newton_schulz_in_bfloat16_is_torchs(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=generator_of(1))
    ours = newton_schulz(matrix, COEFFICIENTS, 5, 1e-7, torch.bfloat16)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, torch_newton_schulz(matrix, COEFFICIENTS, 5, 1e-7).float())


def test_a_zero_matrix_stays_zero() -> None:
    assert not newton_schulz(torch.zeros(3, 2), COEFFICIENTS, 5, 1e-7, None).any()


@pytest.mark.parametrize(("scale", "torchs"), [(osc.AspectRatio(), "original"), (osc.MatchAdam(), "match_rms_adamw")])
def test_muon_against_torch(scale: object, torchs: str) -> None:
    """The iteration in bfloat16 as torch runs it, everything else in float64: equal over several steps."""

    def train(make: object) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 8, bias=False)).double()
        optimizer = make(model)  # type: ignore[operator]
        x, y = torch.randn(16, 6).double(), torch.randn(16, 8).double()
        for _ in range(6):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    method = osc.Method(
        osc.Spectral(scale, dtype=torch.bfloat16),
        momentum=osc.Nesterov(osc.EMA(0.95)),
        weight_decay=osc.Decoupled(),
        defaults={"lr": 0.02, "weight_decay": 0.1},
    )
    ours = train(lambda model: osc.build(method, model))
    reference = train(lambda model: torch.optim.Muon(model.parameters(), lr=0.02, adjust_lr_fn=torchs))
    for one, other in zip(ours, reference, strict=True):
        close(one, other, 1e-8)


def test_nothing_dense_stands_behind_it() -> None:
    (layer,) = discover_layers(nn.Linear(2, 3))
    part = osc.Spectral()
    assert part.serves(layer) == ("weight",) and not part.linear
    state = part.init(layer, ())
    with pytest.raises(osc.CompatibilityError, match="not linear"):
        part.to_dense(state, layer, osc.SideDamping(1.0, 1.0, 1.0))


@pytest.mark.parametrize("values", [{"iterations": 0}, {"epsilon": 0.0}])
def test_wrong_numbers_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(osc.ArgumentError, match=next(iter(values))):
        osc.Spectral(**values)  # type: ignore[arg-type]
    with pytest.raises(osc.ArgumentError, match="scale"):
        osc.MatchAdam(0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_matrices_are_each_what_they_are_alone(dtype: torch.dtype) -> None:
    """Shapes mixed, transposed and repeated, one of them zero; the iterations of one shape are one batch."""
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5), (6, 4), (3, 2), (1, 7)]
    matrices = [torch.randn(shape, generator=generator_of(k), dtype=dtype) for k, shape in enumerate(shapes)]
    matrices[2].zero_()
    kept = [matrix.clone() for matrix in matrices]
    with counting() as counter:
        found = newton_schulz_of_many(matrices, COEFFICIENTS, 5, 1e-7, None)
        together = counter.read().update
        counter.clear()
        alone = [newton_schulz(matrix, COEFFICIENTS, 5, 1e-7, None) for matrix in matrices]
        assert together < 0.7 * counter.read().update
    for one, other, matrix, before in zip(found, alone, matrices, kept, strict=True):
        assert one.shape == matrix.shape and torch.equal(matrix, before)
        close(one, other, 1e-12 if dtype == torch.float64 else 1e-4)


def test_many_layers_at_once() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Conv2d(2, 3, 2)).double()
    layers = discover_layers(model)
    momenta = [(torch.randn(layer.parameters["weight"].shape, dtype=torch.float64),) for layer in layers]
    for part in (osc.Spectral(osc.MatchAdam()), osc.Spectral().reference()):
        states = [part.init(layer, (layer.parameters["weight"],)) for layer in layers]
        for state, momentum, (found,) in zip(states, momenta, part.precondition_blocks(states, momenta), strict=True):
            assert found.shape == momentum[0].shape
            close(found, part.precondition(state, momentum)[0], 1e-12)


def test_the_precision_is_chosen_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 for float32 parameters where there are units for it; a given type is heeded; the state shows it."""
    (layer,) = discover_layers(nn.Linear(2, 3))
    weight = layer.parameters["weight"]
    assert osc.Spectral(dtype=torch.bfloat16).init(layer, (weight,)).dtype == torch.bfloat16
    monkeypatch.setattr(spectral, "has_bfloat16_units", lambda device: False)
    assert osc.Spectral().init(layer, (weight,)).dtype is None
    monkeypatch.setattr(spectral, "has_bfloat16_units", lambda device: True)
    state = osc.Spectral().init(layer, (weight,))
    assert state.dtype == torch.bfloat16 and "bfloat16" in repr(state)
    assert osc.Spectral(dtype=torch.float32).init(layer, (weight,)).dtype == torch.float32
    assert osc.Spectral().init(layer, (weight.double(),)).dtype is None


@pytest.mark.parametrize(
    ("capabilities", "built", "units"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True, True),
        ({"avx512_bf16": False, "amx_bf16": False}, True, False),
        ({"avx2": True}, True, False),
        ({"avx512_bf16": True}, False, False),
    ],
)
def test_the_units_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], built: bool, units: bool
) -> None:
    """A processor that names units for bfloat16 has them if torch was built with the library that uses them."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    assert has_bfloat16_units(torch.device("cpu")) is units
    assert not has_bfloat16_units(torch.device("meta"))
