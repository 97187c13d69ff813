"""SecantBlocks: every block's H is the plain formula's, whatever is rejected, damped, not finite or overflowing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate.curvature import LayerStatistics, discover_layers
from osculate.curvature.layers.layer import Layer
from osculate.preconditioners.structures.secant_blocks import SecantBlocksState, two_loop
from reference.lbfgs import PairStore
from torch import Tensor, nn

seeds = st.integers(0, 2**31)
NEWEST = osc.ZeroStartAverage(0.0)
DAMPING = osc.Split().sides(0.3, 1)
PLAIN = osc.SecantBlocks(memory=3, pairs=osc.NoDamping(), average=NEWEST, skip=osc.CurvatureTest(0.0))
RULES = (osc.DoubleDamping(), osc.PowellThenLM(), osc.PowellH(), osc.MergedDoubleDamping(), osc.PowellB0())


def linear(rows: int = 4, columns: int = 3) -> Layer:
    return discover_layers(nn.Linear(columns - 1, rows).double())[0]


def record(layer: Layer, parameters: Tensor, gradients: Tensor, scale: float = 1.0) -> LayerStatistics:
    """A layer at one evaluation, from joint matrices."""
    views = layer.parameter_views(parameters), layer.parameter_views(gradients)
    return LayerStatistics(layer, 4, 1, parameters=views[0], gradients=views[1], mean_scale=scale)


def fresh(part: osc.SecantBlocks, layer: Layer) -> SecantBlocksState:
    return part.init(layer, tuple(value.detach() for value in layer.parameters.values()))


def offer(
    part: osc.SecantBlocks, state: SecantBlocksState, step: Tensor, change: Tensor, start: float = 0.1
) -> dict[str, Tensor]:
    """One step of the layer that moved it by ``step`` and its gradient by ``change``."""
    layer, first = linear(*step.shape), torch.full_like(step, start)
    zero = torch.zeros_like(step)
    return part.observe_step(state, record(layer, zero, first), record(layer, step, first + change), DAMPING)


def inverses(state: SecantBlocksState) -> list[Tensor]:
    """H of every block, column by column."""
    order = state.steps.shape[2]
    rows = torch.eye(order, dtype=torch.float64)
    columns = [two_loop(state, row.expand(state.steps.shape[1:])) for row in rows]
    return list(torch.stack(columns, 2))


@given(seeds, st.integers(1, 4), st.integers(0, 9))
def test_every_block_is_its_dense_updates_with_overflow_and_rejections(seed: int, memory: int, count: int) -> None:
    """Rejections differ from block to block, so the stores fill at different speeds."""
    generator, part = generator_of(seed), replace(PLAIN, memory=memory)
    state, stores, rejected = fresh(part, linear()), [PairStore(memory) for _ in range(4)], 0
    for _ in range(count):
        step, change = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        change = torch.stack([random_spd(3, generator, 10.0) @ row for row in step]) if seed % 2 else change
        events = offer(part, state, step, change)
        for store, s, y in zip(stores, step.numpy(), change.numpy(), strict=True):
            if store.offer(s, y, np.zeros(1), 0.0) == 0:
                store.gamma = float(np.clip(s @ y / (y @ y), 1e-8, 1e3))
            else:
                rejected += 1
        assert int(events["damped_first"]) == int(events["damped_second"]) == 0
        rejected -= int(events["rejected_pairs"])
    assert rejected == 0
    for found, store in zip(inverses(state), stores, strict=True):
        expected = torch.from_numpy(store.dense(3))
        close(found / expected.norm(), expected / expected.norm(), 1e-7)


@pytest.mark.parametrize("pairs", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("skip", [osc.AngleTest(), osc.CurvatureTest(), osc.TwoSidedCurvatureTest()], ids=str)
def test_rules_are_applied_block_by_block(pairs: osc.PairDamping, skip: osc.SkipRule) -> None:
    """The whole layer does to each block what the structure does to a layer of that block alone."""
    part, generator = osc.SecantBlocks(memory=2, pairs=pairs, skip=skip), generator_of(5)
    whole, alone = fresh(part, linear()), [fresh(part, linear(1)) for _ in range(4)]
    for _ in range(6):
        step, change = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        events = offer(part, whole, step, change)
        single = [offer(part, state, step[b : b + 1], change[b : b + 1]) for b, state in enumerate(alone)]
        for name, count in events.items():
            assert int(count) == sum(int(entry[name]) for entry in single), name
    for found, state in zip(inverses(whole), alone, strict=True):
        close(found, inverses(state)[0], 1e-12)
        assert torch.linalg.eigvalsh((found + found.T) / 2)[0] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_pair_that_is_not_finite_never_enters_a_state(value: float) -> None:
    """1e200 is finite, its square is not."""
    part, generator = osc.SecantBlocks(), generator_of(3)
    state, other = fresh(part, linear()), fresh(part, linear())
    step, change = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    for entry in (state, other):
        offer(part, entry, step, step)
    spoiled = change.clone()
    spoiled[1] = value
    events = offer(part, state, step, spoiled)
    offer(part, other, step, change)
    assert int(events["rejected_pairs"]) >= 1
    assert all(bool(tensor.isfinite().all()) for tensor in state.tensors())
    for block in (0, 2, 3):
        close(inverses(state)[block], inverses(other)[block], 1e-14)
    close(state.pair.step[1], 0.1 * step[1], 1e-14)


def test_blocks_that_stand_still_keep_the_initial_scale() -> None:
    part = osc.SecantBlocks(scale=osc.NewestPair(initial=0.5))
    state, step = fresh(part, linear()), torch.randn(4, 3, dtype=torch.float64)
    step[2] = 0.0
    assert int(offer(part, state, step, 2.0 * step)["rejected_pairs"]) == 1
    close(state.scales, torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64), 1e-12)  # gamma of y = 2 s is 1/2
    close(inverses(state)[2], 0.5 * torch.eye(3, dtype=torch.float64))


def test_gradients_are_those_of_the_mean_loss() -> None:
    """A summed loss over 4 samples has gradients 4 times as long."""
    part, layer, step = PLAIN, linear(), torch.randn(4, 3, dtype=torch.float64)
    states = [fresh(part, layer), fresh(part, layer)]
    zero = torch.zeros_like(step)
    for state, factor in zip(states, (1.0, 4.0), strict=True):
        after = record(layer, step, factor * 2.0 * step, 1.0 / factor)
        part.observe_step(state, record(layer, zero, zero, 1.0 / factor), after, DAMPING)
    for one, two in zip(states[0].tensors(), states[1].tensors(), strict=True):
        close(one, two, 1e-14)


@pytest.mark.parametrize(
    ("partition", "module"),
    [
        (osc.Kernel(), nn.Conv2d(2, 3, 2)),
        (osc.Kernel(), nn.Conv1d(2, 4, 3, groups=2)),
        (osc.PerOutput(), nn.Conv2d(2, 3, 2)),
        (osc.PerInputAveraged(), nn.Linear(3, 4)),
        (osc.FlatChunk(), nn.Linear(3, 4)),
        (osc.PerOutputAveraged(), nn.Linear(3, 4)),
    ],
    ids=str,
)
def test_every_partition_has_its_dense_matrix(partition: osc.Partition, module: nn.Module) -> None:
    """Times the direction it is the momentum, in the entries of the parameters; and the stated size is right."""
    part, (layer,) = osc.SecantBlocks(partition, memory=2), discover_layers(module.double())
    state, generator = fresh(part, layer), generator_of(1)
    for _ in range(3):
        values = [
            tuple(torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in layer.parameters.values())
            for _ in range(3)
        ]
        before = LayerStatistics(layer, 4, 1, parameters=values[0], gradients=values[0])
        after = LayerStatistics(layer, 4, 1, parameters=values[1], gradients=tuple(3.0 * v for v in values[1]))
        part.observe_step(state, before, after, DAMPING)
    named = dict(zip(layer.parameters, values[2], strict=True))
    served = tuple(named[name] for name in part.serves(layer))
    momentum = (layer.joint_matrix(served),) if part.joint else served
    direction = part.precondition(state, momentum)
    views = layer.parameter_views(direction[0]) if part.joint else direction
    dense = part.to_dense(state, layer, DAMPING)
    flat = torch.cat([view.flatten() for view in views])
    close(dense @ flat, torch.cat([value.flatten() for value in served]), 1e-8)
    assert sum(tensor.numel() for tensor in state.tensors()) == part.numbers(layer)


@given(seeds, st.sampled_from([0.05, 0.3, 0.9]), st.integers(1, 4))
def test_the_angle_test_bounds_the_largest_eigenvalue(seed: int, cosine: float, memory: int) -> None:
    """lambda(H) <= c^p gamma + (c^p - 1) / (mu2 (c - 1)) with c = 1 / cosine^2, for pairs of any direction."""
    generator, mu2 = generator_of(seed), DAMPING.whole
    part = osc.SecantBlocks(memory=memory, average=NEWEST, skip=osc.AngleTest(cosine), scale=osc.ConstantScale(0.7))
    state = fresh(part, linear())
    for _ in range(memory):
        step, change = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        offer(part, state, step, change * 10 ** float(change[0, 0]))
    c = cosine**-2
    bound = c**memory * 0.7 + (c**memory - 1) / (mu2 * (c - 1))
    for found in inverses(state):
        values = torch.linalg.eigvalsh((found + found.T) / 2)
        assert values[0] > 0 and values[-1] <= bound * (1 + 1e-7)


def test_the_angle_test_knows_no_units() -> None:
    rule, step = osc.AngleTest(0.5), torch.tensor([1.0, 0.0])
    for factor in (1e-12, 1.0, 1e12):
        assert bool(rule.accepts(step, factor * torch.tensor([1.0, 1.7]), step))
        assert not bool(rule.accepts(step, factor * torch.tensor([1.0, 1.8]), step))
    assert not bool(rule.accepts(step, torch.tensor([float("inf"), 0.0]), step))
    with pytest.raises(osc.ArgumentError, match="cosine"):
        osc.AngleTest(1.0)


def test_the_initial_scale_keeps_its_bounds() -> None:
    rule, step = osc.NewestPair(smallest=0.1, largest=2.0), torch.ones(3)
    assert float(rule.scale(step, 4.0 * step)) == 0.25
    assert float(rule.scale(step, 1e-3 * step)) == 2.0
    assert float(rule.scale(step, 1e3 * step)) == pytest.approx(0.1)
    assert float(rule.scale(step, 0.0 * step)) == pytest.approx(0.1)
    with pytest.raises(osc.ArgumentError, match="smallest must be <= largest"):
        osc.NewestPair(smallest=2.0, largest=1.0)


@pytest.mark.parametrize("pairs", RULES, ids=lambda rule: type(rule).__name__)
def test_no_value_is_looked_at(pairs: osc.PairDamping) -> None:
    """On the meta device tensors have none: a synchronisation would raise."""
    part = osc.SecantBlocks(memory=2, pairs=pairs)
    with torch.device("meta"):
        layer = linear()
        state = fresh(part, layer)
        step = torch.empty(4, 3, dtype=torch.float64)
        events = part.observe_step(state, record(layer, step, step), record(layer, step, step), DAMPING)
        part.precondition(state, (step,))
    assert {value.device.type for value in events.values()} == {"meta"}
