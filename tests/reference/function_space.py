"""Slow transcription of PAPERS 2.5: Jacobian by autograd, F as a P x P matrix, inverses of whole matrices."""

import math

import torch
from torch import Tensor
from torch.func import jacrev


def outputs(patches: Tensor, signs: Tensor, weights: Tensor) -> Tensor:
    """u_i = (m T)^{-1/2} sum_j a_j sum_t tanh(<W_j, x_it>)."""
    total = []
    for patch in patches:
        value = patch.new_zeros(())
        for position in patch:
            for sign, weight in zip(signs, weights, strict=True):
                value = value + sign * torch.tanh((weight * position).sum())
        total.append(value / math.sqrt(len(signs) * len(patch)))
    return torch.stack(total)


def jacobian(patches: Tensor, signs: Tensor, weights: Tensor) -> Tensor:
    """(n, units, inputs, kernel)."""
    return jacrev(lambda value: outputs(patches, signs, value))(weights)


def block_of_entries(shape: torch.Size, blocks: str) -> Tensor:
    """(P,) the number of the block every parameter belongs to."""
    units, inputs, kernel = shape
    numbers = torch.empty(shape, dtype=torch.long)
    for j in range(units):
        for i in range(inputs):
            for k in range(kernel):
                numbers[j, i, k] = {"per-output": j, "per-input": i, "kernel": j * inputs + i, "whole": 0}[blocks]
    return numbers.flatten()


def fisher(J: Tensor, blocks: str) -> Tensor:
    """blockdiag(J_b' J_b) / n."""
    flat = J.flatten(1)
    number = block_of_entries(J.shape[1:], blocks)
    mask = number.unsqueeze(0) == number.unsqueeze(1)
    return flat.T @ flat / len(flat) * mask


def kfac(patches: Tensor, signs: Tensor, weights: Tensor, damping: float) -> Tensor:
    """(G + sqrt(lambda / T) I) kron (A + sqrt(lambda T) I), unit slowest."""
    samples, positions = patches.shape[:2]
    A = torch.zeros(weights[0].numel(), weights[0].numel(), dtype=weights.dtype)
    G = torch.zeros(len(weights), len(weights), dtype=weights.dtype)
    for patch in patches:
        for position in patch:
            x = position.flatten()
            h = torch.stack([(weight * position).sum() for weight in weights])
            g = signs * (1.0 - torch.tanh(h) ** 2) / math.sqrt(len(signs) * positions)
            A += torch.outer(x, x) / samples
            G += torch.outer(g, g) / (samples * positions)
    A += math.sqrt(damping * positions) * torch.eye(len(A), dtype=A.dtype)
    G += math.sqrt(damping / positions) * torch.eye(len(G), dtype=G.dtype)
    return torch.kron(G, A)


def solve(J: Tensor, damped: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """K = J (F + lambda I)^{-1} J' / n and (F + lambda I)^{-1} J' e / n."""
    flat = J.flatten(1)
    inverse = torch.linalg.inv(damped)
    direction = inverse @ flat.T @ residual / len(flat)
    return flat @ inverse @ flat.T / len(flat), direction.reshape(J.shape[1:])
