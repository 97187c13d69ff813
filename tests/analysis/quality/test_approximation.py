"""The approximation meter against dense matrices, curvlinops, and structures whose quality is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import osculate as osc
import pytest
import torch
from func_products import ggn_block, hessian_dense_block
from osculate.analysis.quality.approximation import Effort, measure_approximation
from osculate.analysis.quality.exact_blocks import Probe, block_gradient, exact_block, flat_direction, in_double
from osculate.curvature.likelihoods import resolve_likelihood
from osculate.framework.optimizer.team import Team
from torch import Tensor, nn
from torch.nn import functional

LOSSES = {
    "categorical": functional.cross_entropy,
    "gaussian": lambda output, target: 0.5 * (output - target).square().sum() / len(output),
    "bernoulli": lambda output, target: (
        functional.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(output)
    ),
}
EXACT = osc.Method(
    osc.Dense(average=osc.MovingAverage(0.0)),
    osc.ExactGGN(),
    momentum=osc.NoMomentum(),
    defaults={"lr": 0.0, "damping": 0.1},
)


def case(likelihood: str = "categorical", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Probe]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    inputs = torch.randn(20, 5, dtype=dtype)
    targets: Tensor = torch.randint(0, 3, (20,)) if likelihood == "categorical" else torch.rand(20, 3, dtype=dtype)
    return model, Probe(inputs, targets, LOSSES[likelihood], likelihood)


def stepped(method: Any, model: nn.Module, probe: Probe, steps: int = 4, **numbers: Any) -> osc.SecondOrder:
    optimizer = osc.build(method, model, likelihood=probe.likelihood, **numbers)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = probe.loss(model(probe.inputs), probe.targets)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize("likelihood", LOSSES)
def test_exact_blocks_equal_those_of_the_library(likelihood: str) -> None:
    model, probe = case(likelihood)
    twin = in_double(stepped("sgdm", model, probe, 1))
    resolved = resolve_likelihood(likelihood)
    assert resolved is not None
    for block in twin.blocks:
        ggn = exact_block(twin, block, probe, "ggn").dense()
        assert torch.allclose(ggn, ggn_block(twin.model, block.layer, (probe.inputs,), resolved), atol=1e-13)
        hessian = exact_block(twin, block, probe, "hessian")
        expected = hessian_dense_block(
            twin.model, block.layer, (probe.inputs,), lambda output: probe.loss(output, probe.targets)
        )
        assert torch.allclose(hessian.dense(), expected, atol=1e-13)
        eigenvalues = torch.linalg.eigvalsh(expected)
        assert hessian.extremes() == pytest.approx((float(eigenvalues[0]), float(eigenvalues[-1])), rel=1e-6)
        loss = probe.loss(model(probe.inputs), probe.targets)
        names = [dict(model.named_parameters())[f"{block.layer.name}.{name}"] for name in block.names]
        slopes = torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, names)])
        assert torch.allclose(block_gradient(twin, block, probe), slopes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["ggn", "hessian"])
def test_spectra_agree_with_curvlinops(which: str) -> None:
    """One layer trained, so that the whole matrix of curvlinops is one block."""
    curvlinops = pytest.importorskip("curvlinops", exc_type=ImportError)
    model, probe = case()
    twin = in_double(stepped("sgdm", model, probe, 1))
    block = twin.blocks[0]
    own = [value for name, value in twin.model.named_parameters() if name.startswith("0.")]
    kind = curvlinops.GGNLinearOperator if which == "ggn" else curvlinops.HessianLinearOperator
    arguments = (twin.model, nn.CrossEntropyLoss(), own, [(probe.inputs, probe.targets)])
    reference = kind(*arguments, check_deterministic=False)
    columns = (reference @ torch.eye(24, dtype=torch.float64)).detach()
    expected = torch.linalg.eigvalsh(0.5 * (columns + columns.T))
    found = torch.linalg.eigvalsh(exact_block(twin, block, probe, which).dense())  # type: ignore[arg-type]
    assert torch.allclose(found, expected, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "effort", [Effort(), Effort(dense=1, probes=200, tolerance=1e-10, restarts=20)], ids=["dense", "products"]
)
def test_the_exact_structure_is_perfect(effort: Effort) -> None:
    model, probe = case()
    for quality in measure_approximation(stepped(EXACT, model, probe, 1), probe, targets=("ggn",), effort=effort):
        assert quality.damping == 0.1 and quality.how == ("dense" if effort.dense > 1 else "products")
        assert max(quality.error_operator, quality.error_frobenius, quality.error_scaled) < 1e-6
        assert (quality.cosine, quality.scale, quality.condition_after) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
        assert quality.condition_before == pytest.approx((quality.highest + 0.1) / (quality.lowest + 0.1))


def test_the_identity_has_the_errors_that_a_hand_computes() -> None:
    model, probe = case()
    plain = stepped("sgdm", model, probe, 1)
    twin = in_double(plain)
    for quality, block in zip(
        measure_approximation(plain, probe, targets=("ggn",), damping=0.5), twin.blocks, strict=True
    ):
        exact = exact_block(twin, block, probe, "ggn").dense()
        truth = exact + 0.5 * torch.eye(len(exact), dtype=torch.float64)
        values = torch.linalg.eigvalsh(truth)
        unit = torch.eye(len(exact), dtype=torch.float64)
        assert quality.error_operator == pytest.approx(float((1.0 - values).abs().max() / values[-1]))
        assert quality.error_frobenius == pytest.approx(float((unit - truth).norm() / truth.norm()))
        assert quality.scale == pytest.approx(float(truth.trace() / len(exact)))
        assert quality.condition_after == pytest.approx(quality.condition_before) == float(values[-1] / values[0])
        gradient = block_gradient(twin, block, probe)
        direction = torch.linalg.solve(truth, gradient)
        cosine = torch.dot(gradient, direction) / gradient.norm() / direction.norm()
        assert quality.cosine == pytest.approx(float(cosine)) and quality.cosine_gradient == pytest.approx(
            float(cosine)
        )


@pytest.mark.parametrize("method", osc.registry.methods())
def test_products_and_dense_matrices_tell_the_same_of_every_method(method: str) -> None:
    model, probe = case(dtype=torch.float32)
    optimizer = stepped(method, model, probe, 3)
    few, many = (
        measure_approximation(optimizer, probe, targets=("ggn",), damping=0.1, effort=effort)
        for effort in (Effort(), Effort(dense=1, probes=100, tolerance=1e-8, restarts=20))
    )
    for dense, products in zip(few, many, strict=True):
        assert -1.0 <= dense.cosine <= 1.0
        for name in ("lowest", "highest", "error_operator", "cosine", "condition_before", "condition_after"):
            first, second = getattr(dense, name), getattr(products, name)
            assert math.isnan(first) == math.isnan(second)
            assert math.isnan(first) or second == pytest.approx(first, rel=1e-3, abs=1e-6), name


def test_measuring_changes_nothing() -> None:
    model, probe = case(dtype=torch.float32)
    optimizer = stepped("kbfgs", model, probe, 2, lr=0.1, damping=0.3)
    before = [value.clone() for block in optimizer.blocks for value in (*block.state.tensors(), *block.parameters)]
    measure_approximation(optimizer, probe)
    after = [value for block in optimizer.blocks for value in (*block.state.tensors(), *block.parameters)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert next(model.parameters()).dtype == torch.float32 and model.training
    stepped_again = stepped("kbfgs", model, probe, 1, lr=0.1, damping=0.3)
    assert stepped_again.last_report.loss is not None


def test_a_flat_direction_is_what_the_block_does() -> None:
    model, probe = case()
    twin = in_double(stepped("kfac", model, probe, 3, damping=0.5))
    block = twin.blocks[0]
    (storage,) = block.storage
    views = block.parameter_views((storage,))
    expected = torch.cat([value.flatten() for value in Team([block]).directions(osc.NoMomentum())[0]])
    assert torch.allclose(flat_direction(block, torch.cat([value.flatten() for value in views])), expected)


def test_without_a_likelihood_there_is_no_gauss_newton_matrix() -> None:
    model, probe = case()
    with pytest.raises(osc.ArgumentError, match="likelihood"):
        measure_approximation(stepped("sgdm", model, probe, 1), replace(probe, likelihood=None))


@pytest.mark.parametrize("targets", ["ggn", ["fisher"], ["ggn", "fisher"], ()])
def test_no_other_matrix_is_measured_under_a_wrong_name(targets: Any) -> None:
    """A string is a sequence of letters, each of which passed for the Hessian."""
    model, probe = case()
    with pytest.raises(osc.ArgumentError, match="'ggn' and 'hessian'"):
        measure_approximation(stepped("sgdm", model, probe, 1), probe, targets=targets)


def test_what_cannot_be_measured_is_refused() -> None:
    model, probe = case()
    foreign: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(osc.ArgumentError, match="got SGD"):
        measure_approximation(foreign, probe)
    with pytest.raises(osc.ArgumentError, match="damping must be"):
        measure_approximation(stepped("sgdm", model, probe, 1), probe, damping=0.0)
