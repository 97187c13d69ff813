"""Small models and one-line measurements shared by the tests of the lower floors. Everything is float64."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from osculate.curvature import Capture, Layer, LayerStatistics, Record, discover_layers
from osculate.curvature.likelihoods import Likelihood
from osculate.curvature.records.statistics import Tensors
from osculate.preconditioners import Preconditioner, SideDamping
from osculate.preconditioners.operations import compute_many
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


class FixedTargets:
    """A likelihood whose sampler hands out prepared labels, one entry per pass."""

    def __init__(self, base: Likelihood, *targets: Tensor):
        self.base, self.name, self.left = base, base.name, list(targets)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return self.left.pop(0)

    def negative_log_likelihood(self, output: Tensor, target: Tensor) -> Tensor:
        return self.base.negative_log_likelihood(output, target)

    def curvature_root(self, output: Tensor) -> Tensor:
        return self.base.curvature_root(output)


def half_squares(output: Tensor) -> Tensor:
    """A loss without targets, mean over samples: half the squared distance to a fixed, output-dependent pattern."""
    pattern = torch.linspace(-1.0, 2.0, output[0].numel(), dtype=output.dtype).reshape(output[0].shape)
    return 0.5 * (output - pattern).square().sum() / output.shape[0]


def capture_of(
    model: nn.Module,
    record: Record,
    *,
    likelihood: Likelihood | None = None,
    reduction: str = "mean",
    seed: int = 0,
    kind: str = "gradient",
) -> Capture:
    """Hooks on every layer of the model, armed to keep ``record``."""
    capture = Capture(model, discover_layers(model), likelihood, reduction, seed)
    capture.arm({layer.name: record for layer in capture.layers}, kind)
    return capture


def measure(
    model: nn.Module,
    batches: Sequence[Tensor],
    record: Record = Record.INPUTS | Record.GRADIENTS,
    *,
    loss: Loss = half_squares,
    likelihood: Likelihood | None = None,
    reduction: str = "mean",
    seed: int = 0,
) -> dict[str, LayerStatistics]:
    """Statistics of one gradient over the given micro-batches, with the layers' gradients filled in."""
    capture = capture_of(model, record, likelihood=likelihood, reduction=reduction, seed=seed)
    model.zero_grad()
    for x in batches:
        loss(model(x)).backward()
    statistics = capture.collect()
    capture.close()
    return {
        name: replace(entry, gradients=tuple(p.grad.clone() for p in entry.layer.parameters.values()))
        for name, entry in statistics.items()
    }


def joint(values: Tensors) -> Tensor:
    """(weight, bias) of a dense or convolutional layer as the matrix [W | b]."""
    weight = values[0].flatten(1)
    return torch.cat([weight, values[1].unsqueeze(1)], 1) if len(values) > 1 else weight


def products(statistics: LayerStatistics) -> tuple[Tensor, ...]:
    """g'a summed over samples, positions and calls, in the shapes of the layer's parameters; rows see their group."""
    groups, layer = statistics.layer.groups, statistics.layer
    rows, gradients = statistics.input_rows(), statistics.gradient_rows()
    if layer.has_bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    blocks = [g.T @ rows[index::groups] for index, g in enumerate(gradients.chunk(groups, 1))]
    return layer.parameter_views(torch.cat(blocks))


def flat(values: Sequence[Tensor]) -> Tensor:
    """All tensors as one vector."""
    return torch.cat([value.flatten() for value in values])


def loop_over_samples(model: nn.Module, x: Tensor, loss: Callable[[Tensor, int], Tensor]) -> list[list[Tensor]]:
    """Gradient of every sample's own loss, sample by sample: the plainest possible reference."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        list(torch.autograd.grad(loss(model(x[i : i + 1]), i), parameters, materialize_grads=True))
        for i in range(len(x))
    ]


def random_spd(size: int, generator: torch.Generator, condition: float = 1e2) -> Tensor:
    """A random symmetric positive definite matrix with eigenvalues in [1 / sqrt(condition), sqrt(condition)]."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    exponents = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
    return (basis * condition**exponents) @ basis.T


def generator_of(seed: int) -> torch.Generator:
    """A generator with its own seed."""
    return torch.Generator().manual_seed(seed)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Compare two tensors of one shape; a failure shows the worst entry."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def storage_of(part: Preconditioner, layer: Layer, values: Tensors) -> Tensors:
    """The layer's tensors in the layout a structure wants: the served ones, as one matrix if it is joint."""
    named = dict(zip(layer.parameters, values, strict=True))
    served = tuple(named[name].clone() for name in part.serves(layer))
    return (joint(served),) if part.joint else served


def served_vector(part: Preconditioner, layer: Layer, storage: Tensors) -> Tensor:
    """A storage as one vector over the served parameters: weight row by row, then the bias."""
    if not part.joint:
        return flat(storage)
    (matrix,) = storage
    return torch.cat([matrix[:, :-1].flatten(), matrix[:, -1]]) if layer.has_bias else matrix.flatten()


def refreshed(part: Preconditioner, state: Any, damping: SideDamping) -> None:
    """Compute what the structure asks for."""
    part.install(state, compute_many(part.matrices(state, damping)))
