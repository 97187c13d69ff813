"""Shampoo, TNT, SOAP, Muon, EKFAC and the exact natural gradient, layer by layer, as their papers write them.

Conventions that are this package's own: the bias is the last column of the layer matrix; averages have no start-up
bias (the first value enters whole, unless a pass over the data came before); the momentum is an average of gradients.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .layer_loop import Seen
from .network import Array, LayerRecord


def power(matrix: Array, exponent: float) -> Array:
    """A power of a symmetric positive definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def tiny(matrix: Array) -> Any:
    """sqrt(machine unit) times the Frobenius norm."""
    return np.sqrt(np.finfo(float).eps) * np.linalg.norm(matrix)


def per_sample(record: LayerRecord) -> Array:
    """The gradient of every sample's own loss, one outer product after another, (B, out, in + bias)."""
    h, g = record.homogeneous(), record.g
    return np.array([sum(np.outer(g[n, t], h[n, t]) for t in range(h.shape[1])) for n in range(len(h))])


class Average:
    """An exponential average that starts with its first value."""

    def __init__(self, decay: float) -> None:
        """Nothing yet."""
        self.decay, self.value, self.weight = decay, np.zeros(()), 0.0

    def add(self, new: Array) -> Array:
        """value = decay value + (1 - decay) new, divided by the same recurrence on 1."""
        total = self.decay * self.weight + 1 - self.decay
        self.value = (self.decay * self.weight * self.value + (1 - self.decay) * new) / total
        self.weight = total
        return self.value

    def warm(self, j: int, new: Array) -> None:
        """Plain mean over the batches 0 ... j; afterwards the average counts as complete."""
        self.value, self.weight = (j * self.value + new) / (j + 1), 1.0


class Method:
    """Hyper-parameters and the momentum."""

    samples = False

    def __init__(self, shape: tuple[int, int], hyper: Mapping[str, Any]) -> None:
        """Momentum from zero."""
        self.shape, self.hyper, self.momentum = shape, hyper, np.zeros(shape)

    def warm(self, j: int, seen: Seen) -> None:
        """Most methods have no pass before training."""

    def averaged(self, gradient: Array) -> Array:
        """M = rho M + (1 - rho) G."""
        rho = self.hyper["momentum"]
        self.momentum = rho * self.momentum + (1 - rho) * gradient
        return self.momentum

    def due(self, k: int) -> bool:
        """Whether matrices are factorised at iteration k."""
        return k % self.hyper["every"] == 0 or k <= self.hyper["eager"]


class Shampoo(Method):
    """arXiv:1802.09568, Algorithm 1: L_0 = eps I, R_0 = eps I."""

    def __init__(self, shape: tuple[int, int], hyper: Mapping[str, Any]) -> None:
        """Initial matrices."""
        super().__init__(shape, hyper)
        self.L, self.R = hyper["damping"] * np.eye(shape[0]), hyper["damping"] * np.eye(shape[1])

    def step(self, k: int, seen: Seen) -> Array:
        """L += G G', R += G' G; L^{-1/4} G R^{-1/4}."""
        G = seen.gradient
        self.L, self.R = self.L + G @ G.T, self.R + G.T @ G
        if self.due(k):
            self.left, self.right = power(self.L, -0.25), power(self.R, -0.25)
        return self.left @ self.averaged(G) @ self.right


class TNT(Method):
    """arXiv:2106.02925, Algorithm 2, with pseudo-gradients of the mini-batch from sampled targets."""

    samples = True

    def __init__(self, shape: tuple[int, int], hyper: Mapping[str, Any]) -> None:
        """Nothing gathered."""
        super().__init__(shape, hyper)
        self.first, self.second = Average(hyper["decay"]), Average(hyper["decay"])

    def warm(self, j: int, seen: Seen) -> None:
        """Plain averages."""
        D = seen.sampled_gradient
        assert D is not None
        self.first.warm(j, D @ D.T)
        self.second.warm(j, D.T @ D)

    def step(self, k: int, seen: Seen) -> Array:
        """Heavy ball; both sides scaled to the same mean eigenvalue before eps I is added."""
        D, (n1, n2) = seen.sampled_gradient, self.shape
        assert D is not None
        self.momentum = self.hyper["momentum"] * self.momentum + seen.gradient
        first, second = self.first.add(D @ D.T), self.second.add(D.T @ D)
        if self.due(k):
            c = (np.trace(first) / (n1 * n2)) ** (1 / 2)
            self.left = np.linalg.inv(first / (c * n2) + self.hyper["damping"] * np.eye(n1))
            self.right = np.linalg.inv(second / (c * n1) + self.hyper["damping"] * np.eye(n2))
        return self.left @ self.momentum @ self.right


class SOAP(Method):
    """arXiv:2409.11321, Algorithms 3 and 4, with Adam's bias corrections.

    Iteration 0 is Adam's own step in the original coordinates; the published code skips it. A ramp (first basis) and
    a shift (later ones) of size sqrt(machine unit) keep rounding from deciding about null spaces.
    """

    def __init__(self, shape: tuple[int, int], hyper: Mapping[str, Any]) -> None:
        """Nothing gathered."""
        super().__init__(shape, hyper)
        self.L, self.R, self.V = Average(hyper["beta2"]), Average(hyper["beta2"]), Average(hyper["beta2"])
        self.QL, self.QR = np.eye(shape[0]), np.eye(shape[1])

    def step(self, k: int, seen: Seen) -> Array:
        """Renewal at the end of iteration k - 1, lines 13-15, stands at the beginning of iteration k here."""
        if k == 1:
            QL, QR = (
                np.linalg.eigh(P.value + tiny(P.value) * np.diag(np.linspace(0, 1, len(P.value))))[1][:, ::-1]
                for P in (self.L, self.R)
            )
            self.carry(QL, QR)
            self.QL, self.QR = QL, QR
        elif k > 1 and k % self.hyper["every"] == 0:
            self.renew()
        G = seen.gradient
        V = self.V.add((self.QL.T @ G @ self.QR) ** 2)  # lines 3 and 6
        M = self.averaged(G) / (1 - self.hyper["momentum"] ** (k + 1))  # line 4
        inside = (self.QL.T @ M @ self.QR) / (np.sqrt(V) + self.hyper["damping"])  # lines 5 and 7
        self.L.add(G @ G.T)  # line 11
        self.R.add(G.T @ G)  # line 12
        return self.QL @ inside @ self.QR.T  # line 8

    def renew(self) -> None:
        """Algorithm 4 on sorted columns, as the published code has it."""
        found = []
        for P, Q in ((self.L.value, self.QL), (self.R.value, self.QR)):
            S = P @ Q + tiny(P) * Q
            order = np.argsort(-np.sum(Q * S, axis=0))
            found.append(np.linalg.qr(S[:, order])[0])
        self.carry(*found)
        self.QL, self.QR = found

    def carry(self, QL: Array, QR: Array) -> None:
        """V in new bases, its entries taken for independent: ours, the published code sorts V with the columns."""
        self.V.value = ((self.QL.T @ QL) ** 2).T @ self.V.value @ (self.QR.T @ QR) ** 2


class Muon(Method):
    """Jordan's Muon on the weight, AdamW with the same Nesterov momentum on the bias and on all of the output layer.

    That is the one with ``output_rows`` rows; 0: there is none, every weight is orthogonalised.
    """

    def __init__(self, shape: tuple[int, int], hyper: Mapping[str, Any]) -> None:
        """Nothing gathered."""
        super().__init__(shape, hyper)
        self.V = Average(hyper["beta2"])

    def step(self, k: int, seen: Seen) -> Array:
        """B = mu B + (1 - mu) G, and the vector mu B + (1 - mu) G."""
        mu, G = self.hyper["momentum"], seen.gradient
        ahead = mu * self.averaged(G) + (1 - mu) * G
        adam = ahead / (np.sqrt(self.V.add(G**2)) + 1e-8)
        if len(G) == self.hyper["output_rows"]:
            return adam
        X = ahead[:, :-1] / np.linalg.norm(ahead[:, :-1])
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
        scale = 0.2 * np.sqrt(max(X.shape))
        return np.concatenate([scale * X, adam[:, -1:]], axis=1)


class EKFAC(Method):
    """arXiv:1806.03884, Algorithm 1, with averages over iterations; after a new basis S is K-FAC's."""

    samples = True

    def __init__(self, shape: tuple[int, int], hyper: Mapping[str, Any]) -> None:
        """Nothing gathered."""
        super().__init__(shape, hyper)
        self.A, self.B = Average(hyper["decay"]), Average(hyper["decay"])

    def warm(self, j: int, seen: Seen) -> None:
        """Plain averages of both factors."""
        A, B = self.factors(seen)
        self.A.warm(j, A)
        self.B.warm(j, B)

    def factors(self, seen: Seen) -> tuple[Array, Array]:
        """A: mean over samples of the sum over positions of h h'; B: mean over samples and positions of g g'."""
        record = seen.sampled_record
        assert record is not None
        h, g = record.homogeneous(), record.g
        return np.einsum("nti,ntj->ij", h, h) / len(h), np.einsum("nti,ntj->ij", g, g) / g[..., 0].size

    def step(self, k: int, seen: Seen) -> Array:
        """The basis, the scalings of this mini-batch in it, the update."""
        A, B = self.factors(seen)
        A, B = self.A.add(A), self.B.add(B)
        if self.due(k):
            (a, self.UA), (b, self.UB) = np.linalg.eigh(A), np.linalg.eigh(B)
            self.S = np.outer(b, a)
        assert seen.sampled_record is not None
        scalings = np.mean([(self.UB.T @ G @ self.UA) ** 2 for G in per_sample(seen.sampled_record)], axis=0)
        self.S = self.hyper["decay"] * self.S + (1 - self.hyper["decay"]) * scalings
        inside = (self.UB.T @ self.averaged(seen.gradient) @ self.UA) / (self.S + self.hyper["damping"])
        return self.UB @ inside @ self.UA.T


class NaturalGradient(Method):
    """(F + lambda I)^{-1} M with the whole matrix of the layer."""

    samples = True

    def __init__(self, shape: tuple[int, int], hyper: Mapping[str, Any]) -> None:
        """Nothing gathered."""
        super().__init__(shape, hyper)
        self.F = Average(hyper["decay"])

    def fisher(self, seen: Seen) -> Array:
        """Mean over samples of vec(G_n) vec(G_n)'."""
        assert seen.sampled_record is not None
        return np.mean([np.outer(G, G) for G in per_sample(seen.sampled_record)], axis=0)

    def warm(self, j: int, seen: Seen) -> None:
        """Plain average."""
        self.F.warm(j, self.fisher(seen))

    def step(self, k: int, seen: Seen) -> Array:
        """Solve where due with the matrix of then."""
        F, M = self.F.add(self.fisher(seen)), self.averaged(seen.gradient)
        if self.due(k):
            self.inverse = np.linalg.inv(F + self.hyper["damping"] * np.eye(len(F)))
        return (self.inverse @ M.flatten()).reshape(self.shape)
