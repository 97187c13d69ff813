"""The exact Gauss-Newton matrix and the Hessian block, against enumeration, autograd and each other."""

import itertools
from dataclasses import replace

import osculate as osc
import pytest
import torch
from backend_nets import NETS, SEEN, WantsMatrix, record
from measuring import FixedTargets, close
from osculate.curvature import Categorical, ExactGGN, ExactHessianBlock, Gaussian, Needs, Record, SampledFisher
from osculate.curvature.products import GraphKeepingBackward, hessian_block
from torch import Tensor, nn
from torch.func import functional_call

GGN = ExactGGN()


def matrices(model: nn.Module, x: Tensor, backend: str, likelihood: object = None) -> dict[str, Tensor]:
    """The exact Gauss-Newton matrix of every layer."""
    wanted = GGN.records(Needs.MATRIX | Needs.ROOTS)
    entries = record(backend, model, [x], likelihood=likelihood or Categorical(), wanted=wanted)
    return {name: GGN.fill(entry).matrix() for name, entry in entries.items()}


def dense_hessian(model: nn.Module, layer: osc.Layer, loss: object) -> Tensor:
    """The Hessian over one layer's parameters by torch.func, as one matrix."""
    names = {id(value): name for name, value in model.named_parameters()}
    own = [names[id(value)] for value in layer.parameters.values()]
    sizes = [value.numel() for value in layer.parameters.values()]
    shapes = [value.shape for value in layer.parameters.values()]

    def function(vector: Tensor) -> Tensor:
        pieces = [piece.reshape(shape) for piece, shape in zip(vector.split(sizes), shapes, strict=True)]
        return loss(lambda *args: functional_call(model, dict(zip(own, pieces, strict=True)), args))  # type: ignore[operator]

    start = torch.cat([value.detach().flatten() for value in layer.parameters.values()])
    return torch.func.jacrev(torch.func.jacrev(function))(start)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=lambda part: part.name)
def test_backends_agree_on_the_exact_matrix(net: str, likelihood: object) -> None:
    make, shape = NETS[net]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    one, other = (matrices(model, x, backend, likelihood) for backend in ("hooks", "func"))
    for name, matrix in one.items():
        close(other[name], matrix)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_it_is_the_expectation_of_the_sampled_fisher() -> None:
    """All strings of labels of three samples, each with its probability."""
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(3, 2).double()
    probability = model(x).softmax(-1).detach()
    expected: dict[str, Tensor] = {}
    for labels in itertools.product(range(3), repeat=3):
        weight = torch.stack([probability[n, label] for n, label in enumerate(labels)]).prod()
        likelihood = FixedTargets(Categorical(), torch.tensor(labels))
        wanted = SampledFisher().records(Needs.MATRIX)
        for name, entry in record("hooks", model, [x], likelihood=likelihood, wanted=wanted).items():
            expected[name] = expected.get(name, 0.0) + weight * SampledFisher().fill(entry).matrix()
    for name, matrix in matrices(model, x, "hooks").items():
        close(matrix, expected[name])


@pytest.mark.parametrize("backend", ["hooks", "func"])
def test_roots_vectors_matrix_and_factors_speak_of_the_same_matrix(backend: str) -> None:
    """One sample and one position: the Gauss-Newton matrix is a Kronecker product, and KFLR is exact."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(1, 3).double()
    entries = record(backend, model, [x], wanted=GGN.records(Needs.MATRIX | Needs.ROOTS | Needs.INPUTS))
    for entry in entries.values():
        filled = GGN.fill(entry)
        inputs, outputs = filled.kronecker_factors()
        rows, columns = filled.layer.matrix_shape
        joint = torch.kron(outputs, inputs).reshape(rows, columns, rows, columns)
        order = [(i, j) for i in range(rows) for j in range(columns - 1)] + [(i, columns - 1) for i in range(rows)]
        expected = torch.stack([torch.stack([joint[i, j, k, m] for k, m in order]) for i, j in order])
        close(filled.matrix(), expected)
        close(torch.cat([value.flatten() for value in filled.diagonal()]), expected.diagonal())
        without = replace(filled, vectors=None)
        close(torch.cat([value.flatten() for value in without.diagonal()]), expected.diagonal())


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=lambda part: part.name)
def test_it_is_the_hessian_block_of_a_piecewise_linear_net(likelihood: object) -> None:
    """Within a layer the output is linear, so the second term of the Hessian vanishes."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x, labels = torch.randn(6, 3).double(), torch.randint(0, 3, (6,))
    targets = labels if likelihood.name == "categorical" else torch.randn(6, 3).double()
    for name, matrix in matrices(model, x, "hooks", likelihood).items():
        layer = next(layer for layer in osc.discover_layers(model) if layer.name == name)
        close(matrix, dense_hessian(model, layer, lambda f: likelihood.negative_log_likelihood(f(x), targets) / 6))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("call", ["method", "function", "vector"])
def test_hessian_blocks_reach_the_structure(reduction: str, call: str) -> None:
    """Through the optimizer, however the closure calls backward; scaled as the mean loss."""
    SEEN.clear()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.randint(0, 2, (5,))
    method = osc.Method(WantsMatrix(takes_indefinite=True), ExactHessianBlock(), defaults={"damping": 0.1})
    optimizer = osc.build(method, model, lr=0.0, loss_reduction=reduction)
    assert optimizer.needs_closure

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        loss = losses.sum() if reduction == "sum" else losses.mean()
        if call == "method":
            loss.backward()
        elif call == "function":
            torch.autograd.backward(loss)
        else:
            losses.backward(gradient=torch.ones(5).double() / (5 if reduction == "mean" else 1))
        return loss

    with pytest.raises(osc.ClosureRequiredError):
        optimizer.step()
    optimizer.step(closure)
    found = list(SEEN)
    layers = osc.discover_layers(model)
    assert len(found) == len(layers)
    for layer, matrix in zip(layers, found, strict=True):
        close(matrix, dense_hessian(model, layer, lambda f: nn.functional.cross_entropy(f(x), y)))
        close(matrix, matrix.T, 0.0)
    assert torch.linalg.eigvalsh(found[0]).min() < 0, "the test needs an indefinite block"


def test_a_block_of_a_loss_that_is_linear_is_zero_and_frozen_parameters_stay_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    layers = osc.discover_layers(model)
    model[2].bias.requires_grad_(False)
    products = GraphKeepingBackward(layers)
    with products:
        model(torch.randn(4, 3).double()).sum().backward()
    assert hessian_block(products, layers[0]).abs().max() > 0
    close(hessian_block(products, layers[1]), torch.zeros(3, 3, dtype=torch.float64))
    assert model[2].bias.grad is None


def test_the_records_of_the_exact_estimators() -> None:
    assert GGN.records(Needs.ROOTS) == Record.CURVATURE_ROOTS
    assert ExactHessianBlock().records(Needs.MATRIX) == Record.COUNT
    assert not ExactHessianBlock().definite and GGN.definite
    with pytest.raises(osc.CompatibilityError, match="ExactHessianBlock"):
        osc.Method(osc.MiniBlock(osc.PerOutput()), ExactHessianBlock(), defaults={"damping": 0.1})
