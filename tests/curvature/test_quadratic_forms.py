"""Quadratic forms along directions against dense matrices: PAPERS 3.3 (a), (a'), (b), (c), (d)."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from measuring import FixedTargets, capture_of, close, flat, generator_of, half_squares, measure
from osculate.curvature import (
    Categorical,
    ExactHessian,
    Gaussian,
    HessianRowSums,
    Layer,
    LayerStatistics,
    Record,
    SampledBatchScores,
    SampledScores,
    SignedHessian,
    discover_layers,
)
from osculate.curvature.products import GraphKeepingBackward
from osculate.curvature.quadratic_forms import DirectionalEvidence
from torch import Tensor, nn

Directions = dict[str, tuple[Tensor, ...]]

NETS = {
    "dense": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (5, 3)),
    "in-place": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), (5, 3)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)), (4, 1, 3, 3)),
    "normalised": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "other": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), (5, 3)),
    "no bias": (lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
}


def random_directions(layers: list[Layer]) -> Directions:
    generator = generator_of(4)
    return {
        layer.name: tuple(torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in layer.parameters.values())
        for layer in layers
    }


def dense_hessian(model: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parameters.values()])
        values = {k: v.reshape(p.shape) for (k, p), v in zip(parameters.items(), pieces, strict=True)}
        return half_squares(torch.func.functional_call(model, values, x))

    return torch.autograd.functional.hessian(loss, flat([p.detach() for p in parameters.values()]))


def columns(layers: list[Layer], directions: Directions) -> Tensor:
    """(P, L): each layer's direction, zero elsewhere."""
    blocks = [flat(directions[layer.name]).unsqueeze(1) for layer in layers]
    return torch.block_diag(*blocks)


def evidence_of(
    layers: list[Layer],
    directions: Directions,
    statistics: Mapping[str, LayerStatistics] | None = None,
    products: GraphKeepingBackward | None = None,
) -> DirectionalEvidence:
    product = None if products is None else products.product
    return DirectionalEvidence([layer.name for layer in layers], directions, statistics or {}, product, generator_of(0))


def kept_graph(model: nn.Module, x: Tensor, layers: list[Layer]) -> GraphKeepingBackward:
    products = GraphKeepingBackward(layers)
    with products:
        half_squares(model(x)).backward()
    return products


@pytest.mark.parametrize("net", [name for name in NETS if name != "normalised"])
def test_hessian_forms_equal_the_dense_hessian(net: str) -> None:
    make, shape = NETS[net]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    layers = discover_layers(model)
    d = random_directions(layers)
    D, H = columns(layers, d), dense_hessian(model, x)
    expected = D.T @ H @ D
    evidence = evidence_of(layers, d, products=kept_graph(model, x, layers))
    close(ExactHessian().measure(evidence), expected)
    close(HessianRowSums().measure(evidence), torch.diag(expected.sum(1)))
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(layers))), dtype=torch.float64)
    found = [signs * SignedHessian().signed(evidence, signs) for signs in patterns]
    for signs, value in zip(patterns, found, strict=True):
        close(value, signs * (expected @ signs))
    close(torch.stack(found).mean(0), expected.diagonal())  # T15 (b): averaged over all signs, exact
    drawn = SignedHessian().measure(evidence)
    assert any(torch.allclose(drawn, torch.diag(value)) for value in found)
    close(drawn, torch.diag(drawn.diagonal()))


def test_signs_follow_the_generator() -> None:
    model, x = NETS["dense"][0]().double(), torch.randn(5, 3, dtype=torch.float64)
    layers = discover_layers(model)
    d, products = random_directions(layers), kept_graph(model, x, layers)
    values = set()
    for seed in range(20):
        evidence = DirectionalEvidence([k.name for k in layers], d, {}, products.product, generator_of(seed))
        values.add(tuple(SignedHessian().measure(evidence).diagonal().tolist()))
    assert len(values) == 4  # a pattern and its negative give the same product


def test_backward_keeps_gradients_as_torch_does() -> None:
    model, x = NETS["dense"][0]().double(), torch.randn(5, 3, dtype=torch.float64)
    half_squares(model(x)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    products = GraphKeepingBackward(discover_layers(model))
    with products:
        for _ in range(2):  # two micro-batches
            (0.5 * half_squares(model(x))).backward()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, value)
        assert not parameter.grad.requires_grad
    layers = discover_layers(model)
    d = random_directions(layers)
    product = products.product(d)
    close(
        flat([v for layer in layers for v in product[layer.name]]),
        dense_hessian(model, x) @ flat([v for layer in layers for v in d[layer.name]]),
    )
    products.release()
    assert not products.gradients


class Partly(nn.Module):
    """One layer is not used, and the loss is linear in another."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.inner, self.shift = nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)).sum(1, keepdim=True) + self.shift(x)


@pytest.mark.parametrize("names", [("idle", "inner", "shift"), ("idle", "shift")])
def test_products_where_the_gradient_is_constant(names: tuple[str, ...]) -> None:
    """A parameter without curvature has the product zero, also when no parameter has any."""
    model, x = Partly().double(), torch.randn(5, 3, dtype=torch.float64)
    layers = [layer for layer in discover_layers(model) if layer.name in names]
    products = GraphKeepingBackward(layers)
    with products:
        model(x).sum().backward()
    product = products.product(random_directions(layers))
    for name in names:
        assert any(value.any() for value in product[name]) == (name == "inner")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_sampled_scores_are_per_sample_slopes(net: str, training: bool) -> None:
    """(a): s_l(i) = <gradient of sample i's sampled loss, d_l>; M is their second moment."""
    make, shape = NETS[net]
    model, x = make().double().train(training), torch.randn(shape, dtype=torch.float64)
    record = Record.SAMPLED | Record.INPUTS | Record.SAMPLED_PARAMETERS
    statistics = measure(model, [x], record, likelihood=Gaussian())
    layers = discover_layers(model)
    d = random_directions(layers)
    scores = []
    for layer in layers:
        if layer.adapter is None:
            scores.append(torch.zeros(shape[0], dtype=torch.float64))
            continue
        entry = statistics[layer.name]
        per_sample = entry.per_sample_gradients(entry.sampled_rows())
        expected = sum((g.flatten(1) @ v.flatten() for g, v in zip(per_sample, d[layer.name], strict=True)))
        before = entry.sampled_gradient.clone(), entry.inputs.clone()
        close(entry.scores(d[layer.name]), expected)
        assert torch.equal(entry.sampled_gradient, before[0]) and torch.equal(entry.inputs, before[1])
        scores.append(expected)
    S = torch.stack(scores)
    expected = S @ S.T / shape[0]
    for index, layer in enumerate(layers):
        if layer.adapter is None:  # the documented substitute: the form (a') of that layer
            slope = flat(statistics[layer.name].sampled_parameter_gradients) @ flat(d[layer.name])
            expected[index, index] = shape[0] * slope**2
    found = SampledScores().measure(evidence_of(layers, d, statistics))
    close(found, expected)
    slopes = torch.stack([flat(statistics[k.name].sampled_parameter_gradients) @ flat(d[k.name]) for k in layers])
    batch = SampledBatchScores().measure(evidence_of(layers, d, statistics))
    close(batch, shape[0] * torch.outer(slopes, slopes))
    assert torch.linalg.eigvalsh(found)[0] > -1e-12 and torch.linalg.eigvalsh(batch)[0] > -1e-10


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight"])
@pytest.mark.parametrize("net", ["dense", "conv"])
def test_scores_with_a_frozen_parameter(net: str, frozen: str) -> None:
    make, shape = NETS[net]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    if net == "conv" and frozen == "2.weight":
        frozen = "3.weight"
    model.get_parameter(frozen).requires_grad_(False)
    statistics = measure(model, [x], Record.SAMPLED | Record.INPUTS, likelihood=Gaussian())
    for layer in discover_layers(model):
        entry, d = statistics[layer.name], random_directions([layer])[layer.name]
        per_sample = entry.per_sample_gradients(entry.sampled_rows())
        close(entry.scores(d), sum(g.flatten(1) @ v.flatten() for g, v in zip(per_sample, d, strict=True)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))


def test_scores_of_a_module_called_twice_over_two_micro_batches() -> None:
    model, x = Twice().double(), torch.randn(6, 3, dtype=torch.float64)
    layers = discover_layers(model)
    d = random_directions(layers)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    record = Record.SAMPLED | Record.INPUTS
    targets = FixedTargets(Categorical(), labels[:4], labels[4:])
    statistics = measure(model, [x[:4], x[4:]], record, likelihood=targets)
    for i in range(6):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), labels[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for layer, own in zip(layers, (gradients[:2], gradients[2:]), strict=True):
            expected = flat(own) @ flat(d[layer.name])
            close(statistics[layer.name].scores(d[layer.name])[i], expected)
    assert SampledScores().measure(evidence_of(layers, d, statistics)).shape == (2, 2)


def test_forms_of_a_model_without_any_supported_layer() -> None:
    model, x = nn.Sequential(nn.PReLU(3), nn.PReLU(3)).double(), torch.randn(5, 3, dtype=torch.float64)
    statistics = measure(model, [x], Record.SAMPLED_PARAMETERS, likelihood=Gaussian())
    layers = discover_layers(model)
    d = random_directions(layers)
    expected = SampledBatchScores().measure(evidence_of(layers, d, statistics)).diagonal()
    close(SampledScores().measure(evidence_of(layers, d, statistics)), torch.diag(expected))


def test_a_layer_without_statistics_has_no_form() -> None:
    model, x = NETS["dense"][0]().double(), torch.randn(5, 3, dtype=torch.float64)
    capture = capture_of(model, Record.SAMPLED | Record.INPUTS | Record.SAMPLED_PARAMETERS, likelihood=Gaussian())
    half_squares(model(x)).backward()
    statistics = capture.collect()
    del statistics["2"]
    layers = discover_layers(model)
    evidence = evidence_of(layers, random_directions(layers), statistics)
    for form in (SampledScores(), SampledBatchScores()):
        matrix = form.measure(evidence)
        assert not matrix[1].any() and not matrix[:, 1].any() and (matrix.diagonal()[[0, 2]] > 0).all()
