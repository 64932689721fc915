"""A low-rank preconditioner: the leading eigenvectors of the curvature from a random sketch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.options import check_count
from hvpopt.preconditioners.base import CurvaturePoint, Preconditioner, State
from hvpopt.trees import TensorList

Columns = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Nystrom(Preconditioner):
    """M = U (Λ − τ I) Uᵀ + τ I + D, with B ≈ U Λ Uᵀ the randomised Nyström approximation of B.

    Λ is diagonal, U has ``rank`` orthonormal columns, and τ = λ_rank, the smallest of Λ, stands for
    the rest of the spectrum. Where D = μ I this is (λ_rank + μ) times the preconditioner of the
    source,

        P⁻¹ = (λ_rank + μ) U (Λ + μ I)⁻¹ Uᵀ + (I − U Uᵀ),

    and where D differs between parameters M⁻¹ is still exact, by the Woodbury identity. τ is at
    least a hundred rounding errors of λ₁, below which products say nothing.

    B = Y (Ωᵀ Y)⁻¹ Yᵀ with Y = B Ω for an orthonormalised Gaussian Ω supposes that B is positive
    semi-definite. If ΩᵀY shows that it is not, as the Hessian's may, another ``rank`` products give
    the Ritz pairs of B on the range of Y, and Λ holds the absolute values.

    A refresh costs ``rank`` products and holds about five times the memory that the states keep,
    which is ``rank`` numbers a parameter entry. A refresh whose products are not finite changes
    nothing.

    In the states: "nystrom_basis" (rank, *shape), the rows of U; "nystrom_gram" (rank, rank), its
    part of Uᵀ U; "nystrom_eigenvalues" (rank,), Λ, the largest first; "nystrom_tail", τ.

    Args:
        rank: products a refresh; at most the number of parameter entries is used.
        every: steps from one refresh to the next.

    Raises:
        ValueError: for an option out of range.

    Source: Frangella, Tropp and Udell, "Randomized Nyström preconditioning" (2023), algorithm 2.1
    and equation 5.3; in Newton-CG, Rathore et al., "Challenges in training PINNs" (2024); the Ritz
    pairs: Halko, Martinsson and Tropp (2011), algorithms 4.1 and 5.3.

    Examples:
        >>> Nystrom(rank=20)
        Nystrom(rank=20, every=20)
    """

    rank: int = 60
    every: int = 20

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("every", self.every)

    def is_ready(self, states: Sequence[State]) -> bool:
        """Whether every parameter has its part of one basis."""
        ranks = {len(s["nystrom_basis"]) if "nystrom_basis" in s else 0 for s in states}
        return len(ranks) == 1 and 0 not in ranks

    def refresh(self, point: CurvaturePoint, states: Sequence[State]) -> None:
        """Writes a new basis, if all products are finite."""
        params = point.params
        sizes = [p.numel() for p in params]
        dtype = _wide_dtype(params)

        def times(columns: Tensor) -> Tensor:
            products = torch.empty_like(columns)
            for i in range(columns.shape[1]):
                parts = columns[:, i].split(sizes)
                v = [x.to(p).view_as(p) for x, p in zip(parts, params, strict=True)]
                products[:, i] = torch.cat([x.reshape(-1).to(columns) for x in point.product(v)])
            return products

        found = _eigenpairs(times, sum(sizes), self.rank, dtype, params[0].device, point.seed)
        if found is None:
            return
        basis, values = found
        tail = _tail(values)
        parts = basis.T.split(sizes, dim=1)
        for p, part, state in zip(params, parts, states, strict=True):
            rows = p.new_empty(len(part), *p.shape)
            rows.copy_(part.reshape(rows.shape))
            state["nystrom_basis"] = rows
            state["nystrom_gram"] = _gram(rows).to(p.dtype)
            state["nystrom_eigenvalues"] = values.to(p.device, p.dtype, copy=True)
            state["nystrom_tail"] = tail

    def solve(self, r: TensorList, states: Sequence[State], shift: Sequence[float]) -> TensorList:
        """M⁻¹ r, in 4·rank operations a parameter entry."""
        return self.inverse(states, shift)(r)

    def inverse(
        self, states: Sequence[State], shift: Sequence[float]
    ) -> Callable[[TensorList], TensorList]:
        """r ↦ M⁻¹ r = D'⁻¹ r − D'⁻¹ U L (I + L Uᵀ D'⁻¹ U L)⁻¹ L Uᵀ D'⁻¹ r, for many r.

        There D' = τ I + D and L = (Λ − τ I)^½.
        """
        home = _wide(states[0]["nystrom_eigenvalues"])
        tail = states[0]["nystrom_tail"]
        scales = [tail + s for s in shift]
        weights = home.new_tensor([1 / d for d in scales])
        rows = [_flat(state["nystrom_basis"]) for state in states]
        grams = torch.stack([_stored_gram(state).to(home) for state in states])
        root = (home - tail).clamp_(min=0).sqrt_()
        inner = root[:, None] * torch.tensordot(weights, grams, 1) * root
        inner.diagonal().add_(1)
        factor = torch.linalg.cholesky_ex(inner).L

        def times(r: TensorList) -> TensorList:
            parts = [(u @ x.reshape(-1).to(u)).to(home) for u, x in zip(rows, r, strict=True)]
            along = root * (weights @ torch.stack(parts))
            inside = root * torch.cholesky_solve(along[:, None], factor)[:, 0]
            return [
                ((x.reshape(-1) - inside.to(u) @ u) / d).view_as(x).to(x.dtype)
                for x, u, d in zip(r, rows, scales, strict=True)
            ]

        return times


def _eigenpairs(
    times: Columns, n: int, rank: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor] | None:
    """U (n, k) with orthonormal columns and Λ ≥ 0 (k,), the largest first; None if not finite."""
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(n, min(rank, n), generator=generator, dtype=dtype).to(device)
    omega = torch.linalg.qr(omega).Q
    sketch = times(omega)
    if not bool(torch.isfinite(sketch).all()):
        return None
    return _nystrom(omega, sketch) or _ritz(times, sketch)


def _nystrom(omega: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor] | None:
    """The eigenpairs of Y (ΩᵀY)⁻¹ Yᵀ; None if ΩᵀY is not positive definite beyond rounding.

    Y is shifted by ν Ω, a rounding error, which the eigenvalues are relieved of.
    """
    rounding = math.sqrt(len(omega)) * torch.finfo(omega.dtype).eps
    shift = rounding * torch.linalg.norm(sketch)
    columns = sketch + shift * omega
    core = omega.T @ columns
    factor, info = torch.linalg.cholesky_ex((core + core.T) / 2)
    if int(info) != 0:
        return None
    columns = torch.linalg.solve_triangular(factor, columns.T, upper=False).T
    if not bool(torch.isfinite(columns).all()):
        return None
    columns, triangle = torch.linalg.qr(columns)
    vectors, values, _ = torch.linalg.svd(triangle)
    return columns @ vectors, (values**2 - shift).clamp_(min=0)


def _ritz(times: Columns, sketch: Tensor) -> tuple[Tensor, Tensor] | None:
    """The Ritz vectors of B on the range of the sketch and the absolute Ritz values."""
    q = torch.linalg.qr(sketch).Q
    projected = q.T @ times(q)
    if not bool(torch.isfinite(projected).all()):
        return None
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    values, order = values.abs().sort(descending=True)
    return q @ vectors[:, order], values


def _tail(values: Tensor) -> float:
    """τ, which is positive; 1 for B = 0."""
    top, last = float(values[0]), float(values[-1])
    return max(last, 100 * torch.finfo(values.dtype).eps * top) if top > 0 else 1.0


def _gram(rows: Tensor) -> Tensor:
    flat = _flat(rows)
    return flat @ flat.T


def _flat(rows: Tensor) -> Tensor:
    """(rank, *shape) as a matrix in float32 or wider."""
    return _wide(rows).unsqueeze(-1).flatten(1)


def _stored_gram(state: State) -> Tensor:
    """The Gram matrix of a basis; what half precision stores of it is too far off."""
    gram: Tensor = state["nystrom_gram"]
    return gram if _wide(gram) is gram else _gram(state["nystrom_basis"])


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32 or wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _wide_dtype(params: TensorList) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
