"""Symmetric matrices with given eigenvalues, vectors, and operators that count their products."""

import math

import torch
from torch import Tensor

from hvpopt.solvers import ResidualNorm

TIGHT = ResidualNorm(rtol=1e-12)


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * values.double()) @ q.T


def spd(n: int, condition: float = 100.0, seed: int = 0) -> Tensor:
    """A positive definite matrix with eigenvalues from 1 to its condition."""
    return symmetric(torch.logspace(0, math.log10(condition), n, dtype=torch.float64), seed)


def definite(n: int = 12, seed: int = 0) -> Tensor:
    return symmetric(torch.logspace(-1, 2, n), seed)


def indefinite(n: int = 12, seed: int = 0) -> Tensor:
    return symmetric(torch.linspace(-2, 7, n), seed)


def vector(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counted:
    """A dense matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        return [self.matrix @ v[0]]
