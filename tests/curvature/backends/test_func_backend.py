"""The ``func`` backend equals ``hooks`` wherever both can measure, and a plain loop where hooks cannot."""

from collections.abc import Callable

import pytest
import torch
from backend_nets import EVERYTHING, FIELDS, NETS, UNREAD, Keywords, Recurrent, record, vectors_of
from measuring import close, half_squares
from osculate.curvature import Bernoulli, Categorical, Gaussian, Layer, LayerStatistics, Likelihood, Record
from osculate.curvature import discover_layers as discover
from osculate.curvature.backends.table import make_backend
from osculate.errors import ArgumentError, CompatibilityError, UnknownNameError
from torch import Tensor, nn


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda part: part.name)
def test_every_quantity_equals_that_of_hooks(net: str, passes: int, likelihood: Likelihood) -> None:
    make, shape = NETS[net]
    model = make().double()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(passes)]
    hooks = record("hooks", model, batches, likelihood=likelihood)
    func = record("func", model, batches, likelihood=likelihood)
    assert list(hooks) == list(func) == [layer.name for layer in discover(model)]
    for name, entry in hooks.items():
        other = func[name]
        assert (entry.samples, entry.positions, entry.gradient_scale) == (
            other.samples,
            other.positions,
            other.gradient_scale,
        )
        for field in FIELDS:
            close(getattr(other, field), getattr(entry, field))
        for value, expected in zip(vectors_of(other), vectors_of(entry), strict=True):
            assert float(expected.abs().max()) > 0
            close(value, expected)
        for value, expected in zip(other.sampled_parameter_gradients, entry.sampled_parameter_gradients, strict=True):
            close(value, expected)
        assert other.sample_gradients.loss is not None and entry.sample_gradients.loss is None


@pytest.mark.parametrize("net", {**NETS, **UNREAD})
def test_whole_gradients_equal_a_loop_over_samples(net: str) -> None:
    """Every module, also those that no adapter reads."""
    make, shape = (NETS | UNREAD)[net]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    entries = record("func", model, [x], wanted=Record.GRADIENTS | Record.PER_SAMPLE)
    assert set(entries) == {layer.name for layer in discover(model)}
    for entry in entries.values():
        own = list(entry.layer.parameters.values())
        for index in range(len(x)):
            expected = torch.autograd.grad(half_squares(model(x[index : index + 1])), own)
            for value, gradient in zip(entry.loss_vectors(), expected, strict=True):
                close(value[index], gradient)


def test_a_summed_loss_needs_no_scale() -> None:
    make, shape = NETS["mlp"]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    mean = record("func", model, [x])
    summed = record("func", model, [x], reduction="sum", loss=lambda out: len(x) * half_squares(out))
    for name, entry in mean.items():
        for value, expected in zip(vectors_of(summed[name]), vectors_of(entry), strict=True):
            close(value, expected)


def test_a_forward_pass_alone_gives_inputs_and_sampled_gradients() -> None:
    make, shape = NETS["cnn"]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    wanted = Record.INPUTS | Record.SAMPLED | Record.SAMPLED_PARAMETERS
    hooks, func = (record(name, model, [x], wanted=wanted, kind="forward") for name in ("hooks", "func"))
    for name, entry in hooks.items():
        close(func[name].inputs, entry.inputs)
        close(func[name].sampled_gradient, entry.sampled_gradient)
        assert func[name].output_gradient is None


def test_arguments_by_keyword_and_chunks() -> None:
    model = Keywords().double()
    x, scale = torch.randn(7, 4).double(), torch.rand(7, 1).double()
    found: dict[str, LayerStatistics] = {}
    for chunk in (2, 64):
        layers: list[Layer] = discover(model)
        backend = make_backend("func", model, layers, Categorical(), "mean", 0)
        backend.chunk = chunk  # type: ignore[attr-defined]
        backend.arm({layer.name: EVERYTHING for layer in layers})
        half_squares(model(x, scale=scale, power=3)).backward()
        entries = backend.collect()
        backend.close()
        for name, entry in entries.items():
            for value, expected in zip(vectors_of(entry), vectors_of(found.get(name, entry)), strict=True):
                close(value, expected)
        found = entries
    weight = found["head"].loss_vectors()[0].mean(0)
    model.zero_grad()
    half_squares(model(x, scale=scale, power=3)).backward()
    close(weight, model.head.weight.grad)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "couples its samples"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), "random mask"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.RReLU()), "random slopes"),
    ],
)
def test_modules_that_couple_samples_or_are_random_are_refused_by_name(make: Callable, word: str) -> None:
    model, x = make(), torch.randn(5, 4)
    with pytest.raises(CompatibilityError, match=rf"module '1'.*{word}.*eval\(\).*backend='hooks'"):
        record("func", model, [x])
    if not isinstance(model[1], nn.RReLU):  # whose derivative vmap evaluates slowly, with a warning
        model.eval()
        assert record("func", model, [x])


def test_hidden_coupling_is_measured_and_chance_is_found_out() -> None:
    """Samples that cannot be run alone are told apart at the joint output."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) - self.head(x).mean(0)

    model, x = Centred().double(), torch.randn(5, 4).double()
    found = record("func", model, [x])["head"]
    parameters = list(model.parameters())
    own = [torch.autograd.grad(half_squares(model(x)[i : i + 1]), parameters) for i in range(len(x))]
    for value, right in zip(found.loss_vectors(), map(torch.stack, zip(*own, strict=True)), strict=True):
        close(value, right)

    class Noisy(Centred):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + torch.randn(())

    with pytest.raises(ArgumentError, match="second evaluation"):
        record("func", Noisy(), [torch.randn(5, 4)])


def test_refusals_leave_no_trace_and_hooks_of_others_see_nothing() -> None:
    """Two backends on one model: the second evaluation of one is invisible to the other."""
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4).double()
    layers = discover(model)
    func, hooks = (make_backend(name, model, layers, Categorical(), "mean", 0) for name in ("func", "hooks"))
    for backend in (func, hooks):
        backend.arm({layers[0].name: EVERYTHING})
    half_squares(model(x)).backward()
    one, other = func.collect()[layers[0].name], hooks.collect()[layers[0].name]
    assert one.samples == other.samples == 5
    assert hooks.collect() == func.collect() == {}
    with pytest.raises(UnknownNameError, match="did you mean 'hooks'"):
        make_backend("hook", model, layers, None, "mean", 0)
    with pytest.raises(ArgumentError, match="one Tensor"):
        record("func", Recurrent().lstm, [torch.randn(2, 3, 3)])
