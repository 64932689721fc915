"""Krylov decompositions with full reorthogonalisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.checks import Operator, checked_like, checked_map, checked_vector
from hvpopt.solvers.krylov import KrylovBasis
from hvpopt.solvers.result import Status
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class Tridiagonal:
    """The Lanczos decomposition A Q = Q T + β q eᵀ with orthonormal Q, after m steps."""

    diagonal: Tensor
    """(m,) float64 on the CPU: the diagonal of T."""
    off_diagonal: Tensor
    """(m − 1,) float64 on the CPU: the entries beside it, positive."""
    residual_norm: float
    """β, the norm of what A Q has outside of Q; 0 where Q spans an invariant subspace."""
    basis: tuple[TensorList, ...]
    """The m columns of Q as lists in the shapes of the start."""
    status: Status
    """STEP_LIMIT after all steps, CONVERGED at an invariant subspace, BREAKDOWN at NaN."""

    @property
    def num_steps(self) -> int:
        """m, the number of products that went into T."""
        return len(self.diagonal)

    def matrix(self) -> Tensor:
        """T as a dense symmetric (m, m) matrix."""
        beside = self.off_diagonal
        return torch.diag(self.diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)


def lanczos(
    matvec: Operator,
    like: Sequence[Tensor],
    *,
    num_steps: int,
    generator: torch.Generator | None = None,
    start: Sequence[Tensor] | None = None,
) -> Tridiagonal:
    """The tridiagonal T = QᵀAQ of a symmetric A on the Krylov space of a start q₁.

    The columns of Q are an orthonormal basis of q₁, A q₁, …, Aᵐ⁻¹ q₁, and each is
    orthogonalised against all earlier ones, so that T's eigenvalues carry no copies from
    rounding. T's eigenvalues and the squares of its eigenvectors' first entries are the nodes
    and weights of the Gauss quadrature of q₁ᵀ f(A) q₁ (Golub and Welsch).

    Args:
        matvec: v ↦ A v on lists shaped like ``like``.
        like: Gives shapes, dtypes and devices.
        num_steps: The most steps m; fewer where the Krylov space is exhausted. The basis holds
            m vectors.
        generator: For the random start (a CPU generator).
        start: q₁, normalised here; standard normal by default.

    Raises:
        ValueError: For ``num_steps`` < 1, a start of wrong shapes, or one that is zero or not
            finite.
        TypeError: If ``like`` holds tensors that are not real floating point.

    Source: Lanczos (1950); Golub and Van Loan, Matrix Computations (2013), section 10.3.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> start = [torch.ones(3)]
        >>> T = lanczos(lambda v: [A @ v[0]], start, num_steps=3, start=start).matrix()
        >>> [round(float(x), 4) for x in torch.linalg.eigvalsh(T)]
        [1.0, 2.0, 4.0]
    """
    if num_steps < 1:
        raise ValueError(f"lanczos needs num_steps ≥ 1, got {num_steps}.")
    like = checked_vector(like, "like")
    basis = KrylovBasis(checked_map(matvec, like, "matvec"), like, num_steps + 1)
    given = None if start is None else checked_like(start, like, "start")
    basis.append(trees.normal_like(like, generator) if given is None else given)
    if basis.size == 0:
        raise ValueError("start is zero or not finite; lanczos needs a direction.")
    status = Status.STEP_LIMIT
    while basis.num_products < num_steps:
        if basis.num_products == basis.size:
            status = Status.CONVERGED
            break
        if not basis.expand():
            status = Status.BREAKDOWN
            break
    m = basis.num_products
    coefficients = basis.coefficients()
    return Tridiagonal(
        diagonal=coefficients[:m].diagonal().clone(),
        off_diagonal=coefficients[1:m].diagonal().clone(),
        residual_norm=float(coefficients[m, m - 1]) if m and basis.size > m else 0.0,
        basis=tuple(basis.vector(i) for i in range(m)),
        status=status,
    )
