"""``backend="residuals"``: every structure sees the Gauss-Newton matrix of the user's residuals."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close
from osculate.curvature.records.statistics import LayerStatistics
from osculate.errors import ArgumentError, ClosureRequiredError, CompatibilityError, NumericalError
from osculate.framework.methods import registry
from torch import Tensor, nn


def network(seed: int = 0, width: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, 1)
    ).double()


def points_of(seed: int, rows: int = 7) -> Tensor:
    return torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)).double()


def by_autograd(model: nn.Module, inside: Tensor) -> dict[str, Any]:
    moved = inside.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(moved).sum(), moved, create_graph=True)
    bends = [torch.autograd.grad(slope[:, axis].sum(), moved, create_graph=True)[0][:, axis] for axis in range(2)]
    return {"inside": torch.stack(bends).sum(0) + 1.0, "edge": osc.Residual(model(inside[:3]) - 2.0, weight=2.0)}


def by_channels(model: nn.Module, inside: Tensor) -> dict[str, Any]:
    bend = osc.derivatives(model, inside, laplacian=True).laplacian
    assert bend is not None
    return {"inside": bend + 1.0, "edge": osc.Residual(model(inside[:3]) - 2.0, weight=2.0)}


def gauss_newton(model: nn.Module, blocks: dict[str, Any]) -> dict[str, Tensor]:
    """Per layer J'WJ of the loss, one backward pass per residual."""
    result: dict[str, Tensor] = {}
    for name, module in model.named_children():
        parameters = list(module.parameters())
        if not parameters:
            continue
        total = torch.zeros(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters)).double()
        for block in blocks.values():
            values, weight = (block.values, block.weight) if isinstance(block, osc.Residual) else (block, 1.0)
            for entry in values.reshape(-1):
                row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
                flat = torch.cat(
                    [(torch.zeros_like(p) if v is None else v).flatten() for v, p in zip(row, parameters, strict=True)]
                )
                total += weight / len(values) * torch.outer(flat, flat)
        result[name] = total
    return result


def recorded(method: osc.Method, model: nn.Module, closure: Callable[[], Any]) -> dict[str, LayerStatistics]:
    """What one step's evaluation records, filled by the method's estimator."""
    optimizer = osc.build(method, model, backend="residuals")
    optimizer.capture.closure(closure)()
    return {
        name: method.curvature.fill(
            record.with_fields(gradients=tuple(p.grad for p in record.layer.parameters.values()))
        )
        for name, record in optimizer.capture.collect().items()
    }


@pytest.mark.parametrize("curvature", [osc.ExactGGN(), osc.SampledFisher()], ids=repr)
@pytest.mark.parametrize("residuals", [by_autograd, by_channels])
@given(st.integers(0, 200))
def test_the_matrix_of_every_layer(curvature: Any, residuals: Any, seed: int) -> None:
    model, inside = network(seed), points_of(seed)
    method = osc.Method(osc.Dense(), curvature, defaults={"lr": 1.0, "damping": 1.0})
    exact = gauss_newton(model, residuals(model, inside))
    for name, record in recorded(method, model, lambda: residuals(model, inside)).items():
        assert record.matrix is not None
        close(record.matrix(), exact[name], 1e-9)


@given(st.integers(0, 200))
def test_the_empirical_fisher_is_that_of_single_residuals(seed: int) -> None:
    model, inside = network(seed), points_of(seed)
    method = osc.Method(osc.Dense(), osc.EmpiricalFisher(), defaults={"lr": 1.0, "damping": 1.0})
    blocks = by_autograd(model, inside)
    parts = [
        block.weight * 0.5 * block.values.reshape(-1) ** 2 / len(block.values)
        if isinstance(block, osc.Residual)
        else 0.5 * block**2 / len(block)
        for block in blocks.values()
    ]
    entries = torch.cat(parts)
    for name, record in recorded(method, model, lambda: by_autograd(model, inside)).items():
        parameters = list(model.get_submodule(name).parameters())
        total = 0.0
        for entry in entries:
            row = torch.autograd.grad(entry * len(entries), parameters, retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [(torch.zeros_like(p) if v is None else v).flatten() for v, p in zip(row, parameters, strict=True)]
            )
            total = total + torch.outer(flat, flat) / len(entries)
        assert record.matrix is not None
        close(record.matrix(), total, 1e-8)


@given(st.integers(0, 200))
def test_kronecker_factors_are_made_of_channels(seed: int) -> None:
    """A: mean over points of a a' of every channel; G: of every channel's share of the residuals (arXiv:2405.15603)."""
    model, inside = network(seed), points_of(seed)
    method = osc.Method(
        osc.Kronecker(osc.Covariance(), osc.Covariance()), osc.ExactGGN(), defaults={"lr": 1.0, "damping": 1.0}
    )
    found = recorded(method, model, lambda: by_channels(model, inside))
    record = found["0"]
    identity = torch.eye(2).double().expand(len(inside), -1, -1)
    none = torch.zeros(len(inside), 1, 2).double()
    value, flat = inside.unsqueeze(1), torch.cat([identity, none], 1)
    rows = torch.cat([value.flatten(0, 1), flat.flatten(0, 1), inside[:3]])
    ones = torch.cat([torch.ones(len(inside)), torch.zeros(3 * len(inside)), torch.ones(3)]).double()
    expected = torch.cat([rows, ones[:, None]], 1)
    points = len(inside) + 3
    ours = record.input_rows()
    close(ours.T @ ours * record.input_weight, expected.T @ expected / points, 1e-10)
    assert record.roots is not None and len(record.roots[0]) == 4 * len(inside) + 3


def test_one_position_is_the_exact_matrix_of_a_linear_network() -> None:
    """Plain residuals of one linear layer with one output: A kron G is the Gauss-Newton matrix."""
    model, inside = nn.Linear(2, 1).double(), points_of(0)
    method = osc.Method(
        osc.Kronecker(osc.Covariance(), osc.Covariance()), osc.ExactGGN(), defaults={"lr": 1.0, "damping": 1.0}
    )
    record = next(iter(recorded(method, model, lambda: {"fit": model(inside)}).values()))
    inputs = record.input_rows()
    rows, factor = record.roots or (torch.zeros(1), 1.0)
    product = (inputs.T @ inputs * record.input_weight) * (rows.T @ rows * factor**2 / record.rows)
    homogeneous = torch.cat([inside, torch.ones(len(inside), 1).double()], 1)
    close(product, homogeneous.T @ homogeneous / len(inside), 1e-10)


def test_autograd_inside_is_refused_for_kronecker_factors_and_nothing_changes() -> None:
    model, inside = network(), points_of(0)
    optimizer = osc.build("kfac", model, backend="residuals")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompatibilityError, match=r"osculate\.derivatives"):
        optimizer.step(lambda: by_autograd(model, inside))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_every_registered_method_steps_or_is_refused(name: str) -> None:
    model, inside = network(1), points_of(1)
    optimizer = osc.build(name, model, backend="residuals")
    assert optimizer.needs_closure and not optimizer.has_warm_start
    losses = [float(optimizer.step(lambda: by_channels(model, inside))) for _ in range(30)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < 1.5 * losses[0]


def joint(rule: Any, **options: Any) -> osc.Method:
    return osc.Method(
        osc.Dense(average=osc.MovingAverage(0.0)),
        osc.ExactGGN(),
        momentum=osc.NoMomentum(),
        step_size=rule,
        defaults={"lr": 1.0, "damping": 1e-6},
        **options,
    )


@given(st.integers(0, 100))
def test_joint_steps_minimise_the_model_of_the_residuals(seed: int) -> None:
    """alpha of all layers from M = (J d)'W(J d): the loss of a linear network falls to the model's minimum."""
    inside = points_of(seed, 9)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    for parameter in model[0].parameters():
        parameter.requires_grad_(seed % 2 == 0)
    rule = osc.JointLayerwise(decay=0.0, relative_ridge=0.0, sign=osc.Unrestricted())
    optimizer = osc.build(joint(rule), model, backend="residuals")
    parameters = [p for p in model.parameters() if p.requires_grad]
    blocks = {"fit": model(inside) - 1.0}
    rows = (
        torch.stack(
            [
                torch.cat([piece.flatten() for piece in torch.autograd.grad(value, parameters, retain_graph=True)])
                for value in blocks["fit"].flatten()
            ]
        )
        / len(inside) ** 0.5
    )
    residual = blocks["fit"].detach().flatten() / len(inside) ** 0.5
    before = torch.cat([p.detach().flatten() for p in parameters])
    optimizer.step(lambda: {"fit": model(inside) - 1.0})
    step = torch.cat([p.detach().flatten() for p in parameters]) - before
    sizes = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in model]
    pieces = list(step.split([size for size in sizes if size]))
    for number, piece in enumerate(pieces):  # the model's derivative along each layer's own step vanishes
        along = torch.cat([piece if place == number else torch.zeros_like(other) for place, other in enumerate(pieces)])
        slope = (rows @ along) @ (residual + rows @ step)
        assert abs(float(slope)) < 1e-7 * float((rows @ along).norm() * residual.norm()) + 1e-14


def test_guards_and_levenberg_marquardt_look_at_the_same_residuals() -> None:
    model, inside = network(2), points_of(2, 12)
    rule = osc.JointWithLastStep(decay=0.0, relative_ridge=0.0, sign=osc.Unrestricted())
    method = joint(rule, guard=osc.Armijo(), damping=osc.LevenbergMarquardt(every=1, minimum=1e-12, omega=0.5))
    optimizer = osc.build(method, model, backend="residuals")
    losses = [float(optimizer.step(lambda: by_autograd(model, inside))) for _ in range(40)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(losses))
    assert losses[-1] < 1e-2 * losses[0]


def test_saving_and_going_on() -> None:
    model, inside = network(3), points_of(3)
    optimizer = osc.build("ngd-exact", model, backend="residuals")
    for _ in range(4):
        optimizer.step(lambda: by_autograd(model, inside))
    other = copy.deepcopy(model)
    resumed = osc.build("ngd-exact", other, backend="residuals")
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        one = float(optimizer.step(lambda: by_autograd(model, inside)))
        assert one == float(resumed.step(lambda: by_autograd(other, inside)))


def empirical_rows() -> None:
    model = network()
    factors = osc.Kronecker(osc.Covariance(), osc.Covariance())
    method = osc.Method(factors, osc.EmpiricalFisher(), defaults={"lr": 1.0, "damping": 1.0})
    osc.build(method, model, backend="residuals").step(lambda: {"fit": model(points_of(0))})


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a likelihood": (
        lambda: osc.build("mbf", network(), backend="residuals", likelihood="gaussian"),
        ArgumentError,
        "leave the likelihood out",
    ),
    "the Hessian": (
        lambda: osc.build(
            osc.Method(step_size=osc.LayerwiseQuadratic(osc.ExactHessian())), network(), backend="residuals"
        ),
        CompatibilityError,
        "SampledScores",
    ),
    "a loss": (
        lambda: osc.build("adam", network(), backend="residuals").step(lambda: torch.ones(())),
        ArgumentError,
        "by name",
    ),
    "residuals elsewhere": (
        lambda: osc.build("adam", network()).step(lambda: {"fit": torch.ones(3)}),
        ArgumentError,
        "backend='residuals'",
    ),
    "empirical rows": (empirical_rows, CompatibilityError, r"ExactGGN\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named(name: str) -> None:
    make, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        make()


def test_residuals_that_are_not_finite_change_nothing() -> None:
    model, inside = network(), points_of(0)
    optimizer = osc.build("ngd-exact", model, backend="residuals")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match="'fit'"):
        optimizer.step(lambda: {"fit": model(inside) / torch.zeros(1).double()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_mini_batch_that_is_not_finite_can_be_skipped() -> None:
    model, inside = network(), points_of(0)
    optimizer = osc.build("ngd-exact", model, backend="residuals", on_nonfinite="skip")
    before = copy.deepcopy(model.state_dict())
    optimizer.step(lambda: {"fit": model(inside) / torch.zeros(1).double()})
    assert optimizer.skipped_steps == 1 and "'fit'" in str(optimizer.last_report.skipped)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.step(lambda: {"fit": model(inside)})
    assert optimizer.skipped_steps == 1


@given(st.integers(0, 200))
def test_secant_pairs_of_products(seed: int) -> None:
    """Means over all channels of all blocks, before and after a change of the parameters, against autograd."""
    model, inside = network(seed), points_of(seed)
    optimizer = osc.build("kbfgs", model, backend="residuals")
    capture = optimizer.capture
    capture.closure(lambda: by_channels(model, inside))()
    before = capture.collect()
    capture.arm(optimizer.plan.second_look.records, "look back")
    capture.closure(lambda: by_channels(model, inside))()
    after = capture.collect()
    for name, record in before.items():
        later = after[name]
        assert record.mean_preactivation is not None and later.mean_preactivation is not None
        assert record.mean_gradient is not None and later.mean_gradient is not None
        close(record.mean_preactivation, later.mean_preactivation, 1e-12)
        close(record.mean_gradient, later.mean_gradient, 1e-10)
    layer = model[0]
    identity = torch.eye(2).double().expand(len(inside), -1, -1)
    moved = torch.cat(
        [
            layer(inside),
            (identity @ layer.weight.T).flatten(0, 1),
            torch.zeros(len(inside), 5).double(),
            layer(inside[:3]),
        ]
    ).detach()
    found = before["0"].mean_preactivation
    assert found is not None
    close(found, moved.mean(0), 1e-10)


KRONECKER = ["kfac", "joint-kfac", "kbfgs"]


def losses_of(name: str, model: nn.Module, closure: Callable[[], dict[str, Any]], steps: int = 6) -> list[float]:
    optimizer = osc.build(name, model, backend="residuals")
    return [float(optimizer.step(closure)) for _ in range(steps)]


@pytest.mark.parametrize("name", KRONECKER)
def test_what_the_model_changes_in_place_is_not_the_product(name: str) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 1)).double()
        found.append(losses_of(name, model, lambda model=model: {"a": model(points_of(0)) - 1.0}))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("name", [*KRONECKER, "ngd-exact", "mbf"])
def test_layers_may_be_frozen_and_thawed(name: str) -> None:
    model = network()
    optimizer = osc.build(name, model, backend="residuals")

    def residuals() -> dict[str, Any]:
        return {"a": model(points_of(0)) - 1.0}

    optimizer.step(residuals)
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer.step(residuals)
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    optimizer.step(residuals)
    assert not torch.equal(model[0].weight, before)


def test_other_points_when_a_step_looks_back_are_refused() -> None:
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = osc.build("kbfgs", model, backend="residuals")
    before = [value.detach().clone() for value in model.parameters()]
    with pytest.raises(ArgumentError, match="other data when it was called again"):
        optimizer.step(lambda: {"a": model(torch.rand(7, 2, generator=generator).double()) - 1.0})
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", KRONECKER)
def test_the_reason_for_which_factors_are_refused_is_the_true_one(name: str) -> None:
    model = network()
    with (
        pytest.warns(osc.FallbackWarning),
        pytest.raises(CompatibilityError, match="a row of it depends on other rows"),
    ):
        losses_of(name, model, lambda: {"a": (model(points_of(0)) - 1.0).flip(0)})


@pytest.mark.parametrize("name", ["ngd-exact", "mbf", "joint-sgdm"])
def test_parameters_of_one_number_and_half_precision(name: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = network(), nn.Parameter(torch.tensor(1.5).double())

        def forward(self, points: Tensor) -> Tensor:
            return self.scale * self.inner(points)

    for precision in (torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        model, points = Scaled().to(precision), points_of(0).to(precision)
        with pytest.warns(osc.FallbackWarning):
            found = losses_of(name, model, lambda model=model, points=points: {"a": model(points) - 1.0})
        assert found[-1] < found[0] and model.scale.dtype == precision


@pytest.mark.parametrize("name", ["kfac", "mbf", "kbfgs"])
def test_residuals_of_another_model_are_refused(name: str) -> None:
    other = network(1)
    with pytest.raises(ArgumentError, match="the model that the optimizer was built for"):
        losses_of(name, network(), lambda: {"a": other(points_of(0)) - 1.0})


@pytest.mark.parametrize("name", KRONECKER)
@pytest.mark.parametrize("cut", ["detach", "no_grad"])
def test_targets_of_the_network_itself_are_no_rows_of_its_factors(name: str, cut: str) -> None:
    """A bootstrapped target is a number: the steps are those of the same number from another network."""
    found = []
    for own in (True, False):
        model = network()
        twin = copy.deepcopy(model)

        def residuals(model: nn.Module = model, twin: nn.Module = twin, own: bool = own) -> dict[str, Any]:
            twin.load_state_dict(model.state_dict())
            asked = model if own else twin
            with torch.set_grad_enabled(cut == "detach"):
                target = asked(points_of(1) + 3.0)
            return {"a": model(points_of(0)) - 0.9 * target.detach() - 1.0}

        found.append(losses_of(name, model, residuals))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_step_without_a_function_is_told_to_return_residuals() -> None:
    with pytest.raises(ClosureRequiredError, match="function that returns them by name"):
        osc.build("kfac", network(), backend="residuals").step()


def test_one_gradient_for_the_whole_batch_is_unbiased() -> None:
    """V E[g g'] is the Gauss-Newton matrix, blocks between layers included; without random signs it is not."""
    model, inside = network(4, 2), points_of(4, 5)
    optimizer = osc.build(
        osc.Method(osc.Dense(), osc.SampledBatchMean(), defaults={"lr": 1.0, "damping": 1.0}),
        model,
        backend="residuals",
    )
    parameters = list(model.parameters())
    total, draws, samples = 0.0, 1500, 0
    for step in range(draws):
        optimizer.capture.step = 3 + step % 97 + 100 * (step // 97)
        optimizer.capture.closure(lambda: {"fit": model(inside) - 1.0})()
        records = optimizer.capture.collect()
        row = torch.cat(
            [piece.flatten() for name in ("0", "2", "4") for piece in records[name].sampled_parameter_gradients or ()]
        )
        samples = records["0"].samples
        total = total + samples * torch.outer(row, row) / draws
    entries = (model(inside) - 1.0).flatten()
    rows = torch.stack(
        [
            torch.cat([piece.flatten() for piece in torch.autograd.grad(entry, parameters, retain_graph=True)])
            for entry in entries
        ]
    )
    exact = rows.T @ rows / len(entries)
    assert (total - exact).norm() < 0.15 * exact.norm()
