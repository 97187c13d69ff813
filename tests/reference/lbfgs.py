"""L-BFGS as K-BFGS(L) uses it (arXiv:2006.08877): the last p accepted pairs, initial matrix gamma I with gamma = 1.

Three ways to multiply, written independently of each other: the two-loop recursion (Nocedal 1980), the compact form
(Byrd, Nocedal, Schnabel 1994) and p dense updates from gamma I.
"""

import numpy as np

from .network import Array
from .pairs import inverse_bfgs_update


class PairStore:
    """First in, first out store of at most `memory` pairs, oldest first."""

    def __init__(self, memory: int, gamma: float = 1.0) -> None:
        """Start empty: H v = gamma v."""
        self.memory, self.gamma = memory, gamma
        self.S: list[Array] = []
        self.Y: list[Array] = []

    def offer(self, s: Array, y: Array, scale: Array, threshold: float) -> int:
        """Accept the pair if s.s is finite and s.y > threshold (s.s) |scale|; the oldest leaves only then.

        Returns:
            0 where the pair was accepted, 2 where the curvature is too small, 3 where s.s is infinite.
        """
        if np.isinf(s @ s):
            return 3
        if not s @ y > threshold * (s @ s) * np.linalg.norm(scale):
            return 2
        if len(self.S) == self.memory:
            self.S.pop(0)
            self.Y.pop(0)
        self.S.append(s)
        self.Y.append(y)
        return 0

    def two_loop(self, v: Array) -> Array:
        """H v, v a vector or the columns of a matrix."""
        q, coefficients = np.array(v, dtype=np.float64), []
        for s, y in zip(reversed(self.S), reversed(self.Y), strict=True):  # newest first
            coefficient = (s @ q) / (s @ y)
            q = q - np.multiply.outer(y, coefficient)
            coefficients.append(coefficient)
        r = self.gamma * q
        for s, y, coefficient in zip(self.S, self.Y, reversed(coefficients), strict=True):  # oldest first
            r = r + np.multiply.outer(s, coefficient - (y @ r) / (s @ y))
        return r

    def compact(self, dimension: int) -> Array:
        """H as a matrix: gamma I + Q^T [(D + gamma Y Y^T) Q - gamma Y] - gamma Y^T Q.

        Rows of S and Y are the pairs, R_ij = s_i.y_j for i <= j, D = diag R, Q = R^-1 S.
        """
        identity = self.gamma * np.eye(dimension)
        if not self.S:
            return identity
        S, Y = np.stack(self.S), np.stack(self.Y)
        R = np.triu(S @ Y.T)
        D, Q = np.diag(np.diag(R)), np.linalg.solve(R, S)
        return identity + Q.T @ ((D + self.gamma * Y @ Y.T) @ Q - self.gamma * Y) - self.gamma * Y.T @ Q

    def dense(self, dimension: int) -> Array:
        """H as a matrix: the dense inverse BFGS update from gamma I, oldest pair first."""
        H = self.gamma * np.eye(dimension)
        for s, y in zip(self.S, self.Y, strict=True):
            H = inverse_bfgs_update(H, s, y)
        return H
