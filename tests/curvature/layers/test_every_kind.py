"""Every kind of layer: its records give its gradient, sample by sample, and its matrix is a view of its parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measuring import close, half_squares, measure, products
from osculate import ArgumentError, OsculateError
from osculate.curvature import Gaussian, Layer, Record, discover_layers
from osculate.curvature.layers.adapters import ADAPTERS, KINDS, ONE_HOT_LIMIT
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

Make = Callable[[], nn.Module]
MATRICES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear on sequences": (lambda: nn.Linear(4, 3), (5, 6, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (4, 2, 7)),
    "conv1d, all at once": (lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, 2, bias=False), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (4, 2, 5, 5)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, (2, 3), (2, 1), (1, 2), (1, 2), groups=2), (3, 4, 6, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3, bias=False), (4, 3, 4, 4)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), (4, 2, 5, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (4, 2, 5, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (4, 2, 4, 5)),
    "conv2d, same and reflected": (
        lambda: nn.Conv2d(2, 4, 4, padding="same", padding_mode="reflect", groups=2),
        (3, 2, 5, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 1, 2)), (3, 2, 3, 2, 4)),
    "conv3d, all at once": (lambda: nn.Conv3d(4, 4, 2, (1, 2, 1), (1, 0, 2), (2, 1, 1), 2), (2, 4, 3, 4, 2)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, 2), (4, 2, 5)),
    "transposed 1d, padding beyond reach": (lambda: nn.ConvTranspose1d(2, 3, 2, 2, padding=2), (4, 2, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), (2, 3), (1, 0), (1, 2), bias=False), (3, 2, 3, 4)),
    "transposed 2d, dilated": (lambda: nn.ConvTranspose2d(3, 2, 3, 2, 1, 1, dilation=2), (3, 3, 3, 3)),
    "transposed 2d, depthwise": (lambda: nn.ConvTranspose2d(3, 6, 2, 2, groups=3), (3, 3, 2, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, (1, 2, 1)), (2, 2, 2, 2, 3)),
}
INDICES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "embedding": (lambda: nn.Embedding(7, 3), (5,)),
    "embedding of sequences": (lambda: nn.Embedding(7, 3), (5, 4)),
    "embedding of grids": (lambda: nn.Embedding(7, 3), (5, 2, 3)),
    "embedding with padding": (lambda: nn.Embedding(7, 3, padding_idx=2), (9, 4)),
}
TENSORS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "transposed 2d, grouped": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), (2, 1), groups=2), (3, 4, 3, 2)),
    "layer norm": (lambda: nn.LayerNorm(4), (5, 4)),
    "layer norm of sequences": (lambda: nn.LayerNorm(4, bias=False), (5, 3, 4)),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 4)), (5, 2, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (5, 4, 3)),
    "group norm of images": (lambda: nn.GroupNorm(3, 6), (2, 6, 3, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    "instance norm, frozen averages": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(),
        (4, 3, 5, 2),
    ),
    "rms norm": (lambda: nn.RMSNorm(4), (5, 3, 4)),
    "rms norm, epsilon": (lambda: nn.RMSNorm((3, 4), eps=0.1), (5, 3, 4)),
    "large embedding": (lambda: nn.Embedding(ONE_HOT_LIMIT + 1, 2), (3, 4)),
    "batch norm, frozen averages": (lambda: nn.BatchNorm1d(3).eval(), (4, 3)),
}
EVERYTHING = MATRICES | INDICES | TENSORS


def made(name: str, samples: int | None = None) -> tuple[nn.Module, Tensor]:
    """The module with random parameters, and a batch for it."""
    make, shape = EVERYTHING[name]
    torch.manual_seed(1)
    model = make().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    shape = shape if samples is None else (samples, *shape[1:])
    if isinstance(model, nn.Embedding):
        return model, torch.randint(0, min(model.num_embeddings, 9), shape)
    return model, torch.randn(shape, dtype=torch.float64)


def gradients_by_vmap(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Per-sample gradients of ``half_squares`` by torch.func, per trainable parameter."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return half_squares(torch.func.functional_call(model, values, (sample.unsqueeze(0),)))

    return list(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values())


def layer_of(module: nn.Module) -> Layer:
    (layer,) = discover_layers(module)
    return layer


def test_the_table_has_every_kind() -> None:
    tried = {layer_of(make()).kind for make, _ in EVERYTHING.values()}
    assert tried == set(KINDS) - {"Attention", "Other"}
    assert {adapter.kind for adapter in ADAPTERS} == tried


@pytest.mark.parametrize("name", MATRICES | INDICES)
def test_products_of_records_are_the_gradient(name: str) -> None:
    model, x = made(name)
    (entry,) = measure(model, [x]).values()
    assert entry.layer.is_matrix and (entry.samples, entry.gradient_scale) == (len(x), float(len(x)))
    for value, gradient in zip(products(entry), entry.gradients, strict=True):
        close(value, gradient)
    rows = entry.input_rows()
    assert rows.shape == (entry.samples * entry.positions * entry.layer.groups, entry.layer.weight_shape[1])


@pytest.mark.parametrize("name", EVERYTHING)
def test_per_sample_gradients_equal_those_of_torch_func(name: str) -> None:
    model, x = made(name)
    (entry,) = measure(model, [x]).values()
    found = entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
    for value, expected in zip(found, gradients_by_vmap(model, x), strict=True):
        close(value, expected)


@pytest.mark.parametrize("name", EVERYTHING)
def test_scores_are_inner_products_with_per_sample_gradients(name: str) -> None:
    model, x = made(name)
    (entry,) = measure(model, [x], Record.INPUTS | Record.SAMPLED, likelihood=Gaussian()).values()
    directions = tuple(torch.randn_like(parameter) for parameter in model.parameters())
    single = entry.per_sample_gradients(entry.sampled_rows())
    expected = sum((value * along).flatten(1).sum(1) for value, along in zip(single, directions, strict=True))
    close(entry.scores(directions), expected)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_missing_direction_counts_as_zero(name: str, frozen: str) -> None:
    model, x = made(name)
    if getattr(model, "bias", None) is None:
        return
    getattr(model, frozen).requires_grad_(False)
    (entry,) = measure(model, [x], Record.INPUTS | Record.SAMPLED | Record.GRADIENTS, likelihood=Gaussian()).values()
    (left,) = entry.layer.parameters.values()
    (single,) = entry.per_sample_gradients(entry.sampled_rows())
    direction = torch.randn_like(left)
    close(entry.scores((direction,)), (single * direction).flatten(1).sum(1))
    (loss,) = entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
    close(loss.mean(0), entry.gradients[0])


@pytest.mark.parametrize("name", MATRICES | INDICES)
def test_the_matrix_maps_inputs_to_outputs(name: str) -> None:
    """h = [W | b] (a, 1) at every position, each row with the inputs of its own group."""
    model, x = made(name)
    (entry,) = measure(model, [x]).values()
    layer, rows = entry.layer, entry.input_rows()
    matrix = layer.joint_matrix([parameter.detach() for parameter in layer.parameters.values()])
    assert matrix.shape == layer.matrix_shape
    if layer.has_bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    blocks = matrix.chunk(layer.groups)
    found = torch.cat([rows[index :: layer.groups] @ block.T for index, block in enumerate(blocks)], 1)
    output = model(x).detach()
    if getattr(model, "padding_idx", None) is not None:
        output[x == model.padding_idx] = 0.0  # a padded position has no input
    close(found, entry.expand(output).flatten(0, 1))


@pytest.mark.parametrize("name", MATRICES | INDICES)
@pytest.mark.parametrize("lead", [(), (4,)])
def test_matrices_and_parameters_are_two_views_of_one_memory(name: str, lead: tuple[int, ...]) -> None:
    layer = layer_of(made(name)[0])
    storage = torch.randn(*lead, *layer.matrix_shape, dtype=torch.float64)
    views = layer.parameter_views(storage)
    for view, parameter in zip(views, layer.parameters.values(), strict=True):
        assert view.shape == (*lead, *parameter.shape)
        assert view.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
    close(layer.joint_matrix(views), storage)
    back = layer.parameter_views(layer.joint_matrix(views))
    assert all(torch.equal(one, other) for one, other in zip(back, views, strict=True))
    if not lead:
        places = layer.entries()
        close(storage.flatten()[places], torch.cat([view.flatten() for view in views]))
        assert sorted(places.tolist()) == list(range(storage.numel()))


@pytest.mark.parametrize("name", EVERYTHING)
def test_micro_batches_are_one_batch(name: str) -> None:
    model, x = made(name, samples=6)
    (whole,) = measure(model, [x]).values()
    (pieces,) = measure(model, x.split(2), loss=lambda out: half_squares(out) / 3).values()
    rows = [entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1)) for entry in (whole, pieces)]
    for one, other in zip(*rows, strict=True):
        close(one, other)


@pytest.mark.parametrize("name", EVERYTHING)
def test_records_do_not_touch_the_module(name: str) -> None:
    model, x = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    model.load_state_dict(before)
    measure(model, [x], Record.INPUTS | Record.GRADIENTS | Record.MEANS)
    model.load_state_dict({**model.state_dict()})
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "running" not in key and "num_" not in key)
    model.load_state_dict(before)
    assert torch.equal(model(x), expected)


def test_sparse_embeddings_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    with pytest.raises(ArgumentError, match="sparse=True"):
        discover_layers(model)
    model[0].requires_grad_(False)
    assert [layer.name for layer in discover_layers(model)] == ["1"]


def test_a_large_table_is_no_matrix() -> None:
    model, x = made("large embedding")
    layer = layer_of(model)
    assert layer.kind == "Embedding" and not layer.is_matrix
    (entry,) = measure(model, [x]).values()
    with pytest.raises(OsculateError, match=str(ONE_HOT_LIMIT)):
        entry.input_rows()


def test_normalisations_have_no_matrix() -> None:
    layer = layer_of(nn.LayerNorm(3))
    assert not layer.is_matrix
    with pytest.raises(OsculateError, match="LayerNorm is not a matrix"):
        layer.joint_matrix([torch.ones(3), torch.ones(3)])


def test_what_is_not_initialised_is_refused() -> None:
    with pytest.raises(ArgumentError, match="run the model once"):
        discover_layers(nn.Sequential(nn.LazyLinear(3)))
