"""Kronecker factors of the curvature of one weight, from the calls in which it is used.

A weight whose gradient is Σ_n r_n c_nᵀ (`hvpopt.engines.layer_calls`) has as its block of the
Fisher matrix, where positions are uncorrelated and r is independent of c,

    Σ_n E[r_n r_nᵀ ⊗ c_n c_nᵀ]  ≈  R ⊗ C,      R = Σ_n r_n r_nᵀ,   C = mean_n c_n c_nᵀ

(Martens and Grosse 2015, section 3; for convolutions Grosse and Martens 2016, section 3). Here
⊗ acts on matrices X of the weight's shape: (R ⊗ C) X = R X C.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.engines.layer_readers import LayerCall
from hvpopt.likelihoods import wide

_ROUNDINGS = 10


@dataclass(frozen=True)
class Factors:
    """R and C for each group; each [groups, size, size], or [groups, size] if it is diagonal."""

    rows: Tensor
    columns: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        """R x C for matrices x[groups, rows, columns]."""
        x = self.rows[..., None] * x if self.rows.dim() == 2 else self.rows @ x
        return x * self.columns[:, None] if self.columns.dim() == 2 else x @ self.columns

    def inverse(self, shift: float) -> "Factors":
        """(R + τ ρ)⁻¹ ⊗ (C + τ κ)⁻¹, near (R ⊗ C + shift)⁻¹.

        ρ and κ are the factors' mean eigenvalues, and τ = √(shift / ρ κ): so the shift is split
        between the factors in the ratio of their sizes, and R ⊗ C + shift has the further terms
        τ (R ⊗ κ + ρ ⊗ C). A factor is lifted by no less than what its rounding may hide. Where
        one vanishes, nothing is known, and the curvature counts as 1.

        Source: Martens and Grosse (2015), section 6.3.
        """
        rho, kappa = _mean(self.rows), _mean(self.columns)
        is_known = (rho > 0) & (kappa > 0)
        sizes = rho.where(is_known, 1).sqrt() * kappa.where(is_known, 1).sqrt()
        share = math.sqrt(shift) / sizes  # whose square may overflow
        lift = (share * rho).maximum(_rounding(self.rows)).where(is_known, 1 + shift)
        inverse = _inverse(_times(is_known, self.rows), lift)
        lift = (share * kappa).maximum(_rounding(self.columns)).where(is_known, 1)
        return Factors(inverse, _inverse(_times(is_known, self.columns), lift))


def factors_of(
    call: LayerCall,
    slopes: Sequence[Tensor],
    num_rows: int,
    *,
    num_samples: int = 1,
    max_size: int = 2048,
) -> Factors | None:
    """R and C of one call, averaged over samples.

    With a bias, c has a one appended, so that [W b] is the weight.

    Args:
        call: the call.
        slopes: the gradients by its value, for each sample, and for each loss it is used in.
        num_rows: of the weight's matrix, all groups together.
        num_samples: how many samples there are.
        max_size: a factor with more rows is diagonal.

    Returns:
        The factors in float32 or wider; None where there is no position.
    """
    size, num = num_rows // call.groups, 0
    rows: Tensor | None = None
    columns: Tensor | None = None
    for slope in slopes:
        for r, c in call.pairs(slope):
            r, c = wide(r) if r.is_floating_point() else r, wide(c)
            num += c.shape[1]
            if call.bias is not None:
                c = torch.cat([c, c.new_ones(*c.shape[:2], 1)], -1)
            rows = _plus(rows, _second_moment(r, size, c.dtype, max_size))
            columns = _plus(columns, _second_moment(c, c.shape[-1], c.dtype, max_size))
    if rows is None or columns is None or num == 0:
        return None
    return Factors(rows / num_samples, columns / num)


def _second_moment(x: Tensor, size: int, dtype: torch.dtype, max_size: int) -> Tensor:
    if not x.is_floating_point():  # places of ones
        return torch.bincount(x, minlength=size)[None].to(dtype)
    return (x * x).sum(1) if size > max_size else x.mT @ x


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)


def combined(parts: Sequence[Factors]) -> Factors:
    """R ⊗ C near Σ_k R_k ⊗ C_k, with the same trace and the same shares of it.

    A use without the bias that comes with others has zeros in the bias's place.

    R ∝ Σ_k R_k tr C_k and C ∝ Σ_k C_k tr R_k, what is left of the sum when one of the sides is
    traced out. Exact where all R_k, or all C_k, are multiples of one matrix.
    """
    if len(parts) == 1:
        return parts[0]
    width = max(p.columns.shape[-1] for p in parts)
    rows = _alike([p.rows for p in parts])
    columns = _alike([_widened(p.columns, width) for p in parts])
    by_rows, by_columns = [_trace(r) for r in rows], [_trace(c) for c in columns]
    total = torch.stack(by_rows).sum(0)
    weighted = sum((_times(t, c) for t, c in zip(by_rows, columns, strict=True)), 0 * columns[0])
    column = _times(1 / total.where(total != 0, 1), weighted)
    whole = _trace(column)
    weighted = sum((_times(t, r) for t, r in zip(by_columns, rows, strict=True)), 0 * rows[0])
    return Factors(_times(1 / whole.where(whole != 0, 1), weighted), column)


def _widened(factor: Tensor, width: int) -> Tensor:
    """Zeros in the last places, up to the width."""
    more = width - factor.shape[-1]
    return F.pad(factor, (0, more) if factor.dim() == 2 else (0, more, 0, more))


def _alike(factors: Sequence[Tensor]) -> list[Tensor]:
    """All diagonal or none: those that are not are filled up."""
    if len({f.dim() for f in factors}) == 1:
        return list(factors)
    return [torch.diag_embed(f) if f.dim() == 2 else f for f in factors]


def _trace(factor: Tensor) -> Tensor:
    """One number for each group."""
    return factor.sum(-1) if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def _mean(factor: Tensor) -> Tensor:
    """The mean eigenvalue of each group."""
    return _trace(factor) / factor.shape[-1]


def _rounding(factor: Tensor) -> Tensor:
    """What rounding may hide of each group's eigenvalues."""
    return _ROUNDINGS * torch.finfo(factor.dtype).eps * factor.flatten(1).norm(dim=1)


def _times(numbers: Tensor, factor: Tensor) -> Tensor:
    return numbers.reshape(-1, *[1] * (factor.dim() - 1)) * factor


def floored(curvature: Tensor) -> Tensor:
    """A diagonal, whose entries below rounding count as much as rounding.

    So it can be divided by. Where all vanish, nothing is known, and they count as 1.
    """
    if curvature.numel() == 0:
        return curvature
    largest = curvature.max()
    floor = torch.finfo(curvature.dtype).eps * largest
    return torch.where(largest > 0, curvature.maximum(floor), 1.0)


def _inverse(factor: Tensor, shift: Tensor) -> Tensor:
    """(factor + shift)⁻¹ for each group, of positive semi-definite factors and positive shifts."""
    if factor.dim() == 2:
        return 1 / (factor + shift[:, None])
    lifted = factor.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    triangle, info = torch.linalg.cholesky_ex(lifted)
    if not bool(info.any()):
        return torch.cholesky_inverse(triangle)
    values, vectors = torch.linalg.eigh(factor.double())  # rounding has made it indefinite
    values = values.clamp(min=0) + shift[:, None]
    return ((vectors / values[:, None]) @ vectors.mT).to(factor.dtype)
