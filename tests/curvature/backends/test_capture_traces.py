"""What must leave no trace in the statistics, and what must not be left behind in the model."""

import gc
import weakref

import pytest
import torch
from measuring import capture_of, close, half_squares, measure
from osculate import ArgumentError
from osculate.curvature import Capture, Categorical, Gaussian, LayerStatistics, Record, discover_layers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EVERYTHING = Record.INPUTS | Record.GRADIENTS | Record.MEANS | Record.SAMPLED | Record.SAMPLED_PARAMETERS


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def same(left: dict[str, LayerStatistics], right: dict[str, LayerStatistics]) -> None:
    assert left.keys() == right.keys()
    for name, entry in left.items():
        other = right[name]
        assert (entry.samples, entry.positions, entry.gradient_scale) == (
            other.samples,
            other.positions,
            other.gradient_scale,
        )
        for field in ("inputs", "output_gradient", "sampled_gradient", "mean_preactivation", "mean_gradient"):
            assert torch.equal(getattr(entry, field), getattr(other, field)), (name, field)
        for value, expected in zip(entry.sampled_parameter_gradients, other.sampled_parameter_gradients, strict=True):
            assert torch.equal(value, expected), name


def idle_passes(model: nn.Module, capture: Capture) -> None:
    """Everything a user may do between two gradients."""
    x = torch.randn(6, 3, dtype=torch.float64)
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    with torch.inference_mode():
        model(x)
    model.train()
    half_squares(model(x))  # a forward without a backward
    model[0](x)  # a layer called outside a pass of the model
    half_squares(model(x)).backward()  # a gradient that is thrown away
    capture.discard_complete()
    model.zero_grad()
    with torch.no_grad():
        for buffer, saved in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(saved)


def gradient(model: nn.Module, x: Tensor) -> None:
    half_squares(model(x)).backward()


def test_idle_passes_before_and_after_leave_no_trace() -> None:
    model, x = net(), torch.randn(5, 3, dtype=torch.float64)
    capture = capture_of(model, EVERYTHING, likelihood=Gaussian())
    gradient(model, x)
    expected = capture.collect()
    assert expected["0"].samples == 5
    model = net()
    capture = capture_of(model, EVERYTHING, likelihood=Gaussian())
    idle_passes(model, capture)
    gradient(model, x)
    half_squares(model(x))
    with torch.no_grad():
        model(x)
    same(capture.collect(), expected)
    assert capture.collect() == {}


@pytest.mark.parametrize("before_forward", [True, False])
def test_clearing_gradients_before_or_after_the_forward(before_forward: bool) -> None:
    """Both orders of the closure convention: zero_grad, forward, backward and forward, zero_grad, backward."""
    model, x = net(), torch.randn(5, 3, dtype=torch.float64)
    capture = capture_of(model, EVERYTHING, likelihood=Gaussian())
    gradient(model, torch.randn(7, 3, dtype=torch.float64))
    if before_forward:
        capture.discard_complete()
        model.zero_grad()
    loss = half_squares(model(x))
    if not before_forward:
        capture.discard_complete()
        model.zero_grad()
    loss.backward()
    statistics = capture.collect()
    assert {entry.samples for entry in statistics.values()} == {5}
    assert torch.equal(statistics["0"].inputs, x)
    weight, bias = statistics["3"].layer.parameters.values()
    close(statistics["3"].gradient_rows().T @ statistics["3"].input_rows(), weight.grad)
    close(statistics["3"].gradient_rows().sum(0), bias.grad)
    assert statistics["3"].sampled_parameter_gradients is not None


def test_only_calls_with_a_gradient_count() -> None:
    """Two micro-batches with an unused forward between them."""
    model, (x, unused, y) = net().eval(), torch.randn(3, 4, 3, dtype=torch.float64)
    capture = capture_of(model, Record.INPUTS | Record.GRADIENTS)
    gradient(model, x)
    kept = model(unused)
    gradient(model, y)
    assert kept.requires_grad
    statistics = capture.collect()
    assert torch.equal(statistics["0"].inputs, torch.cat([x, y])) and statistics["0"].samples == 8


def test_a_branch_without_gradient_is_dropped() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x) + self.idle(x).detach()

    statistics = measure_without_gradients(Branches().double(), torch.randn(4, 3, dtype=torch.float64))
    assert statistics.keys() == {"used"}


def measure_without_gradients(model: nn.Module, x: Tensor) -> dict[str, LayerStatistics]:
    capture = capture_of(model, Record.INPUTS | Record.GRADIENTS)
    gradient(model, x)
    return capture.collect()


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(inplace=True)])
def test_checkpointing_counts_a_sample_once(activation: nn.Module) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    model, x = Checkpointed().double(), torch.randn(5, 3, dtype=torch.float64)
    for entry in measure(model, [x]).values():
        assert entry.samples == 5
        close(entry.gradient_rows().T @ entry.input_rows(), entry.gradients[0])
        close(entry.gradient_rows().sum(0), entry.gradients[1])


def test_hooks_change_neither_outputs_nor_gradients_nor_random_numbers() -> None:
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    results = []
    for hooked in (False, True):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 2)).double()
        capture = capture_of(model, EVERYTHING, likelihood=Gaussian(), seed=3) if hooked else None
        gradient(model, x)
        results.append([*(p.grad for p in model.parameters()), model(x), torch.rand(3)])
        del capture
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unarmed_layers_record_nothing_and_closed_hooks_are_gone() -> None:
    model, x = net(), torch.randn(5, 3, dtype=torch.float64)
    capture = Capture(model, discover_layers(model), None, "mean", 0)
    gradient(model, x)
    assert capture.collect() == {}
    capture.arm({"3": Record.INPUTS, "0": Record.NOTHING})
    gradient(model, x)
    assert capture.collect().keys() == {"3"}
    capture.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    gradient(model, x)
    assert capture.collect() == {}


def test_hooks_do_not_keep_a_capture_alive() -> None:
    model, x = net(), torch.randn(5, 3, dtype=torch.float64)
    capture = capture_of(model, EVERYTHING, likelihood=Gaussian())
    gradient(model, x)
    alive = weakref.ref(capture)
    del capture
    gc.collect()
    assert alive() is None
    gradient(model, x)  # the hooks are idle now


def test_look_back_sees_frozen_layers_without_parameter_gradients() -> None:
    model, x = net(), torch.randn(5, 3, dtype=torch.float64)
    expected = measure(model, [x], Record.MEANS)
    capture = capture_of(model, Record.MEANS, kind="look back")
    model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gradient(model, x)
    found = capture.collect()
    assert found.keys() == expected.keys()
    for name, entry in found.items():
        close(entry.mean_preactivation, expected[name].mean_preactivation)
        close(entry.mean_gradient, expected[name].mean_gradient)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        model(x)
    assert capture.collect() == {}


def test_forward_passes_count_without_gradient_when_asked() -> None:
    model, x = net().eval(), torch.randn(5, 3, dtype=torch.float64)
    capture = capture_of(model, Record.INPUTS, kind="forward")
    with torch.no_grad():
        model(x)
        model(2 * x)
    statistics = capture.collect()
    assert torch.equal(statistics["0"].inputs, torch.cat([x, 2 * x])) and statistics["0"].output_gradient is None


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 2), (3,)), (nn.Conv2d(2, 3, 2), (2, 4, 4)), (nn.BatchNorm1d(3), (3,))]
)
def test_unbatched_samples_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    capture = capture_of(layer.double().eval(), Record.GRADIENTS)
    if isinstance(layer, nn.BatchNorm1d):
        with pytest.raises(ValueError, match="2D or 3D"):  # torch's own check
            layer(torch.randn(shape, dtype=torch.float64))
        return
    with pytest.raises(ArgumentError, match="unbatched"):
        layer(torch.randn(shape, dtype=torch.float64))
    assert capture.collect() == {}


def test_sampling_needs_a_likelihood_and_one_tensor() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    model = nn.Sequential(nn.Linear(3, 2)).double()
    capture = capture_of(model, Record.SAMPLED)
    with pytest.raises(ArgumentError, match="likelihood"):
        model(torch.randn(4, 3, dtype=torch.float64))
    del capture
    pair = Pair(3, 2).double()
    capture = capture_of(pair, Record.SAMPLED, likelihood=Categorical())
    with pytest.raises(ArgumentError, match="tuple"):
        pair(torch.randn(4, 3, dtype=torch.float64))
    assert capture.collect() == {}
