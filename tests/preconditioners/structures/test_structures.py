"""Contracts every structure meets: dense solve, purity, saving, bytes. New structures are added to the table."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from measuring import close, flat, generator_of, measure, refreshed, served_vector, storage_of
from osculate import ArgumentError
from osculate.curvature import Gaussian, Layer, LayerStatistics, Needs, Record, SampledFisher, discover_layers
from osculate.preconditioners import (
    BFGS,
    LBFGS,
    Absolute,
    Covariance,
    Dense,
    Diagonal,
    Eigenbasis,
    FlatChunk,
    GradientCovariance,
    GradientMoments,
    HessianActionBFGS,
    Identity,
    IdentityFactor,
    Kernel,
    Kronecker,
    MiniBlock,
    Observation,
    PerInputAveraged,
    PerOutput,
    PerOutputAveraged,
    Preconditioner,
    Refining,
    Root,
    Split,
    State,
)
from torch import Tensor, nn

INNER = {"covariance": Covariance(), "action": HessianActionBFGS(), "identity": IdentityFactor()}
OUTER = {"covariance": Covariance(), "bfgs": BFGS(), "lbfgs": LBFGS(3), "identity": IdentityFactor()}
PARTITIONS = {
    "per output": PerOutput(),
    "per output, too large": PerOutput(limit=10),
    "per output, averaged": PerOutputAveraged(),
    "per input, averaged": PerInputAveraged(),
    "flat chunk": FlatChunk(),
    "kernel": Kernel(),
}
SAME = IdentityFactor()
STRUCTURES: dict[str, Preconditioner] = (
    {f"kronecker {a} x {b}": Kronecker(INNER[a], OUTER[b]) for a in INNER for b in OUTER}
    | {f"blocks {name}": MiniBlock(partition) for name, partition in PARTITIONS.items()}
    | {f"diagonal {power}": Diagonal(power=power, epsilon=1e-3) for power in (0.5, 1.0)}
    | {"diagonal of momentum": Diagonal(source="momentum", epsilon=1e-3), "identity": Identity()}
    | {"kronecker root x root": Kronecker(Root(), Root()), "kronecker root x identity": Kronecker(Root(2.0), SAME)}
    | {"kronecker tnt": Kronecker(GradientCovariance(), GradientCovariance())}
    | {"dense": Dense(), "dense absolute": Dense(Absolute())}
    | {"ekfac": Eigenbasis(), "soap": Eigenbasis(GradientMoments(), power=0.5)}
)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (9, 4)),
    "linear, no bias": (lambda: nn.Linear(3, 4, bias=False), (9, 3)),
    "linear on sequences": (lambda: nn.Linear(3, 2), (6, 3, 3)),
    "conv": (lambda: nn.Conv2d(2, 3, 2), (5, 2, 4, 4)),
    "conv, no bias": (lambda: nn.Conv2d(2, 2, (1, 2), stride=2, padding=1, bias=False), (5, 2, 4, 4)),
}
LAMBDA = 0.3
CASES = [
    (name, layer)
    for name, part in STRUCTURES.items()
    for layer, (make, _) in LAYERS.items()
    if part.serves(discover_layers(make())[0])
]


class Case:
    """A structure on one layer after two updates, a refresh and two look-backs."""

    def __init__(self, name: str, layer: str):
        torch.manual_seed(1)
        self.part = STRUCTURES[name]
        make, self.shape = LAYERS[layer]
        self.model = make().double()
        (self.layer,) = discover_layers(self.model)
        self.parameters = tuple(self.layer.parameters[name].detach() for name in self.part.serves(self.layer))
        self.generator = generator_of(2)
        self.state = self.part.init(self.layer, self.parameters)
        self.momentum = self.random()
        entry = self.observe()
        self.damping = Split().sides(LAMBDA, entry.positions)
        last = self.observe()
        refreshed(self.part, self.state, self.damping)
        self.refine(last)
        for _ in range(2):
            before, after = self.measured(), self.measured()
            self.events = self.part.observe_step(self.state, before, after, self.damping)

    def random(self) -> tuple[Tensor, ...]:
        values = [
            torch.randn(p.shape, generator=self.generator, dtype=torch.float64) for p in self.layer.parameters.values()
        ]
        return storage_of(self.part, self.layer, tuple(values))

    def measured(self) -> LayerStatistics:
        x = torch.randn(self.shape, generator=self.generator, dtype=torch.float64)
        record = Record.INPUTS | Record.GRADIENTS | Record.MEANS | Record.SAMPLED
        statistics = measure(self.model, [x], record, likelihood=Gaussian())
        return SampledFisher().fill(statistics["(root)"])

    def observation(self, entry: LayerStatistics) -> Observation:
        named = dict(zip(self.layer.parameters, entry.gradients, strict=True))
        gradients = tuple(named[name] for name in self.part.serves(self.layer))
        return Observation(entry, gradients, self.momentum, 0.1, self.parameters)

    def observe(self) -> LayerStatistics:
        entry = self.measured()
        self.part.update(self.state, self.observation(entry))
        return entry

    def refine(self, entry: LayerStatistics) -> None:
        if isinstance(self.part, Refining):
            self.part.refine(self.state, self.observation(entry))

    def snapshot(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.state.tensors()]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_direction_equals_a_dense_solve(name: str, layer: str) -> None:
    case = Case(name, layer)
    if "x bfgs" not in name and "x lbfgs" not in name and "action" not in name:
        refreshed(case.part, case.state, case.damping)
    dense = case.part.to_dense(case.state, case.layer, case.damping)
    size = sum(p.numel() for p in case.parameters)
    assert dense.shape == (size, size) and dense.dtype == torch.float64
    close(dense / dense.norm(), dense.T / dense.norm(), 1e-12)
    assert torch.linalg.eigvalsh(dense)[0] > 0
    momentum = case.random()
    expected = torch.linalg.solve(dense, served_vector(case.part, case.layer, momentum))
    direction = case.part.precondition(case.state, momentum)
    assert [value.shape for value in direction] == [value.shape for value in momentum]
    close(served_vector(case.part, case.layer, direction), expected, 1e-8)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_inputs_and_old_state_stay_as_they_are(name: str, layer: str) -> None:
    case = Case(name, layer)
    entry, momentum = case.measured(), case.random()
    observation = replace(case.observation(entry), momentum=momentum)
    tensors = [entry.inputs, entry.output_gradient, entry.sampled_gradient, *entry.gradients, entry.roots[0]]
    tensors += [entry.mean_preactivation, entry.mean_gradient, *momentum, *case.parameters]
    before, state = [tensor.clone() for tensor in tensors], case.snapshot()
    first = [value.clone() for value in case.part.precondition(case.state, momentum)]
    case.part.to_dense(case.state, case.layer, case.damping)
    case.part.matrices(case.state, case.damping)
    assert all(torch.equal(a, b) for a, b in zip(state, case.state.tensors(), strict=True))
    second = case.part.precondition(case.state, momentum)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    case.part.update(case.state, observation)
    case.part.observe_step(case.state, entry, case.measured(), case.damping)
    refreshed(case.part, case.state, case.damping)
    case.refine(entry)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_save_load_continue_is_bitwise_the_same(name: str, layer: str) -> None:
    case = Case(name, layer)
    file = io.BytesIO()
    torch.save(case.state.to_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = case.part.init(case.layer, case.parameters)
    fresh.load_dict(saved)
    kept = [tensor.clone() for tensor in case.state.tensors()]
    entries = [case.measured() for _ in range(2)]
    momentum = case.random()
    results = []
    for state in (case.state, fresh):
        case.part.update(state, case.observation(entries[0]))
        if isinstance(case.part, Refining):
            case.part.refine(state, case.observation(entries[0]))
        case.part.observe_step(state, *entries, case.damping)
        results.append([*state.tensors(), *case.part.precondition(state, momentum)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    again = case.part.init(case.layer, case.parameters)
    again.load_dict(saved)  # neither loading nor going on has changed what was saved
    assert all(torch.equal(a, b) for a, b in zip(kept, again.tensors(), strict=True))


def numbers(part: Any, order: int) -> int:
    """The docstrings' memory formulas of the factors."""
    if isinstance(part, Covariance | HessianActionBFGS | Root | GradientCovariance):
        return 2 * order**2
    if isinstance(part, BFGS):
        return order**2 + 2 * order
    if isinstance(part, LBFGS):
        return 2 * part.memory * order + 3 * part.memory**2 + 2 * order
    return 0


def expected_numbers(part: Preconditioner, layer: Layer) -> int:
    """The docstrings' memory formulas of the structures."""
    if isinstance(part, Kronecker):
        rows, columns = layer.matrix_shape
        return numbers(part.inputs, columns) + numbers(part.outputs, rows)
    if isinstance(part, Eigenbasis):
        rows, columns = layer.matrix_shape
        return 2 * (rows**2 + columns**2) + rows * columns
    if isinstance(part, Dense):
        return 2 * sum(parameter.numel() for parameter in layer.parameters.values()) ** 2
    if isinstance(part, MiniBlock):
        count, order = part.partition.shape(layer)
        return 2 * order**2 * (1 if part.partition.shared(layer) else count)
    if isinstance(part, Diagonal):
        return sum(parameter.numel() for parameter in layer.parameters.values())
    return 0


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_memory_is_what_the_docstrings_say(name: str, layer: str) -> None:
    case = Case(name, layer)
    fresh = case.part.init(case.layer, case.parameters)
    assert case.state.bytes() == fresh.bytes() == 8 * expected_numbers(case.part, case.layer)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_fresh_structure_is_the_identity(name: str, layer: str) -> None:
    """Before anything was observed a direction is the momentum (a diagonal divides by its epsilon)."""
    case = Case(name, layer)
    momentum = case.random()
    direction = case.part.precondition(case.part.init(case.layer, case.parameters), momentum)
    scale = 1e-3 if isinstance(case.part, Diagonal) else 1.0
    close(flat(direction) * scale, flat(momentum))


@pytest.mark.parametrize("name", STRUCTURES)
def test_needs_are_enough(name: str) -> None:
    """A structure that declares no need is updated without any statistics."""
    part = STRUCTURES[name]
    if part.needs & ~Needs.INPUTS:
        return
    (layer,) = discover_layers(nn.Linear(3, 2).double())
    state = part.init(layer, tuple(p.detach() for p in layer.parameters.values()))
    values = tuple(torch.ones_like(p) for p in layer.parameters.values())
    storage = storage_of(part, layer, values)
    if part.needs:
        statistics = LayerStatistics(layer, 4, 1, inputs=torch.randn(4, 3, dtype=torch.float64))
        part.update(state, Observation(statistics, values, storage))
    else:
        part.update(state, Observation(None, values, storage))
    assert all(math.isfinite(float(v.sum())) for v in part.precondition(state, storage))


def test_states_refuse_what_does_not_fit() -> None:
    small, large = (Case("kronecker covariance x bfgs", layer).state for layer in ("linear", "linear, no bias"))
    with pytest.raises(ArgumentError, match="saved 'second_moment' has shape"):
        small.load_dict(large.to_dict())
    saved = small.to_dict()
    del saved["outputs"]
    with pytest.raises(ArgumentError, match="lacks 'outputs'"):
        small.load_dict(saved)
    assert isinstance(small, State)
