"""Lanczos runs from several starts in step, for quadrature."""

import torch
from torch import Tensor

from hvpopt.solvers.krylov import KrylovBasis
from hvpopt.solvers.rows import Rows


def quadratures(
    rows: Rows, starts: Tensor, num_steps: int, *, reorthogonalize: bool
) -> tuple[Tensor, Tensor]:
    """Nodes and weights (p, m) of the Gauss quadratures of q ↦ qᵀ f(A) q for unit starts (p, n).

    Each row's weights sum to one. Where a Krylov space ends early, nodes of weight 0 fill up.

    Args:
        rows: A.
        starts: one a row.
        num_steps: m, the products with each.
        reorthogonalize: keeps all vectors and orthogonalises against them; without, three
            vectors a start are held, and T's eigenvalues gain copies that share their weight.

    Raises:
        FloatingPointError: If a product is not finite.

    Source: Golub and Welsch, Calculation of Gauss quadrature rules (1969).
    """
    run = _with_bases if reorthogonalize else _with_three_terms
    tridiagonals = run(rows, starts, num_steps)
    nodes = torch.zeros(len(starts), num_steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    for i, matrix in enumerate(tridiagonals):
        values, vectors = torch.linalg.eigh(matrix)
        nodes[i, : len(values)], weights[i, : len(values)] = values, vectors[0] ** 2
        nodes[i, len(values) :] = values[-1]
    return nodes, weights


def _with_bases(rows: Rows, starts: Tensor, num_steps: int) -> list[Tensor]:
    bases = []
    for start in starts:
        basis = KrylovBasis(rows.operator, rows.operator.like, num_steps)
        basis.append_flat(start)
        bases.append(basis)
    for step in range(num_steps):
        growing = [basis for basis in bases if basis.size > step]
        if not growing:
            break
        products = rows.products(torch.cat([basis.pending() for basis in growing]))
        for basis, product in zip(growing, products, strict=True):
            if not basis.absorb(product):
                raise FloatingPointError
    squares = [basis.coefficients()[: basis.num_products] for basis in bases]
    return [(square + square.T) / 2 for square in squares]


def _with_three_terms(rows: Rows, starts: Tensor, num_steps: int) -> list[Tensor]:
    """βⱼ qⱼ₊₁ = A qⱼ − αⱼ qⱼ − βⱼ₋₁ qⱼ₋₁, in the order of Paige (1972)."""
    current = starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True)
    last = torch.zeros_like(current)
    beta = torch.zeros(len(starts), 1, dtype=starts.dtype, device=starts.device)
    alphas, betas = [], []
    for _ in range(num_steps):
        w = rows.products(current)
        w.addcmul_(beta, last, value=-1.0)
        alpha = torch.linalg.vecdot(w, current)[:, None]
        w.addcmul_(alpha, current, value=-1.0)
        beta = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        alphas.append(alpha)
        betas.append(beta)
        last, current = current, torch.where(beta > 0, w / beta, torch.zeros_like(w))
    diagonal = torch.cat(alphas, dim=1).cpu().double()
    beside = torch.cat(betas, dim=1).cpu().double()
    if not bool(torch.isfinite(diagonal + beside).all()):
        raise FloatingPointError
    scale = diagonal.abs().amax(1) + beside.amax(1)
    matrices = []
    for a, b, floor in zip(diagonal, beside, 10 * rows.rounding * scale, strict=True):
        ends = (b <= floor).nonzero().flatten()
        m = int(ends[0]) + 1 if len(ends) else num_steps
        b = b[: m - 1]
        matrices.append(torch.diag(a[:m]) + torch.diag(b, 1) + torch.diag(b, -1))
    return matrices
