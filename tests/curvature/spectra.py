"""Matrices whose spectrum is known, and how estimators are given them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvpopt.operators import LinearOperator


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_eigenvalues(values: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64))
    return (q * torch.as_tensor(values, dtype=torch.float64)) @ q.T


def wigner(n: int, seed: int = 0) -> Tensor:
    """A symmetric matrix of normal entries, whose eigenvalues follow the semicircle on [−2, 2]."""
    a = torch.randn(n, n, generator=seeded(seed), dtype=torch.float64)
    return (a + a.T) / (2 * n) ** 0.5


def product(matrix: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda v: [matrix @ v[0]]


def like(n: int) -> list[Tensor]:
    return [torch.zeros(n, dtype=torch.float64)]


def in_parts(matrix: Tensor, *, num_calls: list[int] | None = None) -> LinearOperator:
    """The operator of a matrix on lists of three tensors, which counts vectors in its calls."""
    n = len(matrix)
    shapes = [(2, 2), (), (n - 5,)]
    sizes = [4, 1, n - 5]

    def listed(rows: Tensor) -> list[Tensor]:
        parts = rows.split(sizes, dim=-1)
        return [x.reshape((*rows.shape[:-1], *s)) for x, s in zip(parts, shapes, strict=True)]

    def matvec(v: list[Tensor]) -> list[Tensor]:
        if num_calls is not None:
            num_calls.append(1)
        return listed(matrix @ torch.cat([x.reshape(-1) for x in v]))

    def matmat(vs: list[Tensor]) -> list[Tensor]:
        if num_calls is not None:
            num_calls.append(len(vs[0]))
        return listed(torch.cat([x.reshape(len(x), -1) for x in vs], dim=1) @ matrix)

    zeros = [torch.zeros(s, dtype=matrix.dtype) for s in shapes]
    return LinearOperator(zeros, matvec, matmat=matmat)


def joined(vector: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in vector])
