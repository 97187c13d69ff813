"""Damping in units of the curvature it damps: the formula, what it makes irrelevant, and what a dead layer gets."""

import math
from collections.abc import Sequence

import osculate as osc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate.preconditioners import CurvatureUnits, MeanEigenvalues, MiniBlock, Scheduled, SideDamping, Split
from osculate.preconditioners.structures.mini_block import MiniBlockState
from small_nets import batches, build, closure_of, cross_entropy, data, make, train
from torch import Tensor, nn

seeds = st.integers(0, 2**31)
lambdas = st.floats(1e-4, 1e2)
means = st.floats(1e-8, 1e8)


def damped(matrix: Tensor, value: float) -> Tensor:
    """F + lambda (tr F / d) I by the rule."""
    size = len(matrix)
    sides = CurvatureUnits().sides(value, 1, MeanEigenvalues(float(matrix.trace()) / size, 1.0))
    return matrix + sides.whole * torch.eye(size, dtype=matrix.dtype)


@given(seeds, st.integers(1, 6), lambdas, st.floats(1e-6, 1e6))
def test_a_loss_in_other_units_keeps_its_direction(seed: int, size: int, value: float, scale: float) -> None:
    """The loss c times as large has the gradient c g and the second moment c^2 F: the direction is 1 / c of itself."""
    generator = generator_of(seed)
    F, g = random_spd(size, generator), torch.randn(size, generator=generator, dtype=torch.float64)
    here = torch.linalg.solve(damped(F, value), g)
    there = torch.linalg.solve(damped(scale**2 * F, value), scale * g)
    close(scale * there, here)


@given(lambdas, means, means)
def test_two_factors_are_damped_by_their_own_means(value: float, inputs: float, outputs: float) -> None:
    sides = CurvatureUnits().sides(value, 7, MeanEigenvalues(inputs, outputs))
    assert sides.inputs == pytest.approx(math.sqrt(value) * inputs)
    assert sides.outputs == pytest.approx(math.sqrt(value) * outputs)
    assert sides.whole == pytest.approx(sides.inputs * sides.outputs)


@given(lambdas, means)
def test_one_matrix_is_damped_by_its_mean(value: float, mean: float) -> None:
    assert CurvatureUnits().sides(value, 7, MeanEigenvalues(mean, 1.0)).whole == pytest.approx(value * mean)


@pytest.mark.parametrize("pair", [None, (0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_a_dead_layer_is_damped_by_the_plain_number(pair: tuple[float, float] | None) -> None:
    known = None if pair is None else MeanEigenvalues(*pair)
    assert CurvatureUnits().sides(0.3, 4, known) == Split().sides(0.3, 4)


def test_means_whose_product_vanishes_are_no_units() -> None:
    assert CurvatureUnits().sides(0.3, 1, MeanEigenvalues(1e-200, 1e-200)) == Split().sides(0.3, 1)
    assert CurvatureUnits().sides(0.0, 1, MeanEigenvalues(2.0, 3.0)) == SideDamping(0.0, 0.0, 0.0)


@given(seeds, st.integers(1, 4), st.integers(1, 5))
def test_mini_blocks_tell_the_mean_of_all_their_eigenvalues(seed: int, count: int, size: int) -> None:
    generator = generator_of(seed)
    blocks = torch.stack([random_spd(size, generator) for _ in range(count)])
    state = MiniBlockState(blocks, blocks, 1.0)
    close(MiniBlock().mean_eigenvalue(state), torch.linalg.eigvalsh(blocks).mean())
    close(
        MiniBlock().mean_eigenvalue(MiniBlockState(blocks[0], blocks[0], 1.0)), torch.linalg.eigvalsh(blocks[0]).mean()
    )


def test_a_rule_around_it_asks_for_the_same() -> None:
    rule = Scheduled(CurvatureUnits(), lambda step: 0.5)
    assert rule.uses_eigenvalues and rule.uses_whole and not Scheduled(Split()).uses_whole
    assert rule.sides(0.4, 1, MeanEigenvalues(5.0, 1.0)).whole == pytest.approx(2.0)


def blocks_in_units(lr: float = 0.1, damping: float = 0.7) -> osc.Method:
    structure = osc.MiniBlock(osc.PerOutput(), osc.MovingAverage(0.5), osc.Schedule(1, 2))
    return osc.Method(
        structure,
        osc.BatchMean(),
        damping=osc.CurvatureUnits(),
        momentum=osc.HeavyBall(0.5),
        defaults={"lr": lr, "damping": damping},
    )


def step_with(method: osc.Method, model: nn.Module, scale: float, steps: int) -> Sequence[Tensor]:
    """Training on a loss ``scale`` times as large and lr with it: directions are 1 / scale as long."""
    optimizer = build(method, model, lr=scale * 1e-3)
    for x, y in batches(count=steps):
        optimizer.zero_grad()
        (scale * cross_entropy(model(x), y)).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@settings(max_examples=10)
@given(st.floats(1e-3, 1e3))
def test_training_does_not_see_the_units_of_the_loss(scale: float) -> None:
    method = blocks_in_units()
    for here, there in zip(step_with(method, make(), 1.0, 5), step_with(method, make(), scale, 5), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-9)


def test_the_first_inverse_is_that_of_the_formula() -> None:
    """(F + lambda mean(diag F) I)^{-1} per layer, each in its own units."""
    model, (x, y) = make(), data()
    optimizer = build(blocks_in_units(damping=0.7), model)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    for block in optimizer.blocks:
        state = block.state
        F = state.blocks
        unit = float(F.diagonal(dim1=-2, dim2=-1).mean())
        close(state.inverse, torch.linalg.inv(F + 0.7 * unit * torch.eye(F.shape[-1], dtype=F.dtype)))
    units = {float(block.state.blocks.diagonal(dim1=-2, dim2=-1).mean()) for block in optimizer.blocks}
    assert len(units) == len(optimizer.blocks)


def test_a_composition_and_its_plain_reference_agree() -> None:
    method = blocks_in_units(lr=1e-3)
    models = [make(), make()]
    for kind, model in zip((method, method.reference()), models, strict=True):
        train(osc.build(kind, model), model, batches(count=6))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_units_of_all_layers_are_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from osculate.framework.optimizer import session

    asked: list[int] = []
    fetch = session.fetch
    monkeypatch.setattr(session, "fetch", lambda values: asked.append(len(values)) or fetch(values))
    model, (x, y) = make(), data()
    optimizer = build(blocks_in_units(), model)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, x, y))
    assert asked == [len(optimizer.blocks)] * 2  # steps 0 and 2 renew


def test_structures_that_have_no_units_are_refused() -> None:
    with pytest.raises(osc.CompatibilityError, match="CurvatureUnits"):
        osc.Method(osc.Diagonal(), damping=osc.CurvatureUnits(), defaults={"damping": 0.1})
    factored = osc.Kronecker(osc.HessianActionBFGS(), osc.BFGS(), osc.Schedule(1, None, first=1))
    with pytest.raises(osc.CompatibilityError, match="BFGS"):
        osc.Method(factored, osc.SecantPairs(), damping=osc.CurvatureUnits(), defaults={"damping": 0.1})
    with pytest.raises(osc.CompatibilityError, match="Factored"):  # a block has no second side to balance
        osc.Method(osc.MiniBlock(), osc.BatchMean(), damping=osc.Factored(), defaults={"damping": 0.1})
