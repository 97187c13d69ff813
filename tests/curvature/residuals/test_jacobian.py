"""Rows of Jacobians of residuals against automatic differentiation, whatever the residuals are made of."""

import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import osculate as osc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close
from osculate.curvature.residuals.jacobian import JacobianReader
from osculate.errors import ArgumentError, CompatibilityError, FallbackWarning, NumericalError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Closure = Callable[[], Mapping[str, Any]]


def reader_of(model: nn.Module) -> JacobianReader:
    named = dict(model.named_parameters())
    return JacobianReader(list(named.values()), list(named))


def network(*widths: int, act: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for place, (inner, outer) in enumerate(pairwise(widths)):
        layers += [nn.Linear(inner, outer, bias=place % 2 == 0), act()]
    return nn.Sequential(*layers[:-1]).double()


def values_of(found: Any) -> Tensor:
    tensor = found.values if isinstance(found, osc.Residual) else found
    return tensor.reshape(-1)


def require_exact(model: nn.Module, closure: Closure) -> None:
    """Every row, every parameter, against one backward pass per residual."""
    found = reader_of(model).evaluate(closure)
    flat = torch.cat([values_of(value) for value in closure().values()])
    close(found.values, flat.detach(), 1e-12)
    for place, parameter in enumerate(model.parameters()):
        rows = [torch.autograd.grad(entry, parameter, retain_graph=True, allow_unused=True)[0] for entry in flat]
        exact = torch.stack([torch.zeros_like(parameter) if row is None else row for row in rows])
        close(found.rows[place], exact, 1e-10)


def second_derivatives(model: nn.Module, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Laplacian of the first output, as users write it."""
    points = points.clone().requires_grad_()
    value = model(points)[:, 0]
    (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    bends = [
        torch.autograd.grad(slope[:, axis].sum(), points, create_graph=True)[0][:, axis]
        for axis in range(points.shape[1])
    ]
    return value, slope, torch.stack(bends).sum(0)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([nn.Tanh, nn.SiLU, nn.Softplus]),
    st.integers(0, 1000),
)
def test_rows_of_equations_with_derivatives(
    hidden: list[int], inputs: int, rows: int, outputs: int, act: type[nn.Module], seed: int
) -> None:
    model = network(inputs, *hidden, outputs, act=act, seed=seed)
    inside, edge = torch.rand(rows, inputs).double(), torch.rand(rows + 2, inputs).double()

    def closure() -> dict[str, Any]:
        value, slope, bend = second_derivatives(model, inside)
        return {
            "interior": bend + value * slope[:, 0] - 1.0,
            "edge": osc.Residual(model(edge) - 2.0, weight=3.0),
            "periodic": model(edge) - model(edge + 1.0),
        }

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_exact(model, closure)


class Tied(nn.Module):
    """One weight used twice, and a scale that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, value: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(value))) * self.scale


class Unlike(nn.Module):
    """A convolution and a normalisation beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 2))

    def forward(self, value: Tensor) -> Tensor:
        found: Tensor = self.net(value.unsqueeze(1))
        return found


@pytest.mark.parametrize("model", [Tied().double(), Unlike().double()], ids=["tied", "unlike"])
def test_other_uses_of_parameters_go_row_by_row(model: nn.Module) -> None:
    width = 3 if isinstance(model, Tied) else 6
    points = torch.rand(5, width).double()
    with pytest.warns(FallbackWarning, match="row by row"):
        require_exact(model, lambda: {"fit": model(points)})


def test_weight_used_twice_needs_no_fallback() -> None:
    layer = nn.Linear(3, 3).double()
    points = torch.rand(4, 2, 3).double()  # two positions per row
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_exact(layer, lambda: {"fit": layer(torch.tanh(layer(points)))})


COUPLED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "mean over the batch": lambda model, points: model(points) - model(points).mean(),
    "an integral": lambda model, points: model(points).mean().reshape(1),
    "neighbours": lambda model, points: model(points)[1:] - model(points)[:-1],
    "shuffled": lambda model, points: model(points) - model(points).flip(0),
    "batch statistics": lambda model, points: nn.functional.batch_norm(model(points), None, None, training=True),
    "vmapped": lambda model, points: torch.vmap(lambda point: model(point))(points),
}


@pytest.mark.parametrize("name", COUPLED)
def test_rows_that_are_not_independent(name: str) -> None:
    model, points = network(2, 4, 1), torch.rand(5, 2).double()
    with pytest.warns(FallbackWarning, match="'odd'.*row by row"):
        require_exact(model, lambda: {"plain": model(points), "odd": COUPLED[name](model, points)})


def test_a_known_block_is_looked_at_again() -> None:
    """What becomes coupled later is found by the next look."""
    model, points = network(2, 4, 1), torch.rand(5, 2).double()
    reader, coupled = reader_of(model), False

    def closure() -> dict[str, Tensor]:
        value = model(points)
        return {"odd": value - value.mean() if coupled else value}

    reader.evaluate(closure)
    coupled = True
    with pytest.warns(FallbackWarning):
        found = reader.evaluate(closure, look=True)
    assert found.gradients()[0].isfinite().all()


@given(st.integers(0, 500))
def test_gradient_and_curvature_are_those_of_the_loss(seed: int) -> None:
    model, points = network(2, 3, 2, seed=seed), torch.rand(4, 2).double()
    penalties = [osc.HalfSquare(), osc.PseudoHuber(0.3), osc.Cauchy(2.0), osc.Huber(0.4)]
    parameters = list(model.parameters())

    def closure() -> dict[str, Any]:
        return {
            str(place): osc.Residual(model(points + place) - 1.0, float(place + 1), rho)
            for place, rho in enumerate(penalties)
        }

    found = reader_of(model).evaluate(closure)
    loss = sum(
        entry.weight / len(entry.values) * entry.penalty.value(entry.values).sum() for entry in closure().values()
    )
    assert isinstance(loss, Tensor)
    close(found.loss, loss.detach(), 1e-12)
    for ours, exact in zip(found.gradients(), torch.autograd.grad(loss, parameters), strict=True):
        close(ours, exact, 1e-10)
    roots = torch.cat([value.flatten(1) for value in found.roots()], 1)
    rows = found.matrix()
    close(roots.T @ roots, rows.T @ (found.curvatures[:, None] * rows), 1e-10)


@given(st.integers(0, 200))
def test_products_without_a_matrix(seed: int) -> None:
    model, points = network(2, 3, 1, seed=seed), torch.rand(4, 2).double()

    def closure() -> dict[str, Tensor]:
        return {"interior": second_derivatives(model, points)[2], "edge": model(points)}

    reader = reader_of(model)
    matrix, implicit = reader.evaluate(closure).matrix(), reader.products(closure, model)
    generator = torch.Generator().manual_seed(seed)
    along = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64)
    across = torch.randn(matrix.shape[0], generator=generator, dtype=torch.float64)
    close(implicit.times(along), matrix @ along, 1e-10)
    close(implicit.transposed(across), matrix.T @ across, 1e-10)


BAD: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "a tensor": (lambda model: model(torch.ones(2, 2).double()), ArgumentError, "by name"),
    "nothing": (lambda model: {}, ArgumentError, "at least one block"),
    "no rows": (lambda model: {"a": model(torch.ones(0, 2).double())}, ArgumentError, "'a'.*at least one"),
    "a scalar": (lambda model: {"a": model(torch.ones(2, 2).double()).sum()}, ArgumentError, r"reshape\(1\)"),
    "whole numbers": (lambda model: {"a": torch.ones(3, dtype=torch.int64)}, ArgumentError, "int64"),
    "a list": (lambda model: {"a": [1.0]}, ArgumentError, "must be a tensor"),
    "no dependence": (lambda model: {"a": torch.ones(3).double()}, ArgumentError, "does not depend"),
    "detached": (lambda model: {"a": model(torch.ones(2, 2).double()).detach()}, ArgumentError, "detach"),
    "not finite": (
        lambda model: {"a": model(torch.ones(3, 2).double()) / torch.tensor([[1.0], [0.0], [1.0]]).double()},
        NumericalError,
        "'a'.*row 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_residuals_are_named(name: str) -> None:
    function, kind, words = BAD[name]
    model = network(2, 3, 1)
    with pytest.raises(kind, match=words):
        reader_of(model).evaluate(lambda: function(model))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ArgumentError, match="weight"):
        osc.Residual(torch.ones(2), weight)


def test_points_that_change_between_evaluations_are_refused() -> None:
    model, generator = network(2, 3, 1), torch.Generator().manual_seed(0)

    def closure() -> dict[str, Tensor]:
        value = model(torch.rand(4, 2, generator=generator).double())
        return {"odd": value - value.mean()}

    with pytest.warns(FallbackWarning), pytest.raises(ArgumentError, match="same points"):
        reader_of(model).evaluate(closure)


def test_the_global_random_state_is_left_alone() -> None:
    model, points = network(2, 3, 1), torch.rand(4, 2).double()
    before = torch.random.get_rng_state()
    reader_of(model).evaluate(lambda: {"a": model(points)})
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_products_stay_what_they_are_while_parameters_move() -> None:
    model, points = network(2, 3, 1), torch.rand(4, 2).double()
    reader = reader_of(model)
    matrix, implicit = (
        reader.evaluate(lambda: {"a": model(points)}).matrix(),
        reader.products(lambda: {"a": model(points)}, model),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    along = torch.ones(matrix.shape[1]).double()
    close(implicit.times(along), matrix @ along, 1e-10)


def test_products_of_parameters_that_were_captured_are_refused() -> None:
    model, points = network(2, 3, 1), torch.rand(4, 2).double()
    weight = next(model.parameters())
    with pytest.raises(ArgumentError, match="itself"):
        reader_of(model).products(lambda: {"a": model(points), "decay": weight.flatten()}, model)


OPERATORS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "value": lambda u, x: u(x),
    "slope": lambda u, x: torch.func.grad(u)(x)[0],
    "laplacian": lambda u, x: torch.func.hessian(u)(x).trace(),
    "advection": lambda u, x: u(x) * torch.func.grad(u)(x)[1] - 0.1 * torch.func.hessian(u)(x)[0, 0],
    "fourth order": lambda u, x: torch.func.hessian(lambda y: torch.func.hessian(u)(y).trace())(x).trace(),
}


def by_autograd(name: str, model: nn.Module, points: Tensor) -> Tensor:
    """The same operators, as users write them for a batch."""
    points = points.clone().requires_grad_()

    def along(value: Tensor) -> Tensor:
        return torch.autograd.grad(value.sum(), points, create_graph=True)[0]

    def bend(value: Tensor) -> Tensor:
        slope = along(value)
        return torch.stack([along(slope[:, axis])[:, axis] for axis in range(points.shape[1])]).sum(0)

    value = model(points)[:, 0]
    if name == "value":
        return value
    if name == "slope":
        return along(value)[:, 0]
    if name == "laplacian":
        return bend(value)
    if name == "advection":
        slope = along(value)
        return value * slope[:, 1] - 0.1 * along(slope[:, 0])[:, 0]
    return bend(bend(value))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # inside of torch.func
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_against_forward_over_reverse(name: str) -> None:
    """The Jacobian of torch.func, point by point, knows nothing of copies of weights."""
    model, points = network(2, 4, 3, 1, act=nn.Tanh, seed=3), torch.rand(5, 2).double()
    named = {key: value.detach() for key, value in model.named_parameters()}

    def one(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
        return OPERATORS[name](lambda x: torch.func.functional_call(model, parameters, x.unsqueeze(0))[0, 0], point)

    exact = torch.vmap(torch.func.jacrev(one), in_dims=(None, 0))(named, points)
    found = reader_of(model).evaluate(lambda: {"equation": by_autograd(name, model, points)})
    for ours, value in zip(found.rows, exact.values(), strict=True):
        close(ours, value, 1e-8)


class Numbers(nn.Module):
    """Parameters without an axis, as a curve fit has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.rate = (nn.Parameter(torch.tensor(value).double()) for value in (1.3, 0.7))

    def forward(self, points: Tensor) -> Tensor:
        return self.scale * torch.exp(-self.rate * points)


def test_parameters_that_are_one_number() -> None:
    model, points = Numbers(), torch.linspace(0.0, 1.0, 5).double()
    with pytest.warns(FallbackWarning, match="something else than a linear layer"):
        found = reader_of(model).evaluate(lambda: {"fit": model(points) - 1.0})
    exact = torch.autograd.functional.jacobian(lambda a, b: a * torch.exp(-b * points), tuple(model.parameters()))
    close(found.matrix(), torch.stack(exact, 1).detach(), 1e-12)
    assert [value.shape for value in found.gradients()] == [(), ()]


@pytest.mark.parametrize("inside", [False, True])
def test_checkpoints_go_row_by_row(inside: bool) -> None:
    """What is computed again on the way back is computed without copies, so rows by copies do not exist."""
    model, points = network(2, 4, 2), torch.rand(5, 2).double()

    def closure() -> Mapping[str, Any]:
        moved = points.clone().requires_grad_()
        value = checkpoint(model, moved, use_reentrant=False)
        (slope,) = torch.autograd.grad(value.sum(), moved, create_graph=True)
        return {"a": slope if inside else value}

    with pytest.warns(FallbackWarning, match="checkpoint"):
        require_exact(model, closure)
    if not inside:
        with pytest.raises(CompatibilityError, match="checkpoint"):
            reader_of(model).evaluate(closure, uses=[0])


def test_products_of_checkpoints_while_parameters_move() -> None:
    model, points = network(2, 4, 2), torch.rand(5, 2).double()
    reader = reader_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = reader.evaluate(lambda: {"a": model(points)}).matrix()
    found = reader.products(lambda: {"a": checkpoint(model, points, use_reentrant=False)}, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    left, right = torch.rand(10).double(), torch.rand(rows.shape[1]).double()
    close(found.transposed(left), rows.T @ left, 1e-12)
    close(found.times(right), rows @ right, 1e-12)


@pytest.mark.parametrize("target", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_targets_of_another_precision(precision: torch.dtype, target: torch.dtype) -> None:
    model, points = network(2, 4, 1).to(precision), torch.rand(5, 2, dtype=precision)
    found = reader_of(model).evaluate(lambda: {"a": model(points) - torch.ones(5, 1, dtype=target)})
    assert {value.dtype for value in (found.values, found.slopes, found.curvatures, *found.rows)} == {precision}
    products = reader_of(model).products(lambda: {"a": model(points) - torch.ones(5, 1, dtype=target)}, model)
    close(products.transposed(products.known.slopes), torch.cat([v.flatten() for v in found.gradients()]), 1e-5)


def test_half_precision_is_summed_in_single() -> None:
    model, points = network(2, 4, 1).bfloat16(), torch.rand(5, 2).bfloat16()
    with pytest.warns(FallbackWarning):
        found = reader_of(model).evaluate(lambda: {"a": model(points)})
    assert {value.dtype for value in (found.values, found.slopes, *found.rows)} == {torch.float32}


@pytest.mark.parametrize("penalty", [osc.Huber(0.1), osc.Cauchy(0.1), osc.PseudoHuber(0.1)])
def test_outliers_alone_have_a_curvature(penalty: Any) -> None:
    """A Gauss-Newton matrix of zero would say nothing of how far to go; that of the parabola above the penalty does."""
    model, points = network(2, 4, 1), torch.rand(5, 2).double()
    far = reader_of(model).evaluate(lambda: {"a": osc.Residual(model(points) + 50.0, penalty=penalty)})
    assert bool((far.curvatures > 0).all())
    if not isinstance(penalty, osc.PseudoHuber):
        close(far.curvatures * far.values, far.slopes, 1e-12)
    shift = torch.tensor([0.0, 50.0, 50.0, 50.0, 50.0]).double()
    some = reader_of(model).evaluate(
        lambda: {"a": osc.Residual(0.01 * model(points)[:, 0] + shift, penalty=penalty, weight=5.0)}
    )
    close(some.curvatures, penalty.curvature(some.values), 1e-12)


def test_frozen_parameters_have_rows_of_zeros() -> None:
    model, points = network(2, 4, 4, 1), torch.rand(5, 2).double()
    reader = reader_of(model)
    whole = reader.evaluate(lambda: {"a": model(points)})
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    for closure in (lambda: {"a": model(points)}, lambda: {"b": model(points).flip(0)}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            found = reader.evaluate(closure)
        assert not found.rows[0].any()
        flipped = found.rows[1].flip(0) if found.names == ("b",) else found.rows[1]
        close(flipped, whole.rows[1], 1e-12)


def test_trainable_bias_of_a_frozen_weight_needs_no_fallback() -> None:
    model, points = network(2, 4, 1), torch.rand(5, 2).double()
    model[0].weight.requires_grad_(False)
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = JacobianReader(list(named.values()), list(named)).evaluate(lambda: {"a": model(points)})
    values = model(points).flatten()
    for rows, parameter in zip(found.rows, named.values(), strict=True):
        close(rows, torch.stack([torch.autograd.grad(v, parameter, retain_graph=True)[0] for v in values]), 1e-12)


def test_residuals_from_before_the_function_are_refused() -> None:
    model = network(2, 4, 1)
    early = model(torch.rand(5, 2).double())
    reader = reader_of(model)
    torch.autograd.grad(early.sum(), list(model.parameters()))  # the graph is gone
    with pytest.raises(ArgumentError, match="inside of the function"):
        reader.evaluate(lambda: {"a": early})


@pytest.mark.parametrize("coupled", [False, True])
def test_residuals_that_leave_the_model_later_are_refused(coupled: bool) -> None:
    """Also where rows are not compared any more: a Jacobian of zeros would stop the training silently."""
    model, other, points = network(2, 4, 1), network(2, 4, 1, seed=1), torch.rand(5, 2).double()
    reader = reader_of(model)

    def of(asked: nn.Module) -> Mapping[str, Any]:
        return {"a": asked(points).flip(0) if coupled else asked(points)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        reader.evaluate(lambda: of(model))
    with pytest.raises(ArgumentError, match="does not depend on the model's parameters"):
        reader.evaluate(lambda: of(other), look=False)
    with pytest.raises(ArgumentError, match="does not depend on the model's parameters"):
        reader.products(lambda: of(other), model)


def test_a_square_block_is_asked_about() -> None:
    """(N, 1) minus (N,) is (N, N): every point is paired with every other."""
    model, points = network(2, 3, 1), torch.rand(6, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        with pytest.warns(osc.LossWarning, match="every other"):
            reader_of(model).evaluate(lambda: {"fit": model(points) - points[:, 0]})
