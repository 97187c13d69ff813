"""Problems with a known optimum, and the language model."""

import numpy as np
import pytest
import torch
from osculate.errors import ArgumentError, NumericalError
from osculate.experiments.data.grammar import ALPHABET, encode, write_text
from osculate.experiments.problems import Data, get_problem
from osculate.experiments.problems.known import logistic_optimum
from osculate.experiments.runs.config import RunConfig
from osculate.experiments.runs.training import prepare
from scipy.optimize import minimize


def test_the_optimum_of_the_logistic_regression_is_scipys() -> None:
    data = get_problem("logistic", size="small").load(None)
    inputs = np.c_[data.train_inputs.double().numpy(), np.ones(len(data.train_inputs))]
    labels = data.train_targets.double().numpy().ravel()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = inputs @ weights
        value = np.mean(np.logaddexp(0, logits) - labels * logits)
        return value, inputs.T @ (1 / (1 + np.exp(-logits)) - labels) / len(labels)

    found = minimize(loss, np.zeros(9), jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-12})
    assert 0 <= found.fun - logistic_optimum(data) + 1e-12 < 1e-9
    assert 0.1 < logistic_optimum(data) < np.log(2)


def test_classes_that_can_be_separated_have_no_optimum() -> None:
    inputs = torch.linspace(-1, 1, 20).unsqueeze(1)
    data = Data(inputs, (inputs > 0).float(), inputs, (inputs > 0).float())
    with pytest.raises(NumericalError, match="separated"):
        logistic_optimum(data)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_the_hessian_of_the_quadratic_has_the_chosen_spectrum(condition: float) -> None:
    problem = get_problem("quadratic", size="small", condition=condition)
    data = problem.load(None)
    for inputs in (data.train_inputs.double(), data.test_inputs.double()):
        eigenvalues = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs)).flip(0)
        expected = torch.logspace(0, -np.log10(condition), 10, dtype=torch.float64)
        torch.testing.assert_close(eigenvalues, expected, rtol=1e-4, atol=1e-6)
    assert problem.optimum is not None
    solution = torch.linalg.solve(data.train_inputs.T @ data.train_inputs, data.train_inputs.T @ data.train_targets)
    residual = 0.5 * float((data.train_inputs @ solution - data.train_targets).square().mean())
    assert abs(problem.optimum(data) - residual) < 1e-6


def test_a_condition_below_one_is_refused() -> None:
    with pytest.raises(ArgumentError, match="condition"):
        get_problem("quadratic", condition=0.5)


@pytest.mark.parametrize(("name", "method"), [("quadratic", "ngd-exact"), ("logistic", "kfac")])
def test_metrics_tell_the_distance_from_the_optimum(name: str, method: str) -> None:
    problem = get_problem(name, size="small")
    options = {"limit": float("inf")} if method == "kfac" else {}
    config = RunConfig(name, method, damping=1e-3, lr=0.5, method_options=options)
    run = prepare(config, problem, problem.load(None))
    before = run.evaluate().suboptimality
    for _ in range(60):
        run.step()
    metrics = run.evaluate()
    assert before is not None
    assert metrics.suboptimality is not None
    assert -1e-6 < metrics.suboptimality < 0.1 * before
    assert metrics.as_dict()["suboptimality"] == metrics.suboptimality
    assert run.order.batches_per_epoch == 1


def test_the_text_is_of_its_alphabet_and_of_its_seed() -> None:
    text = write_text(3000, 4)
    assert len(text) == 3000
    assert text == write_text(3000, 4) != write_text(3000, 5)
    assert [ALPHABET[code] for code in encode(text)] == list(text)
    assert len(set(text)) > 20
    assert ",," not in text and " ." not in text


def test_the_transformer_sees_the_past_only() -> None:
    problem = get_problem("char-transformer", size="small")
    data = problem.load(None)
    assert torch.equal(data.train_inputs[0, 1:], data.train_targets[0, :-1])
    model = problem.build_model(0)
    changed = data.train_inputs[:4].clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % len(ALPHABET)
    first, second = model(data.train_inputs[:4]), model(changed)
    assert first.shape == (4, 16, len(ALPHABET))
    torch.testing.assert_close(first[:, :9], second[:, :9])
    assert not torch.allclose(first[:, 9:], second[:, 9:])


def test_the_loss_of_a_sequence_is_a_sum_over_its_characters() -> None:
    problem = get_problem("char-transformer", size="small")
    logits, classes = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    expected = torch.stack(
        [-row.log_softmax(-1)[range(5), right].sum() for row, right in zip(logits, classes, strict=True)]
    )
    torch.testing.assert_close(problem.loss(logits, classes), expected.mean())
    run = prepare(RunConfig("char-transformer", "adam"), problem, problem.load(None))
    metrics = run.evaluate()
    assert metrics.valid_loss is not None and metrics.valid_accuracy is not None and metrics.test_accuracy is not None
    assert abs(metrics.valid_loss / (16 * np.log(len(ALPHABET))) - 1) < 0.2
    assert 0 <= metrics.test_accuracy < 0.3
