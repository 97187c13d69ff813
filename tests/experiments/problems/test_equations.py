"""Problems of residuals: solutions satisfy the equations, points lie where they should, runs tell the error."""

import dataclasses
import json
import math
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from osculate import registry
from osculate.curvature.residuals.residual import read_residuals, total_loss
from osculate.errors import ArgumentError
from osculate.experiments.problems import PROBLEMS, ResidualProblem, get_problem
from osculate.experiments.problems.equations import burgers_solution
from osculate.experiments.runs.config import Budget, RunConfig
from osculate.experiments.runs.evaluation import relative_error
from osculate.experiments.runs.objectives import chosen_backend, objective
from osculate.experiments.runs.records import RunFolder
from osculate.experiments.runs.reopen import probes, reopen
from osculate.experiments.runs.runs import Resume, run_in_folder
from osculate.experiments.runs.training import prepare
from rich.console import Console
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, of torch.func
EQUATIONS = [name for name in PROBLEMS if isinstance(get_problem(name), ResidualProblem)]
VISCOSITY = 0.01 / math.pi


def sine_product(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod()


def cosine_sum(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).sum()


def decaying_sine(x: Tensor) -> Tensor:
    return torch.exp(-(math.pi**2) * x[0] / 4) * torch.sin(math.pi * x[1])


def laplacian(u, x: Tensor) -> Tensor:
    return torch.func.hessian(u)(x).trace()


def heat(u, x: Tensor) -> Tensor:
    return torch.func.grad(u)(x)[0] - torch.func.hessian(u)(x)[1, 1] / 4


def burgers(u, x: Tensor) -> Tensor:
    slope = torch.func.grad(u)(x)
    return slope[0] + u(x) * slope[1] - VISCOSITY * torch.func.hessian(u)(x)[1, 1]


OPERATORS = {
    "poisson-2d": (laplacian, sine_product),
    "poisson-5d": (laplacian, cosine_sum),
    "heat-1d": (heat, decaying_sine),
    "burgers-1d": (burgers, None),
}


def small(name: str, **options):
    problem = get_problem(name, size="small", **options)
    return problem, problem.load(None), problem.build_model(0)


@pytest.mark.parametrize("name", EQUATIONS)
def test_residuals_are_the_operator_of_the_network_less_that_of_the_solution(name):
    """So the solution satisfies the equation; the operator is torch.func's, point by point."""
    problem, data, model = small(name)
    operator, solution = OPERATORS[name]
    inside = data.train_inputs[data.train_targets == 0][:20]
    expected = torch.stack([operator(lambda x: model(x).squeeze(), point) for point in inside])
    if solution is not None:
        expected = expected - torch.stack([operator(solution, point) for point in inside])
    found = problem.residuals(model, inside, torch.zeros(20))()["interior"].values
    torch.testing.assert_close(found.squeeze(1), expected.detach(), rtol=1e-10, atol=1e-10, check_layout=False)


@pytest.mark.parametrize("name", [name for name in EQUATIONS if name != "burgers-1d"])
def test_values_on_the_boundary_and_of_the_evaluation_are_the_solutions(name):
    problem, data, model = small(name)
    solution = torch.func.vmap(OPERATORS[name][1])
    edge = data.train_inputs[data.train_targets == 1]
    found = problem.residuals(model, edge, torch.ones(len(edge)))()["boundary"].values
    torch.testing.assert_close(found, model(edge) - solution(edge).unsqueeze(1))
    torch.testing.assert_close(data.test_targets, solution(data.test_inputs).unsqueeze(1))
    if name == "heat-1d":
        assert float(torch.stack([heat(decaying_sine, x) for x in data.test_inputs[:50]]).abs().max()) < 1e-12


def test_the_solution_of_burgers_equation_satisfies_it_and_starts_and_ends_right():
    points = torch.cartesian_prod(
        *[torch.linspace(a, b, n, dtype=torch.float64) for a, b, n in ((0, 1, 21), (-1, 1, 101))]
    )
    times, places = points.numpy().T
    found = burgers_solution(points).squeeze(1).numpy()
    np.testing.assert_allclose(found[times == 0], -np.sin(np.pi * places[times == 0]), atol=1e-14)
    assert np.abs(found[np.abs(places) == 1]).max() < 1e-12
    np.testing.assert_allclose(found.reshape(21, 101), -found.reshape(21, 101)[:, ::-1], atol=1e-12)
    nodes = np.linspace(-14, 14, 4001)  # the rule of trapezoids converges exponentially here
    shifted = np.pi * (places[:, None] - np.sqrt(4 * VISCOSITY * times[:, None]) * nodes)
    powers = -np.cos(shifted) / (2 * np.pi * VISCOSITY) - nodes**2
    shares = np.exp(powers - powers.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, -(np.sin(shifted) * shares).sum(1) / shares.sum(1), atol=1e-12)
    h, away = 1e-4, points[(points[:, 0] > 0.05) & (points[:, 0] < 0.95) & (points[:, 1].abs() < 0.95)]
    step = {"t": torch.tensor([h, 0.0]), "x": torch.tensor([0.0, h])}
    ahead, behind = ({k: burgers_solution(away + sign * s.double()) for k, s in step.items()} for sign in (1, -1))
    here = burgers_solution(away)
    slope = {k: (ahead[k] - behind[k]) / (2 * h) for k in step}
    terms = slope["t"], here * slope["x"], -VISCOSITY * (ahead["x"] - 2 * here + behind["x"]) / h**2
    assert float(sum(terms).abs().max()) < 1e-4 * float(max(term.abs().max() for term in terms))


@pytest.mark.parametrize(
    ("name", "interior", "boundary", "dimensions", "parameters", "evaluated"),
    [
        ("poisson-2d", 900, 120, 2, 257, 9000),
        ("heat-1d", 900, 120, 2, 257, 9000),
        ("poisson-5d", 3000, 500, 5, 449, 30000),
        ("burgers-1d", 4000, 200, 2, 921, 25600),
    ],
)
def test_sizes_are_those_of_the_literature(name, interior, boundary, dimensions, parameters, evaluated):
    problem = get_problem(name)
    data, model = problem.load(None), problem.build_model(0)
    assert [int((data.train_targets == kind).sum()) for kind in (0, 1)] == [interior, boundary]
    assert data.train_inputs.shape == (interior + boundary, dimensions)
    assert data.test_inputs.shape == (evaluated, dimensions) and data.test_targets.shape == (evaluated, 1)
    assert sum(value.numel() for value in model.parameters()) == parameters
    values = (data.train_inputs, data.test_inputs, data.test_targets, *model.parameters())
    assert {value.dtype for value in values} == {torch.float64}
    assert problem.target.metric == "relative_l2"


def test_the_regression_has_more_parameters_than_samples():
    problem = get_problem("sine-regression")
    data = problem.load(None)
    assert (len(data.train_inputs), sum(p.numel() for p in problem.build_model(0).parameters())) == (200, 501)
    points = data.train_inputs
    assert torch.equal(data.train_targets, torch.sin(math.pi * points).prod(1, keepdim=True))
    assert -1 <= float(points.min()) < -0.9 < 0.9 < float(points.max()) <= 1


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_lie_within_and_on_the_boundary_and_depend_on_their_seed_alone(name):
    _, data, _ = small(name)
    low = torch.tensor([0.0, -1.0] if name == "burgers-1d" else [0.0]).double()
    points, kinds = data.train_inputs, data.train_targets
    assert bool(((points >= low) & (points <= 1)).all())
    on_side = (points == low) | (points == 1)
    if name in ("heat-1d", "burgers-1d"):
        on_side[:, 0] = points[:, 0] == 0  # nothing is given at the end of time
        starts = on_side[kinds == 1][:, 0]
        assert int(starts.sum()) == len(starts) // 2
    assert bool(on_side[kinds == 1].any(1).all()) and not bool(on_side[kinds == 0].any())
    sides = [bool((points[kinds == 1][:, k] == side).any()) for k in range(1, points.shape[1]) for side in (low[-1], 1)]
    assert all(sides)
    again, other = small(name)[1], small(name, data_seed=1)[1]
    assert torch.equal(again.train_inputs, points) and torch.equal(again.test_inputs, data.test_inputs)
    assert not torch.equal(other.train_inputs, points) and torch.equal(other.test_inputs, data.test_inputs)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_loss_is_half_the_mean_square_of_each_equation_and_its_gradient_is_right(name):
    problem, data, model = small(name)
    closure = problem.residuals(model, data.train_inputs, data.train_targets)
    assert list(closure()) == ["interior", "boundary"]
    loss = problem.training_loss(model, data.train_inputs, data.train_targets)
    torch.testing.assert_close(loss, sum(0.5 * entry.values.square().mean() for entry in closure().values()))
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    torch.manual_seed(1)
    direction = [torch.randn_like(value) for value in gradient]
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            moved = [p + sign * 1e-5 * d for p, d in zip(model.parameters(), direction, strict=True)]
        other = problem.build_model(0)
        for parameter, value in zip(other.parameters(), moved, strict=True):
            parameter.data = value
        losses.append(float(problem.training_loss(other, data.train_inputs, data.train_targets).detach()))
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_an_equation_without_points_in_a_mini_batch_is_left_out():
    problem, data, model = small("heat-1d")
    found = problem.residuals(model, data.train_inputs[:7], data.train_targets[:7])()
    assert list(found) == ["interior"] and len(found["interior"].values) == 7


def test_the_relative_error_is_a_ratio_of_norms_and_of_those_problems_alone():
    problem, data, model = small("poisson-2d")
    found = relative_error(model, problem, data.test_inputs, data.test_targets)
    with torch.no_grad():
        error = model(data.test_inputs) - data.test_targets
    assert found == pytest.approx(float(error.norm() / data.test_targets.norm()), rel=1e-12)
    zero = nn.Sequential(nn.Linear(2, 1)).double()
    nn.init.zeros_(zero[0].weight), nn.init.zeros_(zero[0].bias)
    assert relative_error(zero, problem, data.test_inputs, data.test_targets) == 1.0
    assert relative_error(model, get_problem("quadratic", size="small"), data.test_inputs, data.test_targets) is None


def trained(path: Path, name: str, method: str, epochs: int, **given) -> list[dict]:
    options = {"size": "small"} | given.pop("problem_options", {})
    config = RunConfig(name, method, problem_options=options, **given)
    run_in_folder(config, Budget(epochs), RunFolder(path), None, Resume.AUTO, Console(file=StringIO()))
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "method", "given"),
    [
        ("poisson-2d", "lm", {}),
        ("heat-1d", "ssbroyden", {}),
        ("burgers-1d", "spring", {}),
        ("poisson-5d", "kfac", {"lr": 0.1}),
        ("heat-1d", "kbfgs", {}),
        ("poisson-2d", "adam", {"lr": 0.01}),
        ("poisson-2d", "adam", {"problem_options": {"resample": True}}),
        ("poisson-2d", "lm", {"problem_options": {"resample": True}}),
        ("sine-regression", "lm", {}),
        ("sine-regression", "bfgs", {}),
        ("tabular-regression", "lm", {"batch_size": 100}),
    ],
)
def test_runs_tell_the_error_and_continue_bit_for_bit(name, method, given, tmp_path):
    epochs = 1 if name == "tabular-regression" else 20
    whole = trained(tmp_path / "whole", name, method, 2 * epochs, **given)
    trained(tmp_path / "parts", name, method, epochs, **given)
    parts = trained(tmp_path / "parts", name, method, 2 * epochs, **given)
    counted = [[line["gradient_evaluations"] for line in lines] for lines in (whole, parts)]
    assert all(0 <= b - a <= 1 for a, b in zip(*counted, strict=True))  # one that continues first counts the residuals
    clocks = ("seconds", "peak_memory_bytes", "warm_start_seconds", "gradient_evaluations")
    assert [{k: v for k, v in line.items() if k not in clocks} for line in whole] == [
        {k: v for k, v in line.items() if k not in clocks} for line in parts
    ]
    first, last = (torch.load(tmp_path / part / "checkpoint.pt")["model"] for part in ("whole", "parts"))
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert whole[-1]["train_loss"] < whole[0]["train_loss"]
    assert ("relative_l2" in whole[-1]) is (name != "tabular-regression")
    if epochs == 20:
        assert [line["epoch"] for line in whole] == [0, 10, 20, 30, 40]
        steps = whole[-1]["iterations"]
        assert steps == 40 and whole[-1]["gradient_evaluations"] >= 40


def test_least_squares_solves_the_small_problems(tmp_path):
    for name, bound in {"poisson-2d": 1e-3, "heat-1d": 1e-2, "poisson-5d": 0.1}.items():
        last = trained(tmp_path / name, name, "lm", 60)[-1]
        assert last["relative_l2"] < bound, name
        assert last["test_loss"] == pytest.approx(
            0.5 * last["relative_l2"] ** 2 * float(small(name)[1].test_targets.square().mean()), rel=1e-6
        )


def test_the_configuration_of_a_run_names_the_points_of_evaluation(tmp_path):
    trained(tmp_path, "poisson-2d", "lm", 10)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["test_set"] == "1000 points, against the solution" and config["lr"] is None
    assert config["damping"] == 1e-3 and config["training_samples"] == 140
    assert config["method_options"] == {"system": None, "geodesic": True}


def test_a_step_is_given_residuals_or_a_loss():
    problem, data, _ = small("poisson-2d")
    loss = float(problem.training_loss(problem.build_model(0), data.train_inputs, data.train_targets).detach())
    for method, reads in {
        "lm": True,
        "bfgs": True,
        "kfac": True,
        "kbfgs": True,
        "adam": False,
        "mini-block-lbfgs": False,
    }.items():
        run = prepare(RunConfig("poisson-2d", method, problem_options={"size": "small"}), problem, data)
        found = objective(problem, run.optimizer, run.model, data.train_inputs, data.train_targets)()
        assert isinstance(found, dict) is reads, method
        value = total_loss(read_residuals(found)) if reads else found
        assert float(value.detach()) == pytest.approx(loss, rel=1e-12), method


def test_least_squares_takes_the_errors_of_a_gaussian_likelihood():
    problem, data, _ = small("tabular-regression")
    run = prepare(RunConfig("tabular-regression", "lm", problem_options={"size": "small"}), problem, data)
    found = objective(problem, run.optimizer, run.model, data.train_inputs, data.train_targets)()
    loss = problem.loss(run.model(data.train_inputs), data.train_targets)
    torch.testing.assert_close(total_loss(read_residuals(found)), loss)


def refused(name: str, method: str, **given) -> str:
    problem, data, _ = small(name)
    with pytest.raises(ArgumentError) as raised:
        prepare(RunConfig(name, method, problem_options={"size": "small"}, **given), problem, data)
    return str(raised.value)


@pytest.mark.parametrize("method", ["kfac", "joint-kfac", "kbfgs", "ekfac", "ngd-exact"])
@pytest.mark.parametrize("backend", ["hooks", "func", "backpack"])
def test_a_method_that_would_measure_another_loss_is_refused_by_name_with_the_way_out(method, backend):
    said = refused("heat-1d", method, method_options={"backend": backend})
    assert f"'{method}' would be wrong" in said and "'heat-1d' contains derivatives" in said
    assert f"backend='{backend}' measures" in said and "leave the backend out" in said
    assert all(word in said for word in ("lm", "ssbroyden"))


def test_whoever_measures_layers_is_given_the_residuals_and_whoever_reads_gradients_the_loss():
    problem = get_problem("heat-1d", size="small")
    found = {name: chosen_backend(problem, name, registry.method(name), None) for name in registry.methods()}
    assert all(found[name] == "residuals" for name in ("kfac", "ekfac", "kbfgs", "joint-kfac", "lw-sgdm", "tnt"))
    assert all(found[name] == "hooks" for name in ("adam", "sgdm", "muon", "soap", "mbf", "mini-block-lbfgs"))
    by_products = registry.method("lw-sgdm", curvature="exact-hessian")  # of the loss itself, whatever it contains
    assert chosen_backend(problem, "lw-sgdm", by_products, None) == "hooks"
    ordinary = get_problem("digits-classifier")
    assert {chosen_backend(ordinary, name, registry.method(name), None) for name in registry.methods()} == {"hooks"}
    assert chosen_backend(ordinary, "kfac", registry.method("kfac"), "func") == "func"


def test_other_combinations_that_make_no_sense_are_refused_by_name():
    said = refused("digits-classifier", "lm")
    assert "'lm' solves for residuals" in said and "categorical" in said and "ssbroyden" in said
    said = refused("digits-classifier", "kfac", method_options={"backend": "residuals"})
    assert "'digits-classifier' has none" in said
    assert "takes no lr" in refused("poisson-2d", "lm", lr=0.1)
    assert "no schedule" in refused("poisson-2d", "bfgs", lr_schedule="cosine")
    assert "have no place in it" in refused("poisson-2d", "lm", parts={"momentum": "NoMomentum"})
    problem, data, _ = small("poisson-2d", resample=True)
    with pytest.raises(ArgumentError, match="leave the batch size out"):
        prepare(RunConfig("poisson-2d", "adam", batch_size=10), problem, data)
    for wrong in ({"data_seed": -1}, {"resample": "yes"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            get_problem("heat-1d", **wrong)
    with pytest.raises(ArgumentError, match="points"):
        get_problem("burgers-1d", points=0)


def test_measurements_of_layers_say_why_there_are_none(tmp_path):
    trained(tmp_path / "lm", "poisson-2d", "lm", 10)
    with pytest.raises(ArgumentError, match="'lm' works on all parameters at once"):
        _ = reopen(RunFolder(tmp_path / "lm"), None).composed
    problem, data, _ = small("poisson-2d")
    with pytest.raises(ArgumentError, match="'poisson-2d' is one of residuals"):
        probes(problem, data, 10, 1)


def test_points_that_are_drawn_anew_are_others_at_every_step_and_the_same_for_every_method():
    seen: dict[str, list[Tensor]] = {"adam": [], "sgdm": []}
    for method, points in seen.items():
        problem, data, _ = small("heat-1d", resample=True)

        def watched(model, inputs, kinds, points=points, inner=problem.equations["interior"]):
            points.append(inputs)
            return inner(model, inputs)

        problem = dataclasses.replace(
            problem, equations=problem.equations | {"interior": partial(lambda f, m, x: f(m, x, None), watched)}
        )
        run = prepare(RunConfig("heat-1d", method), problem, data)
        for _ in range(3):
            run.step()
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))
    assert len(seen["adam"]) == 3 and not torch.equal(seen["adam"][0], seen["adam"][1])
    assert not torch.equal(seen["adam"][0], small("heat-1d")[1].train_inputs[:100])
