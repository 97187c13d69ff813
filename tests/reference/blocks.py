"""Which entries of a layer's gradient share a Fisher block in MBF (arXiv:2202.04124).

A rule turns the gradient of a layer into vectors v_1, v_2, ...; each has its own matrix, unless the rule averages them.
"""

import numpy as np

from .network import Array

AVERAGED = {"per_output": False, "per_output_avg": True, "per_input_avg": True, "flat_chunk_avg": True}


def dense_vectors(matrix: Array, rule: str) -> Array:
    """The vectors of a dense layer, one per row of the result; `matrix` = [grad W | grad b], shape (out, in + 1)."""
    out, columns = matrix.shape
    if rule in ("per_output", "per_output_avg"):  # all weights and the bias into one output neuron
        return matrix.copy()
    if rule == "per_input_avg":  # all weights out of one input
        return matrix.T.copy()
    if rule == "flat_chunk_avg":  # one long list, row by row, cut into in + 1 consecutive chunks of length out
        flat = [entry for row in matrix for entry in row]
        return np.array([flat[c * out : (c + 1) * out] for c in range(columns)])
    raise ValueError(f"unknown block rule {rule!r}; known: {sorted(AVERAGED)}")


def dense_matrix(vectors: Array, rule: str, shape: tuple[int, int]) -> Array:
    """Undo `dense_vectors`."""
    if rule in ("per_output", "per_output_avg"):
        return vectors.copy()
    if rule == "per_input_avg":
        return vectors.T.copy()
    return np.array([entry for chunk in vectors for entry in chunk]).reshape(shape)


def outer_products(vectors: Array, averaged: bool) -> Array:
    """v v^T of each vector, shape (count, n, n); their average, shape (n, n), where the rule averages."""
    products = np.array([np.outer(v, v) for v in vectors])
    return products.mean(0) if averaged else products


def kernel_vectors(kernels: Array) -> Array:
    """The vectors of a convolution: each kernel flattened row by row, shape (out, in, k k)."""
    return kernels.reshape(*kernels.shape[:2], -1)


def kernel_outer_products(kernels: Array) -> Array:
    """One k^2 x k^2 matrix per (out, in) pair of channels; never averaged."""
    vectors = kernel_vectors(kernels)
    return np.array([[np.outer(v, v) for v in row] for row in vectors])
