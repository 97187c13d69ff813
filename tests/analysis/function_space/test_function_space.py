"""The function-space engine against dense matrices, in chunks and whole."""

import pytest
import torch
from osculate.analysis.function_space.function_models import LinearModel, TwoLayerTanh, convolutional_tanh, dense_tanh
from osculate.analysis.function_space.function_space import FunctionSpace
from osculate.analysis.function_space.function_structures import STRUCTURES, resolve_structure
from osculate.analysis.function_space.library_runs import AsModule, full_batch_method, library_residuals
from osculate.errors import ArgumentError, NumericalError, UnknownNameError
from reference import function_space as reference
from torch import Tensor


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def dense() -> TwoLayerTanh:
    return dense_tanh(5, 3, 7, torch.Generator().manual_seed(3))


def convolution() -> TwoLayerTanh:
    return convolutional_tanh(4, (2, 4, 3), 5, torch.Generator().manual_seed(4))


MODELS = {"dense": dense, "convolution": convolution}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_what_they_say(name: str) -> None:
    model = MODELS[name]()
    theta = model.initial
    close(model.part(theta, 0), reference.outputs(model.patches, model.signs, theta))
    J = reference.jacobian(model.patches, model.signs, theta)
    close(model.jacobian(theta, 0), J)
    close(model.jacobian(theta[2:4], 2), J[:, 2:4])
    space = FunctionSpace(model)
    close(space.residual(theta), model.part(theta, 0) - model.targets)
    close(space.gram(theta), J.flatten(1) @ J.flatten(1).T)
    other = theta + 0.3
    change = torch.linalg.matrix_norm((model.jacobian(other, 0) - J).flatten(1), 2)
    close(space.jacobian_change(theta, [theta, other]), torch.stack([torch.zeros(()).double(), change]), 1e-7)
    largest = max(float(torch.linalg.matrix_norm(J[:, j].flatten(1), 2)) ** 2 for j in range(len(theta)))
    assert space.largest_block(theta) == pytest.approx(largest, rel=1e-10)


@pytest.mark.parametrize("blocks", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_structures_match_dense_matrices(name: str, blocks: str, damping: float) -> None:
    model = MODELS[name]()
    theta = model.initial
    J = reference.jacobian(model.patches, model.signs, theta)
    residual = torch.randn(len(J), dtype=torch.float64)
    if blocks == "kfac":
        damped = reference.kfac(model.patches, model.signs, theta, damping)
    else:
        damped = reference.fisher(J, blocks) + damping * torch.eye(theta.numel(), dtype=torch.float64)
    kernel, direction = reference.solve(J, damped, residual)
    solved = resolve_structure(blocks).solve(FunctionSpace(model), theta, residual, damping)
    close(solved.kernel, kernel, 1e-9)
    close(solved.direction, direction, 1e-9)
    close(model.jacobian(theta, 0).flatten(1) @ solved.direction.flatten(), kernel @ residual, 1e-9)


@pytest.mark.parametrize("blocks", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_chunks_change_nothing(name: str, blocks: str) -> None:
    model = MODELS[name]()
    whole = FunctionSpace(model)
    theta, residual = model.initial, whole.residual(model.initial)
    wanted = resolve_structure(blocks).solve(whole, theta, residual, 0.01)
    for units in (1, 2, 3):
        space = FunctionSpace(model, units * whole.bytes_per_unit())
        assert max(high - low for low, high in space.ranges()) == units
        found = resolve_structure(blocks).solve(space, theta, residual, 0.01)
        close(found.kernel, wanted.kernel, 1e-12)
        close(found.direction, wanted.direction, 1e-12)
        close(space.residual(theta), residual, 1e-12)
        close(space.gram(theta), whole.gram(theta), 1e-12)


def test_the_residual_does_not_write_to_the_targets() -> None:
    model = dense()
    before = model.targets.clone()
    FunctionSpace(model).residual(model.initial)
    close(model.targets, before, 0.0)


@pytest.mark.parametrize("name, blocks", [("dense", "per-output"), ("convolution", "kernel"), ("dense", "whole")])
def test_the_library_takes_the_same_steps_and_a_wrong_damping_does_not(name: str, blocks: str) -> None:
    model = MODELS[name]()
    space, structure = FunctionSpace(model), resolve_structure(blocks)
    theta, residuals = model.initial, [space.residual(model.initial)]
    for _ in range(4):
        theta = theta - 0.1 * structure.solve(space, theta, residuals[-1], 0.02).direction
        residuals.append(space.residual(theta))
    library = library_residuals(model, blocks, 0.02, 0.1, 4)
    wrong = library_residuals(model, blocks, 0.0201, 0.1, 4)
    assert max(float((a - b).norm()) for a, b in zip(library, residuals, strict=True)) < 1e-12
    assert max(float((a - b).norm()) for a, b in zip(wrong, residuals, strict=True)) > 1e-6


def test_refusals() -> None:
    model, linear = dense(), LinearModel(torch.ones(3, 2, 4).double(), torch.ones(3).double())
    with pytest.raises(ArgumentError, match="one unit with 5 samples takes"):
        FunctionSpace(model, 100)
    with pytest.raises(UnknownNameError, match="per-output"):
        resolve_structure("per-outputs")
    with pytest.raises(ArgumentError, match="Kronecker factors need a layer"):
        STRUCTURES["kfac"].solve(FunctionSpace(linear), linear.initial, linear.targets, 0.1)
    with pytest.raises(ArgumentError, match="damping must be > 0"):
        STRUCTURES["kfac"].solve(FunctionSpace(model), model.initial, model.targets, 0.0)
    with pytest.raises(NumericalError, match="take damping > 0"):
        STRUCTURES["whole"].solve(FunctionSpace(linear), linear.initial, linear.targets, 0.0)
    with pytest.raises(ArgumentError, match="no 'per-input' blocks"):
        full_batch_method("per-input", model)
    with pytest.raises(ArgumentError, match="at least 3 x 3"):
        convolutional_tanh(2, (1, 2, 5), 3, torch.Generator())
    with pytest.raises(ArgumentError, match="width"):
        dense_tanh(2, 2, 0, torch.Generator())
    with pytest.raises(ArgumentError, match="no network is known"):
        AsModule(object.__new__(type("Other", (), {"targets": torch.ones(2)})))
