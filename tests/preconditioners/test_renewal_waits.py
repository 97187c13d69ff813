"""A renewal launches everything, then looks once: however many matrices there are, and also where some fail."""

import pytest
import torch
from measuring import close, generator_of, random_spd
from osculate.experiments.runs.launches import counting
from osculate.preconditioners import AbsoluteInverse, Eigenvectors, Inverse, InverseRoot, PowerIteration, Request
from osculate.preconditioners.linalg import fetch, inverse_of_many
from osculate.preconditioners.operations import Operation, compute_many

ORDERS = (3, 3, 5, 65, 66, 70)


def waits_of(operation: Operation) -> int:
    """Synchronisations for matrices of several orders; a decomposition itself waits, which is not counted here."""
    matrices = [random_spd(order, generator_of(order)) for order in ORDERS]
    requests = [Request(m, 0.1, operation, torch.eye(len(m), dtype=m.dtype)) for m in matrices]
    own = 0 if isinstance(operation, Inverse | PowerIteration) else len(set(ORDERS))
    with counting() as counter:
        results = compute_many(requests)
        found = counter.read().synchronisations
    assert all(result.value is not None for result in results)
    return found - own


@pytest.mark.parametrize(
    ("operation", "most"),
    [(Inverse(), 1), (PowerIteration(), 1), (AbsoluteInverse(), 2), (Eigenvectors(), 2), (InverseRoot(4), 3)],
)
def test_waits_do_not_grow_with_the_number_of_matrices(operation: Operation, most: int) -> None:
    assert waits_of(operation) <= most


def test_only_what_failed_is_tried_again() -> None:
    """Rescues of different depth in one call: one look per attempt, good matrices are factorised once."""
    matrices = [torch.diag(torch.tensor([low, 1.0, 2.0], dtype=torch.float64)) for low in (-0.05, -0.5, -50.0, 1.0)]
    matrices.append(random_spd(70, generator_of(1)))
    with counting() as counter:
        results = inverse_of_many(matrices, [0.1] * 5)
        assert counter.read().synchronisations == 4
    assert [result.rescues for result in results] == [0, 1, 3, 0, 0]
    for matrix, result in zip(matrices, results, strict=True):
        assert result.value is not None
        damped = matrix + 0.1 * 10.0**result.rescues * torch.eye(len(matrix), dtype=torch.float64)
        close(result.value @ damped, torch.eye(len(matrix), dtype=torch.float64), 1e-9)


def test_fetched_numbers_keep_their_order() -> None:
    assert fetch([torch.tensor([1.0, 2.0]), torch.tensor(3), torch.tensor([[4.0]])]) == [1.0, 2.0, 3.0, 4.0]
    assert fetch([]) == []
