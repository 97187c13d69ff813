"""The capture's own test: the sum over calls of g'a is the gradient autograd gives, on every supported layer."""

from collections.abc import Callable

import pytest
import torch
from measuring import close, half_squares, joint, loop_over_samples, measure
from osculate.curvature import LayerStatistics, Record
from torch import Tensor, nn

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear on sequences": (lambda: nn.Linear(4, 3), (5, 6, 4)),
    "linear on grids": (lambda: nn.Linear(4, 3), (2, 3, 5, 4)),
    "deep": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), (7, 4)),
    "in-place": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), (7, 4)),
    "one sample": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (1, 4)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), (4, 2, 6, 6)),
    "conv, stride": (lambda: nn.Conv2d(2, 3, 3, stride=2), (4, 2, 7, 7)),
    "conv, padding": (lambda: nn.Conv2d(2, 3, 3, padding=1), (4, 2, 5, 5)),
    "conv, dilation": (lambda: nn.Conv2d(2, 3, 2, dilation=2), (4, 2, 6, 6)),
    "conv, no bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (4, 2, 6, 6)),
    "conv, all at once": (lambda: nn.Conv2d(3, 2, (2, 3), (2, 1), (1, 2), (1, 2), bias=False), (2, 3, 6, 7)),
    "conv, in-place": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)),
        (3, 2, 6, 6),
    ),
    "conv on one pixel": (lambda: nn.Conv2d(4, 3, 1), (5, 4, 1, 1)),
}
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "sequences": (lambda: nn.BatchNorm1d(4), (5, 4, 3)),
    "images": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 2)),
    "volumes": (lambda: nn.BatchNorm3d(2), (3, 2, 2, 3, 2)),
    "no running statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (5, 4)),
    "between layers": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True)), (5, 4)),
}


def product(statistics: LayerStatistics) -> Tensor:
    """g'a summed over samples, positions and calls, as the matrix [W | b]."""
    rows, gradients = statistics.input_rows(), statistics.gradient_rows()
    if statistics.layer.has_bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return gradients.T @ rows


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_products_of_records_are_the_gradient(name: str, reduction: str) -> None:
    make, shape = NETS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    factor = 1.0 if reduction == "mean" else float(shape[0])
    statistics = measure(model, [x], loss=lambda out: factor * half_squares(out), reduction=reduction)
    assert statistics
    for entry in statistics.values():
        close(product(entry), joint(entry.gradients))
        scale = float(shape[0]) if reduction == "mean" else 1.0
        assert entry.samples == shape[0] and entry.gradient_scale == scale
        per_sample = entry.per_sample_gradients(entry.gradient_rows() * entry.gradient_scale)
        for value, gradient in zip(per_sample, entry.gradients, strict=True):
            close(value.sum(0) / entry.gradient_scale, gradient)


@pytest.mark.parametrize("name", NETS)
def test_per_sample_gradients_equal_a_loop(name: str) -> None:
    make, shape = NETS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    expected = loop_over_samples(model, x, lambda out, i: half_squares(out))
    found = [
        value
        for entry in measure(model, [x]).values()
        for value in entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
    ]
    assert len(found) == len(expected[0])
    for position, value in enumerate(found):
        close(value, torch.stack([gradients[position] for gradients in expected]))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation_is_linear_in_scale_and_shift(name: str, training: bool) -> None:
    make, shape = NORMS[name]
    model, x = make().double().train(training), torch.randn(shape, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
    statistics = measure(model, [x])
    buffers = [buffer.clone() for buffer in model.buffers()]
    entry = next(entry for entry in statistics.values() if entry.layer.kind == "BatchNorm")
    per_sample = entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
    for value, gradient in zip(per_sample, entry.gradients, strict=True):
        assert value.shape == (shape[0], *gradient.shape)
        close(value.mean(0), gradient)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    if not training and name != "no running statistics":
        expected = loop_over_samples(model, x, lambda out, i: half_squares(out))
        own = [i for i, p in enumerate(model.parameters()) if any(p is q for q in entry.layer.parameters.values())]
        for position, value in zip(own, per_sample, strict=True):
            close(value, torch.stack([gradients[position] for gradients in expected]))


class Twice(nn.Module):
    """One linear map applied two times in a row, between two others; optionally an outer one shares nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shared(torch.relu_(self.shared(torch.tanh(self.first(x)))))))


@pytest.mark.parametrize("sizes", [(5,), (1,), (4, 3)])
@pytest.mark.parametrize("positions", [(), (3,)])
def test_a_module_called_twice(sizes: tuple[int, ...], positions: tuple[int, ...]) -> None:
    model = Twice().double()
    batches = [torch.randn(n, *positions, 3, dtype=torch.float64) for n in sizes]
    total = sum(sizes)
    statistics = measure(model, batches, loss=lambda out: half_squares(out) * len(out), reduction="sum")
    for name, calls in (("first", 1), ("shared", 2), ("last", 1)):
        entry = statistics[name]
        assert (entry.samples, entry.positions) == (total, calls * (positions[0] if positions else 1))
        close(product(entry), joint(entry.gradients))
    expected = [
        gradients for x in batches for gradients in loop_over_samples(model, x, lambda out, i: half_squares(out))
    ]
    found = [
        value for e in statistics.values() for value in e.per_sample_gradients(e.gradient_rows() * e.gradient_scale)
    ]
    for position, value in enumerate(found):
        close(value, torch.stack([gradients[position] for gradients in expected]))


@pytest.mark.parametrize("name", ["deep", "conv, padding", "linear on sequences"])
def test_micro_batches_are_one_batch(name: str) -> None:
    make, shape = NETS[name]
    model, x = make().double(), torch.randn(12, *shape[1:], dtype=torch.float64)
    whole = measure(model, [x], Record.INPUTS | Record.GRADIENTS | Record.MEANS)
    pieces = measure(
        model, x.split(4), Record.INPUTS | Record.GRADIENTS | Record.MEANS, loss=lambda out: half_squares(out) / 3
    )
    for key, entry in whole.items():
        other = pieces[key]
        assert (other.samples, other.positions, other.gradient_scale) == (12, entry.positions, entry.gradient_scale)
        for attribute in ("inputs", "output_gradient", "mean_preactivation", "mean_gradient"):
            close(getattr(other, attribute), getattr(entry, attribute))
        close(product(other), joint(other.gradients))


@pytest.mark.parametrize("name", ["linear", "conv", "linear on sequences", "conv, stride"])
def test_means_are_means_over_samples_and_positions(name: str) -> None:
    make, shape = NETS[name]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    (entry,) = measure(model, [x], Record.INPUTS | Record.GRADIENTS | Record.MEANS).values()
    rows = entry.expand(model(x)).detach()
    assert rows.shape[:2] == (shape[0], entry.positions)
    close(entry.mean_preactivation, rows.mean((0, 1)))
    close(entry.mean_gradient, entry.preactivation_gradients().mean((0, 1)))
    weight = next(iter(entry.layer.parameters.values())).detach().flatten(1)
    matrix = torch.cat([weight, entry.layer.parameters["bias"].detach().unsqueeze(1)], 1)
    close(matrix @ entry.mean_input(), entry.mean_preactivation)  # h = [W | b] (a, 1) holds for the means too


@pytest.mark.parametrize("frozen", ["weight", "bias", "first layer"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_frozen_parameters_are_not_part_of_the_layer(kind: str, frozen: str) -> None:
    if kind == "Linear":
        model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3)
    else:
        model, x = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2)).double(), torch.randn(5, 1, 4, 4)
    names = ["0.weight", "0.bias"] if frozen == "first layer" else [f"2.{frozen}"]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    statistics = measure(model, [x.double()])
    assert ("0" in statistics) == (frozen != "first layer")
    layer = statistics["2"].layer
    assert layer.is_matrix == (frozen != "weight") and layer.has_bias == (frozen != "bias")
    for entry in statistics.values():
        per_sample = entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
        for value, gradient in zip(per_sample, entry.gradients, strict=True):
            close(value.mean(0), gradient)
