"""Which modules are read as what, and the errors of a record that was not made."""

import pytest
import torch
from measuring import capture_of, half_squares, measure
from osculate import OsculateError
from osculate.curvature import LayerStatistics, Record, discover_layers
from torch import Tensor, nn


class Shifted(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


class Renamed(nn.Linear):
    """A subclass that computes the same."""


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(2, 3), "Linear"),
        (Renamed(2, 3), "Linear"),
        (Shifted(2, 3), "Other"),
        (nn.Conv2d(2, 3, 2), "Conv2d"),
        (nn.Conv2d(2, 4, 2, groups=2), "Conv2d"),
        (nn.Conv2d(2, 3, 2, padding="same"), "Conv2d"),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), "Conv2d"),
        (nn.ConvTranspose2d(2, 3, 2), "ConvTranspose2d"),
        (nn.Conv1d(2, 3, 2), "Conv1d"),
        (nn.BatchNorm1d(3), "BatchNorm"),
        (nn.BatchNorm2d(3), "BatchNorm"),
        (nn.LayerNorm(3), "LayerNorm"),
        (nn.Embedding(4, 3), "Embedding"),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), "Other"),
        (nn.PReLU(), "Other"),
    ],
)
def test_kinds(module: nn.Module, kind: str) -> None:
    (layer,) = discover_layers(module)
    assert (layer.name, layer.kind) == ("(root)", kind)
    assert layer.is_matrix == (kind not in ("BatchNorm", "LayerNorm", "Other"))
    (inside,) = discover_layers(nn.Sequential(nn.Tanh(), module))
    assert (inside.name, inside.kind) == ("1", kind)


def test_shapes_of_matrices() -> None:
    conv, plain, linear = discover_layers(
        nn.Sequential(nn.Conv2d(2, 3, (2, 4)), nn.Conv2d(3, 5, 2, bias=False), nn.Linear(6, 7))
    )
    assert (conv.weight_shape, conv.matrix_shape, conv.has_bias) == ((3, 16), (3, 17), True)
    assert (plain.weight_shape, plain.matrix_shape, plain.has_bias) == ((5, 12), (5, 12), False)
    assert list(linear.parameters) == ["weight", "bias"] and linear.matrix_shape == (7, 7)


def test_layers_without_trainable_parameters_are_no_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3))
    model[3].requires_grad_(False)
    assert [layer.name for layer in discover_layers(model)] == ["0"]


def test_shared_parameters_belong_to_their_first_module_and_have_no_statistics() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.free = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False), nn.Linear(3, 3)
            self.decoder.weight = self.encoder.weight

    layers = {layer.name: layer for layer in discover_layers(Tied())}
    assert layers.keys() == {"encoder", "free"}
    assert layers["encoder"].kind == "Other" and layers["free"].kind == "Linear"
    both = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    both[1].weight = both[0].weight
    assert [(layer.name, layer.kind) for layer in discover_layers(both)] == [("0", "Linear"), ("2", "Linear")]


def test_one_module_under_two_names_is_one_layer() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared).double()
    assert [layer.name for layer in discover_layers(model)] == ["0"]
    (entry,) = measure(model, [torch.randn(4, 3, dtype=torch.float64)]).values()
    assert (entry.samples, entry.positions) == (4, 2)


def test_what_was_not_recorded_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.PReLU(2)).double()
    capture = capture_of(model, Record.MEANS)
    half_squares(model(torch.randn(4, 3, dtype=torch.float64))).backward()
    statistics = capture.collect()
    linear = statistics["0"]
    for attempt, word in (
        (linear.input_rows, "inputs"),
        (linear.mean_input, "inputs"),
        (linear.gradient_rows, "output_gradient"),
        (linear.preactivation_gradients, "output_gradient"),
        (linear.sampled_rows, "sampled_gradient"),
        (lambda: linear.scores((torch.zeros(2, 3), torch.zeros(2))), "inputs"),
        (lambda: linear.per_sample_gradients(torch.zeros(4, 2)), "inputs"),
    ):
        with pytest.raises(OsculateError, match=f"{word} of layer '0' was not recorded"):
            attempt()
    with pytest.raises(OsculateError, match="PReLU"):
        statistics["1"].input_rows()


def test_a_direction_must_have_every_parameter() -> None:
    (entry,) = measure(
        nn.Linear(3, 2).double(), [torch.ones(4, 3, dtype=torch.float64)], Record.INPUTS | Record.GRADIENTS
    ).values()
    assert isinstance(entry, LayerStatistics)
    with pytest.raises(ValueError, match="zip"):
        entry.scores((torch.zeros(2, 3, dtype=torch.float64),))
