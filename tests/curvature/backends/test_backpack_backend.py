"""BackPACK fills the same record, and its own quantities equal what the other backends give."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import osculate as osc
import pytest
import torch
from backend_nets import EVERYTHING, FIELDS, NETS, Recurrent, Twice, record, vectors_of
from func_products import ggn_block, ggn_product, hessian_dense_block, hessian_product
from measuring import close, half_squares
from osculate.curvature import Bernoulli, Categorical, ExactGGN, Gaussian, LayerStatistics, Likelihood, Record
from osculate.curvature import SampledFisher as Sampled
from osculate.curvature.backends.structural_copy import structural_copy
from osculate.curvature.backends.table import make_backend
from torch import Tensor, nn

KNOWN = [name for name in NETS if name != "twice"]
ROWS = [name for name in FIELDS if not name.startswith("mean_")]


@pytest.mark.parametrize("net", KNOWN)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda part: part.name)
def test_the_record_equals_that_of_the_other_backends(net: str, passes: int, likelihood: Likelihood) -> None:
    make, shape = NETS[net]
    model = make().double()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(passes)]
    found = {name: record(name, model, batches, likelihood=likelihood) for name in ("hooks", "func", "backpack")}
    for name, entry in found["hooks"].items():
        for other in (found["func"][name], found["backpack"][name]):
            for field in ROWS:
                close(getattr(other, field), getattr(entry, field))
            values = [*vectors_of(other), *other.sampled_parameter_gradients]
            for value, expected in zip(values, [*vectors_of(entry), *entry.sampled_parameter_gradients], strict=True):
                close(value, expected)
        assert found["backpack"][name].sample_gradients.roots is not None


def asked(model: nn.Module, x: Tensor, quantities: tuple[str, ...], reduction: str, likelihood: Likelihood) -> Any:
    """One record of the backend with BackPACK's own quantities."""
    layers = osc.discover_layers(model)
    backend = make_backend("backpack", model, layers, likelihood, reduction, 3)
    backend.step = 7
    backend.quantities = quantities  # type: ignore[attr-defined]
    backend.arm({layer.name: EVERYTHING for layer in layers})
    loss_of(likelihood, model(x), x, reduction).backward()
    found = backend.collect()
    backend.close()
    return found


def loss_of(likelihood: Likelihood, output: Tensor, x: Tensor, reduction: str) -> Tensor:
    """A loss with fixed targets whose output curvature is the likelihood's."""
    pattern = torch.linspace(0, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    target = torch.arange(len(x)) % output.shape[1] if likelihood.name == "categorical" else pattern.round()
    total = likelihood.negative_log_likelihood(output, target)
    return total / len(x) if reduction == "mean" else total


SMOOTH: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), (5, 4)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), (5, 1, 4, 4)),
}


@pytest.mark.parametrize("net", SMOOTH)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda part: part.name)
def test_its_own_quantities_are_those_of_the_record(net: str, reduction: str, likelihood: Likelihood) -> None:
    make, shape = SMOOTH[net]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    names = ("batch_l2", "diag_ggn", "diag_ggn_mc", "diag_h")
    found = asked(model, x, names, reduction, likelihood)
    settings = {
        "likelihood": likelihood,
        "reduction": reduction,
        "loss": lambda o: loss_of(likelihood, o, x, reduction),
    }
    others = {name: record(name, model, [x], **settings) for name in ("hooks", "func")}
    for layer in osc.discover_layers(model):
        block = hessian_dense_block(model, layer, (x,), lambda out: loss_of(likelihood, out, x, "mean"))
        hessian = replace(others["hooks"][layer.name], matrix=lambda block=block: block).diagonal()
        for entry in (others["hooks"][layer.name], others["func"][layer.name]):
            expected = {
                "batch_l2": entry.squared_gradient_norms(),
                "diag_ggn": ExactGGN().fill(entry).diagonal(),
                "diag_ggn_mc": Sampled().fill(entry).diagonal(),
                "diag_h": hessian,
            }
            for name in names:
                for value, other in zip(found[layer.name].extensions[name], expected[name], strict=True):
                    close(value, other)


@pytest.mark.parametrize("net", SMOOTH)
def test_its_kronecker_factors(net: str) -> None:
    """KFLR and KFAC. For a convolution BackPACK's output factor is the curvature of the bias: it sums positions."""
    make, shape = SMOOTH[net]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    found = asked(model, x, ("kflr", "kfac"), "mean", Categorical())
    hooks = record("hooks", model, [x], loss=lambda out: loss_of(Categorical(), out, x, "mean"))
    for name, entry in hooks.items():
        for quantity, estimator in (("kflr", ExactGGN()), ("kfac", Sampled())):
            filled = estimator.fill(entry)
            inputs, outputs = filled.kronecker_factors()
            (output_factor, input_factor), (bias_factor,) = found[name].extensions[quantity]
            close(input_factor, inputs[:-1, :-1])
            size = outputs.shape[0]
            close(bias_factor, filled.matrix()[-size:, -size:])
            close(output_factor, outputs if entry.positions == 1 else bias_factor)


def test_kfra_is_the_recursion_of_its_paper() -> None:
    """arXiv:1706.03662v2, equation 19: averages of the curvature go back through the net, layer by layer."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    found = asked(model, x, ("kfra",), "mean", Categorical())
    values = [x]
    for module in model:
        values.append(module(values[-1]))
    probability = values[-1].softmax(1)
    curvature = torch.diag(probability.mean(0)) - probability.T @ probability / 6
    for index in (4, 2, 0):
        weight = found[str(index)].extensions["kfra"][0]
        close(weight[0], curvature)
        close(weight[1], values[index].T @ values[index] / 6)
        curvature = model[index].weight.T @ curvature @ model[index].weight
        if index:
            value = values[index]
            slope = value * (1 - value) if isinstance(model[index - 1], nn.Sigmoid) else 1 - value**2
            curvature = curvature * (slope.T @ slope / 6)


def test_nothing_of_backpack_stays_on_the_model() -> None:
    from backpack.context import CTX

    make, shape = NETS["mlp"]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    before, handles = copy.deepcopy(model.state_dict()), len(CTX.hook_handles)
    entries = asked(model, x, ("diag_ggn", "kflr"), "mean", Categorical())
    assert len(CTX.hook_handles) == handles and entries
    for module in model.modules():
        assert not module._forward_hooks and not module._backward_hooks and not hasattr(module, "_backpack_extend")
    for name, parameter in model.named_parameters():
        assert vars(parameter) == {} and torch.equal(before[name], parameter)
        (expected,) = torch.autograd.grad(loss_of(Categorical(), model(x), x, "mean"), parameter)
        close(parameter.grad, expected)
    assert "torchvision" not in sys.modules


def test_a_structural_copy_shares_memory_but_no_modules() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(inplace=True), shared, nn.BatchNorm1d(3)).eval()
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    model[0].weight.requires_grad_(False)
    twin, modules = structural_copy(model)
    x = torch.randn(4, 3)
    assert torch.equal(twin(x), model(x))
    assert twin[0] is twin[2] is modules[id(shared)] is not shared
    assert twin[0].weight is not shared.weight and twin[0].weight.data_ptr() == shared.weight.data_ptr()
    assert not twin[0].weight.requires_grad and twin[0].bias.requires_grad
    assert twin[3].running_mean.data_ptr() != model[3].running_mean.data_ptr()
    assert model[1].inplace and not twin[1].inplace


@pytest.mark.parametrize(
    ("make", "shape", "word"),
    [
        (Twice, (5, 4), "each called once"),
        (Recurrent, (4, 3, 3), "Recurrent"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), (5, 4), "LayerNorm"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.GELU()), (5, 4), "GELU"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (5, 4), "couples its samples"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(make: Callable, shape: tuple[int, ...], word: str) -> None:
    model = make().double()
    with pytest.raises(osc.CompatibilityError, match=rf"backend='backpack' cannot measure.*{word}.*backend='hooks'"):
        record("backpack", model, [torch.randn(shape, dtype=torch.float64)])


def test_secant_pairs_and_unknown_quantities_are_refused() -> None:
    with pytest.raises(osc.CompatibilityError, match=r"MEANS.*secant pairs"):
        osc.build("kbfgs", nn.Linear(3, 2), backend="backpack")
    with pytest.raises(osc.UnknownNameError, match="diag_ggn"):
        asked(nn.Linear(4, 3).double(), torch.randn(5, 4).double(), ("diag_gnn",), "mean", Categorical())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from osculate.curvature.backends import backpack_tools

    backpack_tools.tools.cache_clear()
    monkeypatch.setitem(sys.modules, "backpack", None)
    with pytest.raises(osc.ArgumentError, match="pip install backpack-for-pytorch"):
        osc.build("kfac", nn.Linear(3, 2), likelihood="gaussian", backend="backpack")
    backpack_tools.tools.cache_clear()


def entry_scores(entry: LayerStatistics, direction: tuple[Tensor, ...]) -> Tensor:
    """Inner products of every root's whole gradient with a direction, (V*N,)."""
    pairs = zip(entry.root_vectors(), direction, strict=True)
    return torch.stack([(rows * value).flatten(1).sum(1) for rows, value in pairs]).sum(0)


@pytest.mark.parametrize("net", ["mlp", "cnn", "twice"])
def test_products_and_blocks_by_torch_func(net: str) -> None:
    """Against the estimators' matrices, and against each other."""
    make, shape = NETS[net]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    layers = osc.discover_layers(model)
    wanted = Record.INPUTS | Record.CURVATURE_ROOTS
    entries: dict[str, LayerStatistics] = record("hooks", model, [x], wanted=wanted)
    for layer in layers:
        block = ggn_block(model, layer, (x,), Categorical())
        close(block, ExactGGN().fill(entries[layer.name]).matrix())
    directions = {layer.name: tuple(torch.randn_like(p) for p in layer.parameters.values()) for layer in layers}
    parameters = [p for layer in layers for p in layer.parameters.values()]
    vector = [value for layer in layers for value in directions[layer.name]]
    slopes = torch.autograd.grad(half_squares(model(x)), parameters, create_graph=True)
    expected = torch.autograd.grad(slopes, parameters, vector, materialize_grads=True)
    found = hessian_product(model, layers, (x,), half_squares, directions)
    for value, other in zip([v for layer in layers for v in found[layer.name]], expected, strict=True):
        close(value, other)
    joint = ggn_product(model, layers, (x,), Categorical(), directions)
    along = torch.cat([value.flatten() for layer in layers for value in joint[layer.name]])
    scores = sum(entry_scores(entries[layer.name], directions[layer.name]) for layer in layers)
    close(along @ torch.cat([value.flatten() for value in vector]), scores.square().sum() / len(x))
