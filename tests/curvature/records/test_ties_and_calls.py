"""Modules called several times on different shapes, modules that share a weight, labels of several passes, tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from measuring import capture_of, close, generator_of, half_squares, loop_over_samples, measure, products
from osculate import ArgumentError
from osculate.curvature import Categorical, Gaussian, LayerStatistics, Record, discover_layers
from torch import Tensor, nn


class Tied(nn.Module):
    """Two Linear modules with one weight and one bias, one of them called on sequences of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)).sum(1) + torch.relu_(self.second(x[:, :2])).sum(1))


class Pyramid(nn.Module):
    """One head, a grouped convolution with a normalisation behind it, on images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        pieces = [self.norm(self.conv(value)).flatten(2).sum(2) for value in (x, x[..., ::2], x[:, :, 1:])]
        return sum(pieces[1:], pieces[0])


class Words(nn.Module):
    """One table for two texts of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3, padding_idx=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)).sum(1) * self.table(x[:, :2]).sum(1))


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 5, 4, generator=generator_of(3), dtype=torch.float64)


CASES = {
    "tied": (Tied, lambda n: torch.randn(n, 4, 3, generator=generator_of(3), dtype=torch.float64)),
    "pyramid": (Pyramid, images),
    "words": (Words, lambda n: torch.randint(0, 6, (n, 4), generator=generator_of(3))),
}


def per_sample(entry: LayerStatistics) -> tuple[Tensor, ...]:
    return entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", [4, 2])
def test_calls_of_different_shapes_are_one_layer(case: str, split: int) -> None:
    make, batch = CASES[case]
    torch.manual_seed(4)
    model, x = make().double(), batch(4)
    record = Record.INPUTS | Record.GRADIENTS | Record.SAMPLED
    loss = lambda out: half_squares(out) * split / 4  # noqa: E731
    statistics = measure(model, x.split(split), record, loss=loss, likelihood=Gaussian())
    single = loop_over_samples(model, x, lambda out, i: half_squares(out))
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    for entry in statistics.values():
        assert entry.samples == 4 and not entry.ragged
        assert sum(entry.calls) == entry.positions and entry.rows == 4 * entry.positions
        if entry.layer.is_matrix:
            for value, gradient in zip(products(entry), entry.gradients, strict=True):
                close(value, gradient)
        for value, parameter in zip(per_sample(entry), entry.layer.parameters.values(), strict=True):
            close(value, torch.stack([gradients[order[id(parameter)]] for gradients in single]))
        directions = tuple(torch.randn_like(parameter) for parameter in entry.layer.parameters.values())
        sampled = entry.per_sample_gradients(entry.sampled_rows())
        expected = sum((value * along).flatten(1).sum(1) for value, along in zip(sampled, directions, strict=True))
        close(entry.scores(directions), expected)


def test_tied_modules_are_one_layer() -> None:
    layers = {layer.name: layer for layer in discover_layers(Tied())}
    assert layers.keys() == {"first", "last"} and len(layers["first"].modules) == 2


@pytest.mark.parametrize("difference", ["bias", "configuration", "kind"])
def test_ties_that_do_not_fit_have_no_statistics(difference: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 2), nn.Conv1d(2, 2, 2, dilation=1 + (difference == "configuration")))
    if difference == "kind":
        model = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    if difference == "configuration":
        model[1].bias = model[0].bias
    layers = {layer.name: layer for layer in discover_layers(model)}
    assert layers["0"].kind == "Other" and layers["0"].modules == (model[0],)
    if difference == "bias":  # the second bias is nobody else's: its own gradient is recorded
        assert layers["1"].kind == "Conv1d" and list(layers["1"].parameters) == ["bias"]


@pytest.mark.parametrize("lengths", [(3, 3, 5), (2, 4)])
def test_micro_batches_of_different_lengths_have_rows_but_no_samples(lengths: tuple[int, ...]) -> None:
    model = nn.Linear(3, 2).double()
    batches = [torch.randn(2, length, 3, dtype=torch.float64) for length in lengths]
    (entry,) = measure(model, batches, loss=lambda out: out.square().sum()).values()
    assert entry.ragged and entry.samples == 2 * len(lengths) and entry.rows == 2 * sum(lengths)
    for value, gradient in zip(products(entry), entry.gradients, strict=True):
        close(value, gradient)
    with pytest.raises(ArgumentError, match="pad the micro-batches"):
        per_sample(entry)


def test_calls_on_other_samples_have_rows_but_no_samples() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(torch.cat([x, 2 * x])).sum(0)

    model = Siamese().double()
    (entry,) = measure(model, [torch.randn(4, 3, dtype=torch.float64)]).values()
    assert entry.ragged and entry.samples == 4 and entry.rows == 12
    for value, gradient in zip(products(entry), entry.gradients, strict=True):
        close(value, gradient)
    with pytest.raises(ArgumentError, match="different numbers"):
        entry.scores((torch.zeros(2, 3), torch.zeros(2)))


def test_copies_are_not_recorded_and_inputs_may_be_keywords() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)).double(), torch.randn(4, 3, dtype=torch.float64)
    capture = capture_of(model, Record.INPUTS | Record.GRADIENTS)
    half_squares(copy.deepcopy(model)(x)).backward()
    assert capture.collect() == {}
    half_squares(model[0](input=x)).backward()
    assert torch.equal(capture.collect()["0"].inputs, x)


def test_two_passes_before_one_backward_draw_their_own_labels() -> None:
    model, x = nn.Linear(3, 4).double(), torch.randn(64, 3, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    capture = capture_of(model, Record.SAMPLED, likelihood=Categorical())
    (half_squares(model(x)) + half_squares(model(x))).backward()
    (joint,) = capture.collect().values()
    first, second = joint.sampled_rows().split(64)
    assert not torch.equal(first, second)
    for _ in range(2):  # one after another they are the same two draws
        half_squares(model(x)).backward()
    (apart,) = capture.collect().values()
    assert torch.equal(apart.sampled_rows(), joint.sampled_rows())


def test_tokens_are_one_sample_per_sequence() -> None:
    likelihood, output = Categorical(), torch.randn(5, 3, 4, generator=generator_of(1), dtype=torch.float64)
    labels = likelihood.sample(output, generator_of(2))
    assert labels.shape == (5, 3)
    expected = sum(nn.functional.cross_entropy(output[:, t], labels[:, t], reduction="sum") for t in range(3))
    close(likelihood.negative_log_likelihood(output, labels), expected)
    roots = likelihood.curvature_root(output)
    assert roots.shape == (12, 5, 3, 4)
    for n in range(5):
        hessian = torch.autograd.functional.hessian(
            lambda value, n=n: likelihood.negative_log_likelihood(value.unsqueeze(0), labels[n : n + 1]), output[n]
        )
        rows = roots[:, n].flatten(1)
        close(rows.T @ rows, hessian.reshape(12, 12))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 1), (4, 3, 5, 5), ()])
def test_outputs_that_are_no_logits_are_refused(shape: tuple[int, ...]) -> None:
    output = torch.zeros(shape)
    for attempt in (
        lambda: Categorical().sample(output, generator_of(0)),
        lambda: Categorical().curvature_root(output),
        lambda: Categorical().negative_log_likelihood(output, torch.zeros(shape[:-1], dtype=torch.long)),
    ):
        with pytest.raises(ArgumentError, match="last axis"):
            attempt()


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"\(4,\) do not fit logits of shape \(4, 3, 2\)"):
        Categorical().negative_log_likelihood(torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.long))
