"""Kronecker factors of the curvature of one weight, from the calls in which it is used.

A weight whose gradient is Σ_n r_n c_nᵀ (`hvpopt.engines.layer_calls`) has as its block of the
Fisher matrix, where positions are uncorrelated and r is independent of c,

    Σ_n E[r_n r_nᵀ ⊗ c_n c_nᵀ]  ≈  R ⊗ C,      R = Σ_n r_n r_nᵀ,   C = mean_n c_n c_nᵀ

(Martens and Grosse 2015, section 3; for convolutions Grosse and Martens 2016, section 3). Here
⊗ acts on matrices X of the weight's shape: (R ⊗ C) X = R X C.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.engines.layer_readers import LayerCall
from hvpopt.likelihoods import wide


@dataclass(frozen=True)
class Factors:
    """R and C for each group; each [groups, size, size], or [groups, size] if it is diagonal."""

    rows: Tensor
    columns: Tensor


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


def _times(numbers: Tensor, factor: Tensor) -> Tensor:
    return numbers.reshape(-1, *[1] * (factor.dim() - 1)) * factor


@dataclass(frozen=True)
class Eigenbasis:
    """A factor V diag(values) Vᵀ for each group; V is the identity where there is none."""

    values: Tensor
    vectors: Tensor | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {k: v for k, v in vars(self).items() if v is not None}

    @classmethod
    def of(cls, factor: Tensor) -> "Eigenbasis":
        """A factor's own; in float64 where torch does not find it in the factor's dtype."""
        if factor.dim() == 2:
            return cls(factor)
        try:
            values, vectors = torch.linalg.eigh(factor)
        except torch.linalg.LinAlgError:
            values, vectors = (x.to(factor.dtype) for x in torch.linalg.eigh(factor.double()))
        return cls(values.clamp(min=0), vectors)

    def factor(self) -> Tensor:
        """V diag(values) Vᵀ."""
        if self.vectors is None:
            return self.values
        return (self.vectors * self.values[:, None]) @ self.vectors.mT


def floored(curvature: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Eigenvalues, of which those below rounding count as much as rounding.

    So they can be divided by. Where all vanish, nothing is known, and they count as 1.
    """
    if curvature.numel() == 0:
        return curvature
    largest = curvature.amax(dims, keepdim=True) if dims else curvature.max()
    floor = torch.finfo(curvature.dtype).eps * largest
    return torch.where(largest > 0, curvature.maximum(floor), 1.0)


def solve(r: Tensor, rows: Eigenbasis, columns: Eigenbasis, shift: float) -> Tensor:
    """(R ⊗ C + shift)⁻¹ r for matrices r[groups, rows, columns]."""
    curvature = floored(rows.values[:, :, None] * columns.values[:, None, :], (1, 2))
    x = r if rows.vectors is None else rows.vectors.mT @ r
    x = x if columns.vectors is None else x @ columns.vectors
    x = x / (curvature + shift)
    x = x if rows.vectors is None else rows.vectors @ x
    return x if columns.vectors is None else x @ columns.vectors.mT
