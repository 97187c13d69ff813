"""Sampled labels: the gradients belong to the labels drawn, and the draw depends on (seed, step, pass) only."""

import pytest
import torch
from measuring import FixedTargets, capture_of, close, half_squares, measure
from osculate.curvature import Bernoulli, Categorical, Gaussian, Likelihood, Record
from torch import Tensor, nn

LIKELIHOODS: dict[str, tuple[Likelihood, Tensor]] = {
    "categorical": (Categorical(), torch.tensor([2, 0, 1, 1, 2, 0])),
    "bernoulli": (Bernoulli(), (torch.arange(18).reshape(6, 3) % 2).double()),
    "gaussian": (Gaussian(), torch.linspace(-2, 2, 18, dtype=torch.float64).reshape(6, 3)),
}
NETS = {
    "dense": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    ),
    "sequences": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6, 3)
    ),
    "other": lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3)),
    "normalised": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval(),
}


def autograd(model: nn.Module, x: Tensor, likelihood: Likelihood, targets: Tensor) -> dict[str, list[Tensor]]:
    """Per layer the gradient of the mean sampled loss for each parameter."""
    parameters = dict(model.named_parameters())
    loss = likelihood.negative_log_likelihood(model(x), targets) / len(x)
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    result: dict[str, list[Tensor]] = {}
    for name, value in gradients.items():
        result.setdefault(name.rpartition(".")[0], []).append(value)
    return result


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("split", [6, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sampled_gradients_belong_to_the_labels(net: str, name: str, split: int, reduction: str) -> None:
    model, x = NETS[net]().double(), torch.randn(6, 4, dtype=torch.float64)
    base, targets = LIKELIHOODS[name]
    expected = autograd(model, x, base, targets)
    likelihood = FixedTargets(base, *targets.split(split))
    record = Record.SAMPLED | Record.INPUTS | Record.SAMPLED_PARAMETERS
    statistics = measure(model, x.split(split), record, likelihood=likelihood, reduction=reduction)
    assert statistics.keys() == expected.keys()
    for layer, entry in statistics.items():
        assert entry.samples == 6
        for value, gradient in zip(entry.sampled_parameter_gradients, expected[layer], strict=True):
            close(value, gradient)
        if entry.layer.adapter is None:
            assert entry.sampled_gradient is None
            continue
        for value, gradient in zip(entry.per_sample_gradients(entry.sampled_rows()), expected[layer], strict=True):
            close(value.mean(0), gradient)  # scale 1: the loss of one sample, whatever the user's reduction


def draws(seed: int, step: int, passes: int = 1, idle: int = 0, position: int = -1, noise: int = 0) -> Tensor:
    """Sampled gradients at the output, for a fixed model and input."""
    generator = torch.Generator().manual_seed(5)
    model, x = nn.Linear(4, 3).double(), torch.randn(64, 4, generator=generator, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    torch.manual_seed(noise)
    capture = capture_of(model, Record.SAMPLED, likelihood=Categorical(), seed=seed)
    capture.step = step
    for _ in range(idle):
        model(x)
    for _ in range(passes):
        half_squares(model(x)).backward()
    (entry,) = capture.collect().values()
    return entry.sampled_rows().split(64)[position]


def test_labels_depend_on_seed_step_and_pass_only() -> None:
    reference = draws(1, 4)
    assert torch.equal(draws(1, 4), reference)
    assert torch.equal(draws(1, 4, noise=11), reference)  # not on torch's own generator
    assert torch.equal(draws(1, 4, idle=3), reference)  # not on passes without a gradient
    assert torch.equal(draws(1, 4, passes=3, position=0), reference)
    others = [draws(2, 4), draws(1, 5), draws(1, 4, passes=2), draws(1, 4, passes=3)]
    assert all(not torch.equal(value, reference) for value in others)
    assert not torch.equal(others[2], others[3])


def test_the_global_generator_is_not_used() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    torch.manual_seed(0)
    x = torch.ones(5, 4, dtype=torch.float64)
    measure(model, [x], Record.SAMPLED, likelihood=Gaussian())
    assert torch.equal(torch.rand(4), expected)


def test_a_frozen_parameter_has_no_sampled_gradient() -> None:
    model, x = NETS["dense"]().double(), torch.randn(6, 4, dtype=torch.float64)
    base, targets = LIKELIHOODS["categorical"]
    expected = autograd(model, x, base, targets)
    model[2].weight.requires_grad_(False)
    record = Record.SAMPLED_PARAMETERS | Record.SAMPLED | Record.INPUTS
    statistics = measure(model, [x], record, likelihood=FixedTargets(base, targets))
    (bias,) = statistics["2"].sampled_parameter_gradients
    close(bias, expected["2"][1])
    close(statistics["0"].sampled_parameter_gradients[0], expected["0"][0])


def test_an_unused_layer_has_no_sampled_gradients() -> None:
    """Zeros would be a guess: a layer inside a reentrant checkpoint is not in the graph either, and is used."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused().double()
    capture = capture_of(model, Record.SAMPLED_PARAMETERS, likelihood=Gaussian())
    half_squares(model(torch.randn(5, 4, dtype=torch.float64))).backward()
    statistics = capture.collect()
    assert statistics["used"].sampled_parameter_gradients[0].abs().sum() > 0
    assert "idle" not in statistics
