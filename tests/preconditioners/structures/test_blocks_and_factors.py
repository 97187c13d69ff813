"""What the structures hold against explicit Fisher matrices: T9 for mini-blocks, T8 for convolutions, K-FAC's sums."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import close, flat, half_squares, measure, random_spd, refreshed
from osculate.curvature import BatchMean, EmpiricalFisher, LayerStatistics, Record, discover_layers
from osculate.preconditioners import (
    Covariance,
    Diagonal,
    FlatChunk,
    HessianActionBFGS,
    Kernel,
    Kronecker,
    MiniBlock,
    MovingAverage,
    Observation,
    Partition,
    PerInputAveraged,
    PerOutput,
    PerOutputAveraged,
    PlainAverage,
    Preconditioner,
    RunningSum,
    SideDamping,
    State,
    ZeroStartAverage,
)
from reference import blocks as reference
from torch import Tensor, nn

FISHER = EmpiricalFisher()
NONE = SideDamping(0.0, 0.0, 0.0)
RULES: dict[str, Partition] = {
    "per_output": PerOutput(),
    "per_output_avg": PerOutputAveraged(),
    "per_input_avg": PerInputAveraged(),
    "flat_chunk_avg": FlatChunk(),
}


def conv(bias: bool = True) -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(2, 3, 2, bias=bias).double(), torch.randn(7, 2, 4, 3, dtype=torch.float64)


def linear(bias: bool = True) -> tuple[nn.Module, Tensor]:
    return nn.Linear(4, 3, bias=bias).double(), torch.randn(7, 4, dtype=torch.float64)


def observed(part: Preconditioner, entry: LayerStatistics, average: object = None) -> State:
    """State after one observation; a first value enters an average whole."""
    parameters = tuple(p.detach() for p in entry.layer.parameters.values())
    state = part.init(entry.layer, parameters)
    part.update(state, Observation(entry, entry.gradients, entry.gradients), average)
    return state


def fisher_of(entry: LayerStatistics) -> Tensor:
    """The explicit empirical Fisher of the layer over (weight row by row, bias)."""
    rows = torch.cat([value.flatten(1) for value in FISHER.fill(entry).vectors()], 1)
    return rows.T @ rows / entry.samples


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [linear, conv])
def test_per_output_blocks_are_sub_blocks_of_the_fisher(make: object, bias: bool) -> None:
    """T9: the block of output o is the Fisher over row o of [W | b]; nothing else is kept."""
    model, x = make(bias)
    entry = FISHER.fill(measure(model, [x])["(root)"])
    state = observed(MiniBlock(PerOutput()), entry)
    F, (rows, columns) = fisher_of(entry), entry.layer.matrix_shape
    inputs = columns - bias
    for o in range(rows):
        index = list(range(o * inputs, (o + 1) * inputs)) + ([rows * inputs + o] if bias else [])
        close(state.blocks[o], F[index][:, index])
    averaged = observed(MiniBlock(PerOutputAveraged()), entry)
    close(averaged.blocks, state.blocks.mean(0))
    close(observed(MiniBlock(PerOutput(limit=1)), entry).blocks, averaged.blocks)
    dense = MiniBlock(PerOutput()).to_dense(state, entry.layer, NONE)
    mask = dense != 0
    close(dense[mask], F[mask])


@pytest.mark.parametrize("bias", [True, False])
def test_kernel_blocks_are_sub_blocks_of_the_fisher(bias: bool) -> None:
    model, x = conv(bias)
    entry = FISHER.fill(measure(model, [x])["(root)"])
    state, F = observed(MiniBlock(Kernel()), entry), fisher_of(entry)
    assert state.blocks.shape == (6, 4, 4)
    for b in range(6):
        index = list(range(4 * b, 4 * b + 4))
        close(state.blocks[b], F[index][:, index])
    dense = MiniBlock(Kernel()).to_dense(state, entry.layer, NONE)
    assert dense.shape == (24, 24)
    close(dense, torch.block_diag(*state.blocks))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (5, 5)])
def test_blocks_agree_with_the_transcription(rule: str, shape: tuple[int, int]) -> None:
    """Vectors, their way back and the averaged outer product of a batch-mean gradient."""
    model = nn.Linear(*shape).double()
    entry = BatchMean().fill(measure(model, [torch.randn(7, shape[0], dtype=torch.float64)])["(root)"])
    partition, matrix = RULES[rule], torch.cat([entry.gradients[0], entry.gradients[1].unsqueeze(1)], 1)
    vectors = reference.dense_vectors(matrix.numpy(), rule)
    assert partition.shape(entry.layer) == vectors.shape
    close(partition.split((matrix,)), torch.from_numpy(vectors))
    (back,) = partition.join(partition.split((matrix,)), (matrix,))
    assert torch.equal(back, matrix)
    averaged = reference.AVERAGED[rule]
    assert partition.shared(entry.layer) == averaged
    state = observed(MiniBlock(partition), entry)
    close(state.blocks, torch.from_numpy(reference.outer_products(vectors, averaged)))


def test_many_samples_are_expanded_in_pieces() -> None:
    """More gradient vectors than fit one chunk: old blocks decay once, every vector counts once."""
    model, _ = linear()
    part = MiniBlock(PerOutput(), MovingAverage(0.9))
    entries = [FISHER.fill(measure(model, [torch.randn(n, 4, dtype=torch.float64)])["(root)"]) for n in (150, 64, 65)]
    state = observed(part, entries[0])
    expected = part.to_dense(state, entries[0].layer, NONE)
    weight = 1 - 0.9
    for entry in entries[1:]:
        part.update(state, Observation(entry, entry.gradients, entry.gradients))
        total = 0.9 * weight + 0.1
        expected = (0.9 * weight / total) * expected + (0.1 / total) * torch.where(expected != 0, fisher_of(entry), 0.0)
        weight = total
    close(part.to_dense(state, entries[0].layer, NONE), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [linear, conv])
def test_kfac_factors_are_explicit_sums(make: object, bias: bool) -> None:
    """A: sum over positions, mean over samples, with the trailing 1. G: mean over both."""
    model, x = make(bias)
    entry = FISHER.fill(measure(model, [x])["(root)"])
    state = observed(Kronecker(Covariance(), Covariance()), entry)
    action = observed(Kronecker(HessianActionBFGS(), Covariance()), entry)
    rows = entry.input_rows().unflatten(0, (entry.samples, -1))
    gradients = entry.preactivation_gradients()
    n, positions = gradients.shape[:2]
    A = torch.zeros(entry.layer.matrix_shape[1], entry.layer.matrix_shape[1], dtype=torch.float64)
    G = torch.zeros(gradients.shape[2], gradients.shape[2], dtype=torch.float64)
    for i in range(n):
        for t in range(positions):
            a = torch.cat([rows[i, t], torch.ones(int(bias), dtype=torch.float64)])
            A += torch.outer(a, a) / n
            G += torch.outer(gradients[i, t], gradients[i, t]) / (n * positions)
    for found in (state, action):
        close(found.inputs.second_moment, A)
    close(state.outputs.second_moment, G)
    v = torch.randn(len(A), dtype=torch.float64)  # T8: A v without forming A
    extended = torch.cat([rows, torch.ones(n, positions, int(bias), dtype=torch.float64)], 2).flatten(0, 1)
    close(state.inputs.second_moment @ v, extended.T @ (extended @ v) / n)


def test_a_convolution_on_one_pixel_is_a_dense_layer() -> None:
    """T8: 1 x 1 kernels on 1 x 1 images, every structure and both estimators."""
    dense, x = nn.Linear(4, 3).double(), torch.randn(7, 4, dtype=torch.float64)
    pixel = nn.Conv2d(4, 3, 1).double()
    with torch.no_grad():
        pixel.weight.copy_(dense.weight[:, :, None, None])
        pixel.bias.copy_(dense.bias)
    record = Record.INPUTS | Record.GRADIENTS | Record.MEANS
    one = measure(dense, [x], record)["(root)"]
    other = measure(pixel, [x[:, :, None, None]], record, loss=lambda out: half_squares(out.flatten(1)))["(root)"]
    assert (one.samples, one.positions) == (other.samples, other.positions) == (7, 1)
    for name in ("mean_preactivation", "mean_gradient"):
        close(getattr(one, name), getattr(other, name))
    close(one.mean_input(), other.mean_input())
    for estimator in (FISHER, BatchMean()):
        for part in [MiniBlock(rule) for rule in RULES.values()] + [Kronecker(Covariance(), Covariance()), Diagonal()]:
            if isinstance(part, Kronecker) and estimator is not FISHER:
                continue
            states = [observed(part, estimator.fill(entry)) for entry in (one, other)]
            for left, right in zip(states[0].tensors(), states[1].tensors(), strict=True):
                close(left.flatten(), right.flatten())


STRUCTURES: dict[str, Preconditioner] = {
    "kfac": Kronecker(Covariance(), Covariance()),
    "per output": MiniBlock(PerOutput()),
    "per input": MiniBlock(PerInputAveraged()),
    "kernel": MiniBlock(Kernel()),
}
CASES = [(make, name) for make in (linear, conv) for name in STRUCTURES if make is conv or name != "kernel"]


def state_of(name: str, model: nn.Module, x: Tensor, factor: float = 1.0, reduction: str = "mean") -> State:
    """State after one batch of a loss whose per-sample part is ``factor`` half squares."""
    scale = factor * (len(x) if reduction == "sum" else 1)
    entry = measure(model, [x], loss=lambda out: scale * half_squares(out), reduction=reduction)["(root)"]
    return observed(STRUCTURES[name], FISHER.fill(entry))


@settings(max_examples=8)
@given(st.integers(0, 2**31), st.sampled_from(CASES), st.floats(0.1, 10.0))
def test_invariances(seed: int, case: tuple, factor: float) -> None:
    make, name = case
    torch.manual_seed(seed)
    model, x = make()
    plain = list(state_of(name, model, x).tensors())
    order = torch.randperm(len(x))
    for other in (
        state_of(name, model, x[order]),
        state_of(name, model, torch.cat([x, x])),
        state_of(name, model, x, reduction="sum"),
    ):
        for left, right in zip(plain, other.tensors(), strict=True):
            close(left, right, 1e-9)
    scaled = state_of(name, model, x, factor)
    if isinstance(STRUCTURES[name], MiniBlock):
        close(scaled.blocks, factor**2 * plain[0], 1e-9)
    else:
        close(scaled.inputs.second_moment, plain[0], 1e-9)
        close(scaled.outputs.second_moment, factor**2 * plain[2], 1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("rule", [MovingAverage(0.9), ZeroStartAverage(0.9), RunningSum()])
def test_diagonals_are_the_textbook_rules(power: float, rule: object) -> None:
    (layer,) = discover_layers(nn.Linear(3, 2).double())
    parameters = tuple(p.detach() for p in layer.parameters.values())
    part = Diagonal(power, rule, epsilon=1e-4)
    state, gradients = part.init(layer, parameters), []
    for _ in range(4):
        gradients.append(tuple(torch.randn_like(p) for p in parameters))
        part.update(state, Observation(None, gradients[-1], parameters, 0.1, parameters))
    squares = [flat([g + 0.1 * p for g, p in zip(entry, parameters, strict=True)]) ** 2 for entry in gradients]
    weights = {
        MovingAverage: [0.1 * 0.9 ** (3 - k) / (1 - 0.9**4) for k in range(4)],
        ZeroStartAverage: [0.1 * 0.9 ** (3 - k) for k in range(4)],
        RunningSum: [1.0] * 4,
    }[type(rule)]
    v = sum(w * s for w, s in zip(weights, squares, strict=True))
    close(flat(state.second_moment), v)
    close(flat(part.precondition(state, parameters)), flat(parameters) / (v**power + 1e-4))
    saved = state.second_moment[0].clone()
    part.update(state, Observation(None, gradients[0], parameters), PlainAverage())  # a warm start leaves v alone
    assert torch.equal(state.second_moment[0], saved)


def test_failed_inverses_keep_the_last_good_ones() -> None:
    model, x = linear()
    entry = FISHER.fill(measure(model, [x])["(root)"])
    for part in (MiniBlock(), Kronecker(Covariance(), Covariance())):
        state, damping = observed(part, entry), SideDamping(0.1, 0.1, 0.1)
        refreshed(part, state, damping)
        momentum = (torch.randn(3, 5, dtype=torch.float64),)
        expected = part.precondition(state, momentum)[0].clone()
        for request in part.matrices(state, damping):
            request.matrix.fill_(float("nan"))
        refreshed(part, state, damping)
        assert torch.equal(part.precondition(state, momentum)[0], expected)


def test_wide_layers_use_the_panels() -> None:
    """The factors of a wide layer agree with numpy's plain product."""
    model, x = nn.Linear(530, 520).double(), torch.randn(5, 530, dtype=torch.float64)
    entry = FISHER.fill(measure(model, [x])["(root)"])
    state = observed(Kronecker(Covariance(), Covariance()), entry)
    rows = np.concatenate([x.numpy(), np.ones((5, 1))], 1)
    close(state.inputs.second_moment, torch.from_numpy(rows.T @ rows / 5))
    g = entry.preactivation_gradients().flatten(0, 1).numpy()
    close(state.outputs.second_moment, torch.from_numpy(g.T @ g / 5))


def test_a_random_matrix_is_what_it_says() -> None:
    values = torch.linalg.eigvalsh(random_spd(6, torch.Generator().manual_seed(0), 100.0))
    assert values[0] >= 0.1 - 1e-12 and values[-1] <= 10 + 1e-12
