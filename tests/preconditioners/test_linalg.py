"""The linear-algebra module on matrices with known answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import close, generator_of, random_spd
from osculate.preconditioners.linalg import (
    accumulate_gram_,
    accumulate_homogeneous_gram_,
    add_to_diagonal,
    bfgs_inverse_update_,
    factorisation_dtype,
    inverse_of_many,
    triangular_inverse,
)
from torch import Tensor

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
seeds = st.integers(0, 2**31)


def identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand(matrix.shape)


@given(seeds, st.lists(st.tuples(st.sampled_from([1, 2, 3, 5, 64, 65, 70]), st.integers(0, 3)), min_size=1, max_size=6))
def test_inverses_of_any_mixture_of_sizes(seed: int, shapes: list[tuple[int, int]]) -> None:
    """Stacked or not, alone or together: every request gets its own inverse, in order, in its own shape."""
    generator = generator_of(seed)
    matrices, dampings = [], []
    for order, count in shapes:
        blocks = [random_spd(order, generator) for _ in range(max(1, count))]
        matrices.append(torch.stack(blocks) if count else blocks[0])
        dampings.append(float(torch.rand((), generator=generator)) + 1e-3)
    before = [matrix.clone() for matrix in matrices]
    for matrix, damping, saved, inverse in zip(
        matrices, dampings, before, inverse_of_many(matrices, dampings), strict=True
    ):
        assert torch.equal(matrix, saved) and inverse.rescues == 0
        assert inverse.value.shape == matrix.shape
        close(inverse.value @ add_to_diagonal(matrix, damping), identity_like(matrix), 1e-9)


def test_no_requests() -> None:
    assert inverse_of_many([], []) == []


@pytest.mark.parametrize("neighbours", [0, 2])
@pytest.mark.parametrize(("lowest", "rescues"), [(-0.05, 0), (-0.5, 1), (-5.0, 2), (-50.0, 3), (-500.0, 4)])
def test_failing_matrices_get_tenfold_damping(lowest: float, rescues: int, neighbours: int) -> None:
    """Indefinite by ``lowest`` with damping 0.1; good neighbours of the same order are not touched by the rescue."""
    bad = torch.diag(torch.tensor([lowest, 1.0, 2.0], dtype=torch.float64))
    good = [random_spd(3, generator_of(k)) for k in range(neighbours)]
    results = inverse_of_many([bad, *good], [0.1] * (1 + neighbours))
    assert [entry.rescues for entry in results] == [rescues] + [0] * neighbours
    close(results[0].value @ add_to_diagonal(bad, 0.1 * 10**rescues), identity_like(bad))
    for matrix, entry in zip(good, results[1:], strict=True):
        close(entry.value @ add_to_diagonal(matrix, 0.1), identity_like(matrix), 1e-9)


@pytest.mark.parametrize("value", [-1e6, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 0), (2, 2)])
def test_hopeless_matrices_get_none(value: float, place: tuple[int, int]) -> None:
    bad, good = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    bad[place] = bad[place[1], place[0]] = value
    failed, kept = inverse_of_many([bad, good], [0.1, 0.1])
    assert failed.value is None and failed.rescues == 4
    assert kept.rescues == 0
    close(kept.value, good / 1.1)


def test_one_bad_block_of_a_stack_is_rescued_with_its_request() -> None:
    stack = torch.stack([torch.eye(2, dtype=torch.float64), -0.5 * torch.eye(2, dtype=torch.float64)])
    other = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    rescued, untouched = inverse_of_many([stack, other], [0.1, 0.1])
    assert (rescued.rescues, untouched.rescues) == (1, 0)
    close(rescued.value, torch.stack([torch.eye(2) / 2, torch.eye(2) / 0.5]))
    close(untouched.value, other / 1.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_factorised_in_single(dtype: torch.dtype) -> None:
    assert factorisation_dtype(dtype) == torch.float32
    assert factorisation_dtype(torch.float64) == torch.float64
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=dtype)
    (inverse,) = inverse_of_many([matrix], [0.5])
    assert inverse.value.dtype == dtype
    torch.testing.assert_close(
        inverse.value.double(), torch.linalg.inv(matrix.double() + 0.5 * torch.eye(2)), atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize("size", [1, 2, 255, 256, 511, 512, 513, 767, 768, 1023, 1025, 1281])
@pytest.mark.parametrize("case", ["plain", "view", "transposed rows", "forget"])
def test_gram_panels_equal_the_plain_product(size: int, case: str) -> None:
    generator = generator_of(size)
    rows = torch.randn(7, size, generator=generator, dtype=torch.float64)
    old = torch.randn(size, size, generator=generator, dtype=torch.float64)
    old = old + old.T
    keep, add = (0.0, 1.0) if case == "forget" else (0.9, 0.3)
    expected = keep * old + add * rows.T @ rows
    matrix = old.clone()
    if case == "view":
        frame = torch.full((size + 3, size + 5), 7.0, dtype=torch.float64)
        frame[:size, :size] = old
        matrix = frame[:size, :size]
    if case == "transposed rows":
        rows = rows.T.contiguous().T
    if case == "forget":
        matrix.fill_(float("nan"))  # what is forgotten must not matter
    accumulate_gram_(matrix, rows, keep, add)
    close(matrix, expected)
    close(matrix, matrix.T)
    if case == "view":
        assert (frame[size:] == 7).all() and (frame[:, size:] == 7).all()


@pytest.mark.parametrize("size", [1, 3, 511, 512, 770])
def test_homogeneous_gram_equals_rows_with_a_one(size: int) -> None:
    generator = generator_of(size)
    rows = torch.randn(6, size, generator=generator, dtype=torch.float64)
    extended = torch.cat([rows, rows.new_ones(6, 1)], 1)
    old = torch.randn(size + 1, size + 1, generator=generator, dtype=torch.float64)
    old = old + old.T
    matrix = old.clone()
    accumulate_homogeneous_gram_(matrix, rows, 0.7, 0.2)
    close(matrix, 0.7 * old + 0.2 * extended.T @ extended)
    close(matrix, matrix.T)


@given(seeds, st.integers(2, 8))
def test_bfgs_update_satisfies_the_secant_equation(seed: int, size: int) -> None:
    generator = generator_of(seed)
    H, B = random_spd(size, generator), random_spd(size, generator)
    s = torch.randn(size, generator=generator, dtype=torch.float64)
    y = B @ s
    rho, eye = 1 / (s @ y), torch.eye(size, dtype=torch.float64)
    left = eye - rho * torch.outer(s, y)
    expected = left @ H @ left.T + rho * torch.outer(s, s)
    updated = H.clone()
    bfgs_inverse_update_(updated, s, y, H @ y, TRUE)
    scale = float(expected.norm())
    close(updated / scale, expected / scale, 1e-9)
    close(updated / scale, updated.T / scale, 1e-14)
    close(updated @ y / scale, s / scale, 1e-9)
    assert torch.linalg.eigvalsh(updated)[0] > 0


@pytest.mark.parametrize("spoil", ["rejected", "zero curvature", "nan step", "inf change", "overflow", "nan product"])
def test_bfgs_update_refuses_what_is_not_finite(spoil: str) -> None:
    H = random_spd(4, generator_of(3))
    s, y = torch.randn(2, 4, generator=generator_of(4), dtype=torch.float64)
    y = y + 2 * s
    product, accept = H @ y, TRUE
    if spoil == "rejected":
        accept = FALSE
    if spoil == "zero curvature":
        y = y - s * (s @ y) / (s @ s)
        y = torch.zeros_like(y)
    if spoil == "nan step":
        s[1] = float("nan")
    if spoil == "inf change":
        y[2] = float("inf")
    if spoil == "overflow":
        s, y = 1e200 * s, 1e-200 * y
    if spoil == "nan product":
        product[0] = float("nan")
    updated = H.clone()
    bfgs_inverse_update_(updated, s, y, product, accept)
    assert torch.equal(updated, H)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_triangular_inverse(size: int) -> None:
    upper = torch.randn(size, size, dtype=torch.float64).triu() + 3 * torch.eye(size, dtype=torch.float64)
    inverse = triangular_inverse(upper)
    close(inverse @ upper, torch.eye(size, dtype=torch.float64))
    close(inverse, inverse.triu())


def test_adding_to_the_diagonal_copies() -> None:
    stack = torch.zeros(2, 3, 3)
    result = add_to_diagonal(stack, 2.0)
    assert not stack.any()
    close(result, 2 * torch.eye(3).expand(2, 3, 3))
