"""Krylov decompositions with full reorthogonalisation, and the top eigenpairs from them."""

import math
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
    orthogonalised twice against all earlier ones, so that T's eigenvalues carry no copies from
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


@dataclass(frozen=True)
class Eigenpairs:
    """The k algebraically largest eigenvalues and their vectors."""

    values: tuple[float, ...]
    """(k,) λ₁ ≥ … ≥ λₖ; NaN where none could be found before a breakdown."""
    vectors: tuple[TensorList, ...]
    """(k,) lists of unit Euclidean norm in the shapes and dtypes of ``like``."""
    residual_bounds: tuple[float, ...]
    """(k,) ‖A v − λ v‖ by the recurrence; an eigenvalue of A lies within that of λ."""
    num_products: int
    """Products with A."""
    status: Status
    """CONVERGED, STEP_LIMIT or BREAKDOWN."""


def top_eigenpairs(
    matvec: Operator,
    like: Sequence[Tensor],
    k: int = 1,
    *,
    max_steps: int = 100,
    rtol: float = 1e-3,
    generator: torch.Generator | None = None,
    start: Sequence[Tensor] | None = None,
) -> Eigenpairs:
    """The k algebraically largest eigenvalues of a symmetric A, with vectors and error bounds.

    Rayleigh-Ritz on the Krylov space of k starts, grown by one product a step (band Lanczos,
    which for k = 1 is Lanczos) with full reorthogonalisation. The k starts find eigenvalues of
    multiplicity up to k. A Ritz pair (θ, v) is converged when

        ‖A v − θ v‖ ≤ rtol · |θ|

    or when that is rounding next to ‖A‖; for isolated eigenvalues the error of θ is quadratic
    in the residual. Large negative eigenvalues are not returned, but they widen the spectrum
    and cost steps.

    Args:
        matvec: v ↦ A v on lists shaped like ``like``.
        like: Gives shapes, dtypes and devices; n is its number of entries.
        k: How many eigenpairs.
        max_steps: The most products with A; the basis holds at most ``max_steps + k`` vectors.
        rtol: Relative residual that is small enough.
        generator: For the random starts (a CPU generator).
        start: A guess of the top eigenvector, such as the last one found. It is mixed with a
            tenth of a random direction, so that a guess that is another eigenvector does not
            hide the top one.

    Raises:
        ValueError: For ``k`` outside 1 … n, ``max_steps`` < k, ``rtol`` ≤ 0 or a start of
            wrong shapes.
        TypeError: If ``like`` holds tensors that are not real floating point.

    Source: Ruhe, Math. Comp. 33 (1979) for the band recurrence; Parlett, The Symmetric
    Eigenvalue Problem (1998), section 11.4 and theorem 4.5.1 for the bounds.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, -4.0]))
        >>> top = top_eigenpairs(lambda v: [A @ v[0]], [torch.zeros(3)])
        >>> round(top.values[0], 4)
        2.0
    """
    like = checked_vector(like, "like")
    n = sum(x.numel() for x in like)
    if not 1 <= k <= n:
        raise ValueError(f"top_eigenpairs needs 1 ≤ k ≤ n = {n}, got k = {k}.")
    if max_steps < k:
        raise ValueError(f"top_eigenpairs needs max_steps ≥ k = {k}, got {max_steps}.")
    if not rtol > 0:
        raise ValueError(f"top_eigenpairs needs rtol > 0, got {rtol}.")
    guess = None if start is None else checked_like(start, like, "start")
    basis = KrylovBasis(checked_map(matvec, like, "matvec"), like, max_steps + k)
    while basis.size < k:
        direction = trees.normal_like(like, generator)
        if guess is not None and basis.size == 0:
            direction = _mixed(guess, direction)
        basis.append(direction)

    status = Status.STEP_LIMIT
    ritz = None
    while basis.num_products < max_steps and status is Status.STEP_LIMIT:
        if not basis.expand():
            status = Status.BREAKDOWN
        elif basis.num_products >= k:
            ritz = basis.ritz_pairs(k)
            values, _, bounds, scale = ritz
            rounding = 10 * basis.rounding * scale
            exhausted = basis.num_products == basis.size
            if exhausted or all(
                bound <= max(rtol * abs(value), rounding)
                for value, bound in zip(values, bounds, strict=True)
            ):
                status = Status.CONVERGED
    if ritz is None:
        missing = tuple(trees.zeros_like(like) for _ in range(k))
        return Eigenpairs((math.nan,) * k, missing, (math.inf,) * k, basis.num_products, status)
    values, weights, bounds, _ = ritz
    vectors = tuple(basis.combine(w) for w in weights)
    return Eigenpairs(values, vectors, bounds, basis.num_products, status)


def _mixed(guess: TensorList, random: TensorList) -> TensorList:
    """The guess with a tenth of a random direction; the latter alone if the guess is no use."""
    length = float(trees.norm(guess))
    if not 0 < length < math.inf:
        return random
    noise = trees.scale(random, 0.1 / float(trees.norm(random)))
    return trees.add(noise, guess, 1.0 / length)
