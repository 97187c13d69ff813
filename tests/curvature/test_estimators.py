"""Estimators: what they ask the capture for, and that roots and vectors are the curvature they name."""

from dataclasses import replace

import pytest
import torch
from measuring import close, flat, half_squares, loop_over_samples, measure
from osculate.curvature import (
    BatchMean,
    EmpiricalFisher,
    Estimator,
    Gaussian,
    InputsOnly,
    Needs,
    Record,
    SampledBatchMean,
    SampledFisher,
    SecantPairs,
)
from torch import Tensor, nn

ALL: list[Estimator] = [
    BatchMean(),
    EmpiricalFisher(),
    InputsOnly(),
    SampledBatchMean(),
    SampledFisher(),
    SecantPairs(),
]
CONV = (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)), (4, 1, 3, 3))
DENSE = (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3))


@pytest.mark.parametrize("estimator", ALL, ids=lambda part: type(part).__name__)
def test_records_what_is_needed_and_no_more(estimator: Estimator) -> None:
    assert estimator.records(Needs.NOTHING) == Record.NOTHING
    assert estimator.records(Needs.INPUTS) == Record.INPUTS
    for need in (Needs.ROOTS, Needs.VECTORS, Needs.PAIRS, Needs.SCORES):
        if need not in estimator.provides:
            assert estimator.records(need) in (Record.NOTHING, Record.SAMPLED, Record.SAMPLED_PARAMETERS)
    sampled = Record.SAMPLED | Record.SAMPLED_PARAMETERS
    asked = estimator.records(Needs.ROOTS | Needs.VECTORS | Needs.SCORES)
    assert estimator.needs_likelihood == bool(asked & sampled)


@pytest.mark.parametrize("make", [CONV, DENSE])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("estimator", [EmpiricalFisher(), SampledFisher()], ids=["empirical", "sampled"])
def test_what_was_declared_is_filled(make: tuple, reduction: str, estimator: Estimator) -> None:
    """Recording exactly what ``records`` asks for is enough for roots and vectors, and they agree with each other."""
    model, x = make[0]().double(), torch.randn(make[1], dtype=torch.float64)
    record = estimator.records(estimator.provides & ~Needs.SCORES)
    factor = 1.0 if reduction == "mean" else float(len(x))
    statistics = measure(
        model, [x], record, loss=lambda out: factor * half_squares(out), likelihood=Gaussian(), reduction=reduction
    )
    for entry in statistics.values():
        filled = estimator.fill(entry)
        rows, scale = filled.roots
        assert rows.shape == (entry.samples * entry.positions, entry.layer.weight_shape[0])
        vectors = filled.vectors()
        close(vectors[1], (rows * scale).unflatten(0, (entry.samples, -1)).sum(1))
        for value, parameter in zip(vectors, entry.layer.parameters.values(), strict=True):
            assert value.shape == (entry.samples, *parameter.shape)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher_is_made_of_per_sample_gradients(reduction: str) -> None:
    model, x = CONV[0]().double(), torch.randn(CONV[1], dtype=torch.float64)
    expected = loop_over_samples(model, x, lambda out, i: half_squares(out))
    factor = 1.0 if reduction == "mean" else float(len(x))
    statistics = measure(model, [x], loss=lambda out: factor * half_squares(out), reduction=reduction)
    found = [value for entry in statistics.values() for value in EmpiricalFisher().fill(entry).vectors()]
    for position, value in enumerate(found):
        close(value, torch.stack([gradients[position] for gradients in expected]))


def test_batch_means_are_one_vector() -> None:
    model, x = DENSE[0]().double(), torch.randn(DENSE[1], dtype=torch.float64)
    statistics = measure(model, [x], Record.SAMPLED_PARAMETERS | Record.INPUTS, likelihood=Gaussian())
    for entry in statistics.values():
        for estimator, expected in (
            (BatchMean(), entry.gradients),
            (SampledBatchMean(), entry.sampled_parameter_gradients),
        ):
            vectors = estimator.fill(entry).vectors()
            assert all(value.shape[0] == 1 for value in vectors)
            close(flat(vectors), flat(expected))


@pytest.mark.parametrize("estimator", ALL, ids=lambda part: type(part).__name__)
def test_a_step_that_recorded_nothing_stays_empty(estimator: Estimator) -> None:
    """Off schedule there is no record: nothing is filled and nothing is invented."""
    model, x = DENSE[0]().double(), torch.randn(DENSE[1], dtype=torch.float64)
    entry = measure(model, [x], Record.MEANS)["0"]
    filled = estimator.fill(entry)
    assert filled.roots is None
    assert (filled.vectors is not None) == isinstance(estimator, BatchMean)
    assert filled.inputs is None


def test_filling_leaves_the_record_alone() -> None:
    model, x = DENSE[0]().double(), torch.randn(DENSE[1], dtype=torch.float64)
    entry = measure(model, [x], Record.INPUTS | Record.GRADIENTS | Record.SAMPLED, likelihood=Gaussian())["0"]
    before: list[Tensor] = [value.clone() for value in (entry.inputs, entry.output_gradient, entry.sampled_gradient)]
    for estimator in (EmpiricalFisher(), SampledFisher()):
        filled = estimator.fill(replace(entry))
        filled.vectors()
    after = (entry.inputs, entry.output_gradient, entry.sampled_gradient)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert entry.roots is None and entry.vectors is None
