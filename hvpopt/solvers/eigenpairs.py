"""Extreme eigenpairs of a symmetric operator, from a Krylov space."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.krylov import KrylovBasis, Ritz
from hvpopt.solvers.result import Status
from hvpopt.solvers.ritz_search import Ends, search
from hvpopt.solvers.rows import ListOperator, Rows
from hvpopt.solvers.warm_start import Eigenpairs, Start, mixed, starting_vectors

__all__ = [
    "Aim",
    "Eigenpairs",
    "Start",
    "bottom_eigenpairs",
    "extreme_eigenpairs",
    "top_eigenpairs",
]

Aim = Literal["vectors", "values"]
"""What is to be within ``rtol``."""


def top_eigenpairs(
    operator: ListOperator | Operator,
    like: Sequence[Tensor] | None = None,
    k: int = 1,
    *,
    max_steps: int = 100,
    rtol: float = 1e-3,
    converge: Aim = "vectors",
    block_size: int | None = None,
    max_basis: int | None = None,
    generator: torch.Generator | None = None,
    start: Start | None = None,
) -> Eigenpairs:
    """The k algebraically largest eigenvalues of a symmetric A, with vectors and error bounds.

    Arguments, cost and errors are those of `extreme_eigenpairs`.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, -4.0]))
        >>> top = top_eigenpairs(lambda v: [A @ v[0]], [torch.zeros(3)])
        >>> round(top.values[0], 4)
        2.0
    """
    return extreme_eigenpairs(
        operator,
        like,
        num_top=k,
        num_bottom=0,
        max_steps=max_steps,
        rtol=rtol,
        converge=converge,
        block_size=block_size,
        max_basis=max_basis,
        generator=generator,
        start=start,
    )[0]


def bottom_eigenpairs(
    operator: ListOperator | Operator,
    like: Sequence[Tensor] | None = None,
    k: int = 1,
    *,
    max_steps: int = 100,
    rtol: float = 1e-3,
    converge: Aim = "vectors",
    block_size: int | None = None,
    max_basis: int | None = None,
    generator: torch.Generator | None = None,
    start: Start | None = None,
) -> Eigenpairs:
    """The k algebraically smallest eigenvalues of a symmetric A, the smallest first.

    Arguments, cost and errors are those of `extreme_eigenpairs`.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, -4.0]))
        >>> bottom = bottom_eigenpairs(lambda v: [A @ v[0]], [torch.zeros(3)], 2)
        >>> [round(x, 4) for x in bottom.values]
        [-4.0, 1.0]
    """
    return extreme_eigenpairs(
        operator,
        like,
        num_top=0,
        num_bottom=k,
        max_steps=max_steps,
        rtol=rtol,
        converge=converge,
        block_size=block_size,
        max_basis=max_basis,
        generator=generator,
        start=start,
    )[1]


def extreme_eigenpairs(
    operator: ListOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    num_top: int = 1,
    num_bottom: int = 1,
    max_steps: int = 100,
    rtol: float = 1e-3,
    converge: Aim = "vectors",
    block_size: int | None = None,
    max_basis: int | None = None,
    generator: torch.Generator | None = None,
    start: Start | None = None,
) -> tuple[Eigenpairs, Eigenpairs]:
    """The largest and the smallest eigenvalues of a symmetric A, with vectors and error bounds.

    Rayleigh-Ritz on the Krylov space of b starts, grown by one product a step (band Lanczos, which
    for b = 1 is Lanczos) with full reorthogonalisation. It finds eigenvalues of multiplicity up to
    b. A Ritz pair (θ, v) is converged when

        ‖A v − θ v‖ ≤ rtol · |θ|          for converge="vectors",
        ‖A v − θ v‖² / gap ≤ rtol · |θ|   for converge="values",

    or when the left side is rounding next to ‖A‖. The gap is that between θ and the next Ritz
    value, less what that one may be off by, at most |θ|/8: the error of θ is quadratic in the
    residual, and two thirds of the steps do where the vector is not needed. Neither sees what has
    not shown yet: with rtol = 1e-2 among eigenvalues a few percent apart, the value may be that
    of the next one.

    It costs one product a step, and b vectors of memory more than steps, or ``max_basis``.
    Eigenvalues apart from the others take 5 to 20 steps, the edge of a bulk many more. With
    several starts all vectors that wait for their product go through an operator at once, which
    over a dataset is one pass. Eigenvalues of the other end are not returned, but widen the
    spectrum and cost steps.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices; n is its number of entries.
        num_top: How many of the largest, or 0.
        num_bottom: How many of the smallest, or 0.
        max_steps: The most products with A.
        rtol: Relative residual, or error of a value, that is small enough.
        converge: Which of both.
        block_size: b; by default k = max(num_top, num_bottom). 1 takes the fewest products where
            eigenvalues are distinct, as a power of A more is worth b starts.
        max_basis: The most vectors that are held; where there are more, the Ritz vectors nearest
            to the ends take their place. It costs products. At least num_top + num_bottom + 2b.
        generator: For the random starts (a CPU generator).
        start: Guesses, such as the last call's results, which are added up where they are more
            than b. Starts are mixed with a tenth of a random direction, so that guesses that are
            other eigenvectors do not hide those sought.

    Returns:
        The largest, the largest first, and the smallest, the smallest first; ``num_products`` and
        ``status`` are of the whole call.

    Raises:
        ValueError: For numbers of eigenpairs outside 1 … n (one may be 0), ``max_steps`` < k,
            ``block_size`` outside 1 … k, ``max_basis`` too small, ``rtol`` ≤ 0, an unknown
            ``converge``, a start of wrong shapes, or an operator that is not symmetric.
        TypeError: If ``like`` is missing or holds tensors that are not real floating point, or a
            start mixes vectors and tensors.

    Source: Ruhe, Math. Comp. 33 (1979) for the band recurrence; Parlett, The Symmetric
    Eigenvalue Problem (1998), section 11.4 and theorem 4.5.1 for the bounds, 11.7 for the gap.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, -4.0]))
        >>> top, bottom = extreme_eigenpairs(lambda v: [A @ v[0]], [torch.zeros(3)])
        >>> round(top.values[0], 4), round(bottom.values[0], 4)
        (2.0, -4.0)
    """
    rows = Rows(operator, like)
    k = _checked_count(num_top, num_bottom, rows.n)
    if max_steps < k:
        raise ValueError(f"Eigenpairs need max_steps ≥ k = {k}, got {max_steps}.")
    starts = k if block_size is None else block_size
    if not 1 <= starts <= k:
        raise ValueError(f"block_size={block_size} is out of range: expected 1 ≤ b ≤ k = {k}.")
    least = num_top + num_bottom + 2 * starts
    if max_basis is not None and max_basis < least:
        raise ValueError(f"max_basis={max_basis} is out of range: expected at least {least}.")
    if not rtol > 0:
        raise ValueError(f"Eigenpairs need rtol > 0, got {rtol}.")
    if converge not in ("vectors", "values"):
        raise ValueError(f"converge={converge!r} is unknown: choose 'vectors' or 'values'.")
    capacity = max_steps + starts if max_basis is None else max_basis
    vectors, ends = rows.space.like, Ends(num_top, num_bottom)
    basis = KrylovBasis(rows.operator, vectors, capacity)
    for guess in starting_vectors(start, vectors, most=k, count=starts):
        basis.append(mixed(guess, trees.normal_like(vectors, generator)))
    while basis.size < starts:
        basis.append(trees.normal_like(vectors, generator))

    ritz, status = search(
        rows,
        basis,
        ends,
        least=k,
        max_steps=max_steps,
        keep=max(num_top + num_bottom, capacity // 2 - starts),
        is_close=_within(rtol, converge, basis.rounding),
        new_direction=lambda: trees.normal_like(vectors, generator),
    )
    sides = ends.wanted(ritz) if ritz else ([-1] * num_top, [-1] * num_bottom)
    top, bottom = (_pairs(basis, ritz, side, status, rows) for side in sides)
    return top, bottom


def _within(rtol: float, converge: Aim, rounding: float) -> Callable[[Ritz], Tensor]:
    """Which of the Ritz pairs are as accurate as is asked for, (m,)."""

    def is_close(ritz: Ritz) -> Tensor:
        goal = (rtol * ritz.values.abs()).clamp(min=10 * rounding * ritz.scale)
        return (ritz.bounds if converge == "vectors" else ritz.errors) <= goal

    return is_close


def _pairs(
    basis: KrylovBasis, ritz: Ritz | None, which: list[int], status: Status, rows: Rows
) -> Eigenpairs:
    if ritz is None:
        missing = tuple(trees.zeros_like(rows.space.like) for _ in which)
        nothing, unbounded = (math.nan,) * len(which), (math.inf,) * len(which)
        return Eigenpairs(nothing, missing, unbounded, unbounded, rows.num_products, status)
    return Eigenpairs(
        values=tuple(float(ritz.values[i]) for i in which),
        vectors=tuple(basis.combine(ritz.weights[:, i]) for i in which),
        residual_bounds=tuple(float(ritz.bounds[i]) for i in which),
        value_errors=tuple(float(ritz.errors[i]) for i in which),
        num_products=rows.num_products,
        status=status,
    )


def _checked_count(num_top: int, num_bottom: int, n: int) -> int:
    least, k = sorted((num_top, num_bottom))
    if not 0 <= least <= k <= n or k == 0:
        given = least if least < 0 else k
        raise ValueError(f"Eigenpairs need 1 ≤ k ≤ n = {n}, got k = {given}.")
    return k
