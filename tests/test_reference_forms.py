"""Quadratic forms, joint layer steps, Fisher blocks and convolutions of the transcriptions against dense matrices."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import blocks, exact, joint, kbfgs, kfac, layerwise
from reference.network import BERNOULLI, CATEGORICAL, GAUSSIAN, Batch, Layer, Parameters, as_matrix

seeds = st.integers(0, 2**32 - 1)
RULES = sorted(blocks.AVERAGED)


def small_batch(seed: int, loss: str, n: int = 3, sizes: tuple[int, ...] = (4, 5, 3)) -> tuple[Batch, Parameters]:
    """A tanh network with random weights and a batch of n samples."""
    generator = np.random.default_rng(seed)
    parameters = [
        {"W": generator.standard_normal((o, i)) / np.sqrt(i), "b": 0.3 * generator.standard_normal(o)}
        for i, o in itertools.pairwise(sizes)
    ]
    layers = [Layer("dense", True, ("tanh",)) for _ in sizes[2:]] + [Layer("dense", True, ())]
    x = generator.standard_normal((n, sizes[0]))
    outputs = {
        CATEGORICAL: generator.integers(0, sizes[-1], n),
        BERNOULLI: generator.integers(0, 2, (n, sizes[-1])),
        GAUSSIAN: generator.standard_normal((n, sizes[-1])),
    }
    return Batch(layers, loss, x, outputs[loss]), parameters


def random_directions(seed: int, parameters: Parameters) -> Parameters:
    generator = np.random.default_rng(seed + 1)
    return [{name: generator.standard_normal(value.shape) for name, value in entry.items()} for entry in parameters]


def all_targets(batch: Batch, parameters: Parameters) -> Iterator[tuple[float, np.ndarray]]:
    """Every outcome of the model's own distribution for the whole batch, with its probability."""
    outputs = batch.evaluate(parameters).outputs
    n, classes = outputs.shape
    if batch.loss == CATEGORICAL:
        p = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        for labels in itertools.product(range(classes), repeat=n):
            yield float(np.prod(p[np.arange(n), labels])), np.array(labels)
        return
    p = 1 / (1 + np.exp(-outputs))
    for bits in itertools.product((0, 1), repeat=n * classes):
        targets = np.array(bits).reshape(n, classes)
        yield float(np.prod(np.where(targets == 1, p, 1 - p))), targets


@pytest.mark.parametrize(("loss", "n", "sizes"), [(CATEGORICAL, 3, (4, 5, 3)), (BERNOULLI, 3, (3, 4, 2))])
def test_sampled_forms_are_unbiased(loss: str, n: int, sizes: tuple[int, ...]) -> None:
    batch, parameters = small_batch(5, loss, n, sizes)
    d = random_directions(5, parameters)
    expected = layerwise.exact_gauss_newton_blocks(batch, parameters, d)
    totals, weight = np.zeros((2, len(d))), 0.0
    for probability, targets in all_targets(batch, parameters):
        sampled = batch.resampled(targets)
        totals[0] += probability * layerwise.sampled_fisher(sampled, parameters, d)
        totals[1] += probability * layerwise.sampled_fisher_batch_mean(sampled, parameters, d)
        weight += probability
    assert weight == pytest.approx(1)
    assert totals[0] == pytest.approx(expected, rel=1e-10)
    assert totals[1] == pytest.approx(expected, rel=1e-10)


def test_joint_matrix_is_unbiased_for_the_curvature_between_layers() -> None:
    batch, parameters = small_batch(9, CATEGORICAL)
    unit, norms = joint.normalised(random_directions(9, parameters))
    assert layerwise.layer_inner(unit, unit) == pytest.approx(np.ones(len(unit)))
    GGN, slices, flat = exact.gauss_newton(batch, parameters), exact.layer_slices(unit), exact.flatten(unit)
    D = np.zeros((len(flat), len(slices)))
    for l, part in enumerate(slices):
        D[part, l] = flat[part]
    total = np.zeros((len(slices), len(slices)))
    for probability, targets in all_targets(batch, parameters):
        M = joint.joint_matrix(batch.resampled(targets), parameters, unit)
        assert np.diag(M) == pytest.approx(layerwise.sampled_fisher(batch.resampled(targets), parameters, unit))
        total += probability * M
    assert total == pytest.approx(D.T @ GGN @ D, rel=1e-9, abs=1e-12)
    assert (norms > 0).all()


@settings(max_examples=10)
@given(seeds)
def test_signed_products_average_to_the_exact_blocks(seed: int) -> None:
    batch, parameters = small_batch(seed, GAUSSIAN, sizes=(3, 4, 3, 2))
    d = random_directions(seed, parameters)
    patterns = list(itertools.product((-1.0, 1.0), repeat=len(d)))
    mean = np.mean([layerwise.signed_product(batch, parameters, d, np.array(signs)) for signs in patterns[:4]], axis=0)
    expected = layerwise.exact_hessian_blocks(batch, parameters, d)
    # a pattern and its negative give the same product, so half of them are enough
    assert mean == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert layerwise.row_sums(batch, parameters, d) == pytest.approx(
        layerwise.signed_product(batch, parameters, d, np.ones(len(d))), rel=1e-9, abs=1e-11
    )


@given(seeds)
def test_gauss_newton_equals_the_hessian_of_a_linear_model(seed: int) -> None:
    batch, parameters = small_batch(seed, BERNOULLI, n=5, sizes=(4, 3))
    assert exact.gauss_newton(batch, parameters) == pytest.approx(exact.hessian(batch, parameters), abs=1e-12)


@given(seeds)
def test_one_layer_with_quadratic_loss_gets_the_exact_line_search(seed: int) -> None:
    batch, parameters = small_batch(seed, GAUSSIAN, n=6, sizes=(4, 3))
    d, gradients = random_directions(seed, parameters), batch.evaluate(parameters).gradients
    q = layerwise.exact_gauss_newton_blocks(batch, parameters, d)
    alpha = layerwise.step_sizes(gradients, d, q)
    arrived = batch.evaluate(layerwise.apply(parameters, d, alpha)).gradients
    assert layerwise.layer_inner(arrived, d) == pytest.approx(np.zeros(1), abs=1e-10)


@given(seeds, st.integers(2, 5))
def test_joint_step_is_the_best_combination_of_the_layers(seed: int, count: int) -> None:
    """Least squares in a model linear in its parameters: no combination of the directions does better."""
    generator, n = np.random.default_rng(seed), 12
    jacobians = [generator.standard_normal((n, 3)) for _ in range(count)]
    e = generator.standard_normal(n)
    gradients = [{"W": J.T @ e / n} for J in jacobians]
    directions = [{"W": -g["W"]} for g in gradients]
    unit, _ = joint.normalised(directions)
    images = np.stack([J @ d["W"] for J, d in zip(jacobians, unit, strict=True)], axis=1)
    alpha = joint.joint_step_sizes(gradients, directions, images.T @ images / n, 0.0, 0.0)
    assume((alpha > 0).all())  # the clip at zero gives up optimality
    moves = np.stack([J @ d["W"] for J, d in zip(jacobians, directions, strict=True)], axis=1)
    best, *_ = np.linalg.lstsq(moves, -e, rcond=None)
    assert alpha == pytest.approx(best, rel=1e-6)
    arrived = np.linalg.norm(e + moves @ alpha) ** 2
    largest = max(np.linalg.norm(J, 2) ** 2 for J in jacobians)
    everything = np.concatenate(jacobians, axis=1)
    kappa = max(np.linalg.eigvalsh(everything @ everything.T)[0], 0.0) / largest
    assert arrived <= (1 - kappa / count) * (e @ e) * (1 + 1e-10)


def test_layer_steps_without_the_factor_one_over_layers_can_increase_the_error() -> None:
    increased = 0
    for seed in range(50):
        generator, n = np.random.default_rng(seed), 10
        shared = generator.standard_normal((n, 3))
        jacobians = [shared + 0.1 * generator.standard_normal((n, 3)) for _ in range(4)]
        e = generator.standard_normal(n)
        gradients = [{"W": J.T @ e / n} for J in jacobians]
        d = [{"W": -g["W"]} for g in gradients]
        q = np.array([np.sum((J @ v["W"]) ** 2) / n for J, v in zip(jacobians, d, strict=True)])
        alpha = layerwise.step_sizes(gradients, d, q)
        step = [a * (J @ v["W"]) for a, J, v in zip(alpha, jacobians, d, strict=True)]
        increased += np.linalg.norm(e + sum(step)) > np.linalg.norm(e)
        assert np.linalg.norm(e + sum(step) / 4) <= np.linalg.norm(e)
    assert increased > 10


def test_averages_are_corrected_for_their_start() -> None:
    curvature, matrix = layerwise.CurvatureAverage(0.9), joint.MatrixAverage(0.8)
    for _ in range(3):
        assert curvature.update(np.array([6.0, 4.0]), np.array([2.0, 1.0])) == pytest.approx([3.0, 4.0])
        assert matrix.update(np.eye(2)) == pytest.approx(np.eye(2))
    gradients = [{"W": np.array([[1.0, -2.0]])}]
    momentum, adam = layerwise.MomentumDirection(), layerwise.AdamDirection()
    for _ in range(3):
        assert momentum.propose(gradients)[1][0]["W"] == pytest.approx(np.array([[-1.0, 2.0]]))
        assert adam.propose(gradients)[1][0]["W"] == pytest.approx(np.array([[-1.0, 1.0]]))


@given(seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from(RULES))
def test_blocks_can_be_put_back(seed: int, out: int, columns: int, rule: str) -> None:
    matrix = np.random.default_rng(seed).standard_normal((out, columns))
    vectors = blocks.dense_vectors(matrix, rule)
    assert np.array_equal(blocks.dense_matrix(vectors, rule, matrix.shape), matrix)
    products = blocks.outer_products(vectors, blocks.AVERAGED[rule])
    assert np.trace(products.sum(0) if products.ndim == 3 else len(vectors) * products) == pytest.approx(
        np.sum(matrix**2)
    )


@given(seeds, st.integers(1, 5))
def test_flat_chunks_are_rows_only_in_square_layers(seed: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    square = generator.standard_normal((n, n))
    assert np.array_equal(blocks.dense_vectors(square, "flat_chunk_avg"), blocks.dense_vectors(square, "per_output"))
    wide = generator.standard_normal((2, 3))
    chunks = blocks.dense_vectors(wide, "flat_chunk_avg")
    assert np.array_equal(chunks, np.array([wide[0, :2], [wide[0, 2], wide[1, 0]], wide[1, 1:]]))


def test_a_convolution_over_one_pixel_is_a_dense_layer() -> None:
    generator = np.random.default_rng(2)
    data = generator.standard_normal((12, 3))
    shapes, arrays = [(4, 3), (3, 4)], {"labels": generator.integers(0, 3, 12)}
    for l, shape in enumerate(shapes):
        arrays |= {f"W_init_{l}": generator.standard_normal(shape), f"b_init_{l}": generator.standard_normal(shape[0])}
    arrays["batches"] = np.array([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]] * 4)
    arrays["warm_batches"] = arrays["batches"][:2]
    arrays["fisher_targets"] = generator.integers(0, 3, (8, 6))
    arrays["warm_fisher_targets"] = generator.integers(0, 3, (2, 6))
    dense = {"type": "dense", "bias": True, "then": ["tanh"]}, {"type": "dense", "bias": True, "then": []}
    conv = {"type": "conv", "kernel": 1, "stride": 1, "padding": 0, "bias": True, "then": ["tanh", "flatten"]}, dense[1]
    hyper = {"lr": 0.1, "lambda_damping": 0.2, "momentum_rho": 0.9, "weight_decay_tau": 0.01, "A_decay": 0.9}
    hyper |= {"s_y_decay": 0.9, "powell_alpha": 0.2, "skip_threshold": 1e-4, "statistics_decay": 0.9}
    hyper |= {"inverse_every": 20, "inverse_always_until": 20}
    for algorithm, run in (("K-BFGS", kbfgs.run), ("KFAC", kfac.run)):
        results = []
        for layers, x in ((dense, data), (conv, data[:, :, None, None])):
            inputs = arrays | {"data": x}
            if layers is conv:
                inputs = inputs | {"W_init_0": arrays["W_init_0"][:, :, None, None]}
            meta = {"algorithm": algorithm, "loss": CATEGORICAL, "layers": layers, "hyper": hyper}
            results.append(run(meta, inputs))
        for name, value in results[0].items():
            assert np.allclose(results[1][name].reshape(value.shape), value, rtol=1e-10, atol=1e-13), (algorithm, name)


@given(seeds)
def test_kernel_blocks_are_blocks_of_the_whole_outer_product(seed: int) -> None:
    kernels = np.random.default_rng(seed).standard_normal((2, 3, 2, 2))
    products = blocks.kernel_outer_products(kernels)
    whole = np.outer(as_matrix({"W": kernels}).ravel(), as_matrix({"W": kernels}).ravel())
    for o, i in itertools.product(range(2), range(3)):
        start = (o * 3 + i) * 4
        assert np.allclose(products[o, i], whole[start : start + 4, start : start + 4])
