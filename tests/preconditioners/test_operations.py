"""Matrix operations on matrices with known answers, alone and in mixed requests."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate import ArgumentError
from osculate.preconditioners import AbsoluteInverse, Eigenvectors, Inverse, InverseRoot, PowerIteration, Request
from osculate.preconditioners.operations import Operation, compute_many
from torch import Tensor

seeds = st.integers(0, 2**31)
orders = st.sampled_from([1, 2, 3, 5, 64, 65])


def power(matrix: Tensor, exponent: float) -> Tensor:
    """By the definition, one matrix at a time."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


@given(seeds, st.lists(orders, min_size=1, max_size=5), st.sampled_from([1.0, 2.0, 4.0, 3.5]))
def test_inverse_roots(seed: int, sizes: list[int], p: float) -> None:
    """The p-th power of the root is the inverse; stacked with others or not."""
    generator = generator_of(seed)
    matrices = [random_spd(size, generator) for size in sizes]
    results = compute_many([Request(matrix, 0.1, InverseRoot(p)) for matrix in matrices])
    for matrix, result in zip(matrices, results, strict=True):
        damped = matrix + 0.1 * torch.eye(len(matrix))
        assert result.value is not None and (result.rescues, result.damping) == (0, 0.1)
        close(power(result.value, p) @ damped, torch.eye(len(matrix), dtype=torch.float64), 1e-8)


@given(seeds, st.lists(st.tuples(orders, st.integers(0, 4)), min_size=1, max_size=8))
def test_mixed_requests_are_answered_in_order(seed: int, asked: list[tuple[int, int]]) -> None:
    """Different operations, sizes and dampings side by side give what each gives alone; nothing is modified."""
    generator = generator_of(seed)
    operations = [Inverse(), InverseRoot(4), AbsoluteInverse(), Eigenvectors(), PowerIteration()]
    requests = []
    for order, index in asked:
        start = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))[0]
        damping = float(torch.rand((), generator=generator)) + 0.01
        requests.append(Request(random_spd(order, generator), damping, operations[index], start))
    before = [request.matrix.clone() for request in requests]
    for request, matrix, result in zip(requests, before, compute_many(requests), strict=True):
        assert torch.equal(request.matrix, matrix)
        (alone,) = compute_many([request])
        assert result.value is not None and alone.value is not None and result.value.shape == matrix.shape
        close(result.value, alone.value, 1e-9)
        assert result.damping == request.damping


def test_a_stack_of_matrices_is_one_request() -> None:
    stack = torch.stack([random_spd(3, generator_of(k)) for k in range(4)])
    for operation in (Inverse(), InverseRoot(2), AbsoluteInverse(), Eigenvectors()):
        (together,) = compute_many([Request(stack, 0.2, operation)])
        alone = compute_many([Request(matrix, 0.2, operation) for matrix in stack])
        close(together.value, torch.stack([result.value for result in alone]))


@given(seeds, orders)
def test_absolute_inverse_of_an_indefinite_matrix(seed: int, order: int) -> None:
    generator = generator_of(seed)
    basis = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))[0]
    values = torch.randn(order, generator=generator, dtype=torch.float64)
    (result,) = compute_many([Request((basis * values) @ basis.T, 0.3, AbsoluteInverse())])
    close(result.value, (basis / (values.abs() + 0.3)) @ basis.T, 1e-9)


@given(seeds, orders)
def test_eigenvectors_largest_first(seed: int, order: int) -> None:
    matrix = random_spd(order, generator_of(seed))
    (result,) = compute_many([Request(matrix, 0.0, Eigenvectors())])
    close(result.value.T @ result.value, torch.eye(order, dtype=torch.float64))
    close((result.value * result.spectrum) @ result.value.T, matrix, 1e-8)
    assert (result.spectrum.diff() <= 0).all()


def test_power_iteration_converges_and_keeps_its_columns() -> None:
    """Repeated, it finds the eigenvectors; a start that is a permuted eigenbasis stays, column by column."""
    matrix = random_spd(6, generator_of(3), condition=1e4)
    (exact,) = compute_many([Request(matrix, 0.0, Eigenvectors())])
    permuted = exact.value[:, [3, 0, 5, 1, 2, 4]]
    (kept,) = compute_many([Request(matrix, 0.0, PowerIteration(), permuted)])
    close(kept.value, permuted, 1e-8)
    close(kept.spectrum, exact.spectrum[[3, 0, 5, 1, 2, 4]], 1e-5)  # the shift moves them all alike
    basis = torch.eye(6, dtype=torch.float64)
    errors = []
    for _ in range(40):
        (step,) = compute_many([Request(matrix, 0.0, PowerIteration(), basis)])
        basis = step.value
        inside = basis.T @ matrix @ basis
        errors.append(float((inside - inside.diag().diag()).norm()))
    assert errors[-1] < 1e-2 * errors[0]
    close(basis.T @ basis, torch.eye(6, dtype=torch.float64))


def test_a_null_space_is_decided_by_ramp_and_shift_not_by_rounding() -> None:
    """Two matrices that differ by rounding, of rank 2: without ramp or shift their bases have nothing in common."""
    rows = torch.randn(2, 6, generator=generator_of(5), dtype=torch.float64)
    noise = 1e-16 * torch.randn(6, 6, generator=generator_of(6), dtype=torch.float64)
    matrices = [rows.T @ rows, rows.T @ rows + noise + noise.T]
    start = torch.linalg.qr(torch.randn(6, 6, generator=generator_of(7), dtype=torch.float64))[0]

    def distance(operation: Operation) -> float:
        one, other = compute_many([Request(matrix, 0.0, operation, start) for matrix in matrices])
        overlap = (one.value * other.value).sum(0).abs()  # column by column, whatever their signs
        return float((1 - overlap).max())

    for robust, fragile in (
        (Eigenvectors(ramp=1.0), Eigenvectors()),
        (PowerIteration(), PowerIteration(shift=0.0)),
    ):
        assert distance(robust) < 1e-10 < 1e-3 < distance(fragile)


@pytest.mark.parametrize("operation", [Inverse(), InverseRoot(4), AbsoluteInverse(), Eigenvectors()])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_none_and_harms_nobody(operation: object, value: float) -> None:
    bad, good = torch.eye(3, dtype=torch.float64), random_spd(3, generator_of(0))
    bad[1, 2] = bad[2, 1] = value
    failed, kept = compute_many([Request(bad, 0.1, operation), Request(good, 0.1, operation)])
    (alone,) = compute_many([Request(good, 0.1, operation)])
    assert failed.value is None
    close(kept.value, alone.value)


def test_power_iteration_of_what_is_not_finite_gives_none() -> None:
    start, bad = torch.eye(2), torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])
    assert compute_many([Request(bad, 0.0, PowerIteration(), start)])[0].value is None


@pytest.mark.parametrize(("lowest", "rescues"), [(-0.05, 0), (-0.5, 1), (-50.0, 3), (-500.0, 4), (-1e6, None)])
def test_roots_of_indefinite_matrices_get_tenfold_damping(lowest: float, rescues: int | None) -> None:
    matrix = torch.diag(torch.tensor([lowest, 1.0, 2.0], dtype=torch.float64))
    (result,) = compute_many([Request(matrix, 0.1, InverseRoot(4))])
    if rescues is None:
        assert result.value is None
        return
    damping = 0.1 * 10**rescues
    assert (result.rescues, result.damping) == (rescues, pytest.approx(damping))
    close(result.value, torch.diag((matrix.diag() + damping) ** -0.25))


def test_rounding_below_zero_is_no_reason_for_a_rescue() -> None:
    vector = torch.randn(30, 1, generator=generator_of(1), dtype=torch.float64)
    matrix = 1e6 * vector @ vector.T
    (result,) = compute_many([Request(matrix, 1e-12, InverseRoot(4))])
    assert result.rescues == 0 and result.value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_factorised_in_single(dtype: torch.dtype) -> None:
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=dtype)
    for operation in (InverseRoot(2), AbsoluteInverse(), Eigenvectors(), PowerIteration()):
        (result,) = compute_many([Request(matrix, 0.5, operation, torch.eye(2, dtype=dtype))])
        (exact,) = compute_many([Request(matrix.double(), 0.5, operation, torch.eye(2, dtype=torch.float64))])
        assert result.value.dtype == dtype
        torch.testing.assert_close(result.value.double(), exact.value, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("p", [0.0, -4.0, float("nan"), float("inf")])
def test_roots_refuse_other_orders(p: float) -> None:
    with pytest.raises(ArgumentError, match="p must lie in"):
        InverseRoot(p)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("failures", [1, 2])
def test_a_decomposition_that_fails_is_tried_in_double_precision(
    failures: int, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LAPACK's does in float32 on matrices with many zero rows; one request's second failure harms no other's."""
    original, calls = torch.linalg.eigh, []

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix.dtype)
        if len(calls) <= failures and silent:
            return original(matrix)[0], torch.full_like(matrix, float("nan"))
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    matrices = [random_spd(4, generator_of(k)).float() for k in range(2)]
    expected = compute_many([Request(matrix, 0.1, InverseRoot(4)) for matrix in matrices])
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = compute_many([Request(matrix, 0.1, InverseRoot(4)) for matrix in matrices])
    assert calls == [torch.float32, torch.float64, torch.float64]
    assert (found[0].value is None) == (failures == 2)
    for one, other in list(zip(found, expected, strict=True))[failures - 1 :]:
        assert one.value.dtype == torch.float32
        close(one.value, other.value, 1e-5)
