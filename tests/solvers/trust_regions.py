"""Dense solutions of trust-region subproblems."""

import math

import numpy as np
import scipy.optimize
import torch
from torch import Tensor


def model(a: Tensor, b: Tensor, x: Tensor) -> float:
    return float(0.5 * x @ a @ x - b @ x)


def textbook(a: np.ndarray, b: np.ndarray, radius: float, m: np.ndarray, rtol: float) -> np.ndarray:
    """Nocedal and Wright's algorithm 7.2, with all norms of the dense M computed afresh."""
    z, r = np.zeros_like(b), -b
    y = np.linalg.solve(m, r)
    d = -y
    for _ in range(10 * len(b)):
        curvature = d @ a @ d
        alpha = (r @ y) / curvature if curvature != 0 else math.inf
        if curvature <= 0 or np.sqrt((z + alpha * d) @ m @ (z + alpha * d)) >= radius:
            qa, qb, qc = d @ m @ d, 2 * z @ m @ d, z @ m @ z - radius**2
            return z + (-qb + np.sqrt(qb**2 - 4 * qa * qc)) / (2 * qa) * d
        z = z + alpha * d
        new = r + alpha * a @ d
        if np.linalg.norm(new) <= rtol * np.linalg.norm(b):
            return z
        y_new = np.linalg.solve(m, new)
        d = -y_new + (new @ y_new) / (r @ y) * d
        r, y = new, y_new
    raise AssertionError


def exact(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """The subproblem's solution by a root of the secular equation, outside the hard case."""
    values, vectors = np.linalg.eigh(a.numpy())
    c = vectors.T @ b.numpy()

    def length(shift: float) -> float:
        return float(np.linalg.norm(c / (values + shift)))

    if values[0] > 0 and length(0.0) <= radius:
        return torch.from_numpy(vectors @ (c / values))
    low = max(0.0, -values[0]) + 1e-13
    shift = scipy.optimize.brentq(lambda s: 1 / length(s) - 1 / radius, low, 1e8, xtol=1e-15)
    return torch.from_numpy(vectors @ (c / (values + shift)))
