"""The range of a sketch without each of its columns in turn."""

import math

import torch
from torch import Tensor

from hvpopt.solvers.rows import Rows


class LeaveOneOut:
    """An orthonormal basis Q of the range of Y = A Ω, and what it lacks without one column of Ω.

    Leaving out column i takes at most one direction from the range: with Y = Q C, the unit
    vector sᵢ of coordinates that is orthogonal to all columns of C but the i-th, so that
    Qᵢ Qᵢᵀ = Q (I − sᵢ sᵢᵀ) Qᵀ projects on the range of the others. That is a multiple of the
    i-th column of (C⁺)ᵀ, or zero where the other columns span the same range, which holds
    unless eᵢ lies in the row space of C.

    Args:
        operator: A.
        probes: (k, n), the columns of Ω as rows.

    Attributes:
        sketch: (k, n), the columns of Y.
        basis: (r, n), those of Q.
        images: (r, n), those of A Q.
        coordinates: (r, k) C, float64 on the CPU.
        left: (r, k), the columns sᵢ.
        ranks: (k,), of the ranges without one.

    Raises:
        FloatingPointError: If a product is not finite.

    Source: Epperly, Tropp and Webber, "XTrace: making the most of every sample in stochastic
    trace estimation" (SIAM Journal on Matrix Analysis and Applications 45, 2024), where it is the
    downdating of a QR factorisation of full rank.
    """

    def __init__(self, operator: Rows, probes: Tensor) -> None:
        self.sketch = operator.products(probes)
        self.basis, self.coordinates = orthonormal(self.sketch)
        rank = len(self.basis)
        self.images = operator.products(self.basis) if rank else self.basis
        if not bool(torch.isfinite(self.images).all()):
            raise FloatingPointError
        inverse = torch.linalg.pinv(self.coordinates)  # (k, r)
        leverage = (inverse * self.coordinates.T).sum(1)
        is_needed = leverage > 1 - 1e-6
        lengths = torch.linalg.vector_norm(inverse, dim=1).clamp(
            min=torch.finfo(torch.float64).tiny
        )
        self.left = (inverse / lengths[:, None]).T * is_needed
        self.ranks = rank - is_needed.long()


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows (r, n) that span rows (k, n), and the coordinates (r, k) of these, float64.

    What is rounding next to the largest of ``rows`` is left out.

    Raises:
        FloatingPointError: If ``rows`` are not finite.
    """
    if not bool(torch.isfinite(rows).all()):
        raise FloatingPointError
    q, r = torch.linalg.qr(rows.T)
    r = r.cpu().double()
    u, sizes, _ = torch.linalg.svd(r)
    floor = 10 * math.sqrt(len(rows)) * torch.finfo(rows.dtype).eps * float(sizes[0])
    rank = int((sizes > floor).sum())
    if rank == len(rows):
        return q.T, r
    u = u[:, :rank]
    return (q @ u.to(q.device, q.dtype)).T, u.T @ r
