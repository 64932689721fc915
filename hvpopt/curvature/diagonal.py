"""The diagonal of an operator from random probes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.curvature.bands import band_factor, standard_error
from hvpopt.curvature.leave_one_out import LeaveOneOut
from hvpopt.curvature.trace import check_method
from hvpopt.operators import LinearOperator
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.rows import Rows
from hvpopt.trees import TensorList

DiagonalMethod = Literal["hutchinson", "xdiag"]


@dataclass(frozen=True)
class DiagonalEstimate:
    """A diagonal from random probes, in the operator's units."""

    value: TensorList
    """Aᵢᵢ, in the shapes and dtypes of ``like``."""
    standard_error: TensorList
    """Of each entry, in the same form; ∞ for a single probe."""
    num_products: int
    """Products with A."""
    degrees_of_freedom: int
    """Of the standard errors: probes less one."""

    def band(self, level: float = 0.95) -> tuple[TensorList, TensorList]:
        """Lower and upper ends of intervals that each hold their entry with that probability.

        By Student's t: as for a scalar (`ScalarEstimate.band`), of each entry by itself.

        Raises:
            ValueError: For a level outside (0, 1).
        """
        factor = band_factor(level, self.degrees_of_freedom)
        low, high = (
            trees.add(self.value, self.standard_error, sign * factor) for sign in (-1.0, 1.0)
        )
        return low, high


def diagonal(
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    method: DiagonalMethod = "hutchinson",
    num_probes: int = 10,
    generator: torch.Generator | None = None,
) -> DiagonalEstimate:
    """The diagonal of a symmetric A, from k random probes of signs.

    | method | what is averaged | products | holds |
    |---|---|---|---|
    | hutchinson | z ⊙ Az | k | as many vectors as go at once |
    | xdiag | the diagonal on the range of A Ω without one column, z ⊙ Az for that one | 2k | 6k |

    Both are unbiased. The variance of Hutchinson's i-th entry is Σⱼ Aᵢⱼ² / k over j ≠ i; XDiag's is
    that of what a low-rank approximation leaves, and nothing where the rank of A is less than k.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices.
        method: Which estimate.
        num_probes: k. The standard error falls with its root, XDiag's faster.
        generator: For the probes (a CPU generator).

    Returns:
        The estimate with the standard error of each entry, which for XDiag takes its terms for
        independent; NaN where products are not finite.

    Raises:
        ValueError: For ``num_probes`` < 1, an unknown method, an empty ``like``, an operator that
            is not symmetric, or products of other shapes.
        TypeError: If ``like`` is missing or holds tensors that are not real floating point.

    Source: Bekas, Kokiopoulou and Saad, Applied Numerical Mathematics 57 (2007); Epperly, Tropp
    and Webber, "XTrace" (SIAM J. Matrix Anal. Appl. 45, 2024), which introduces XDiag.

    Examples:
        >>> d = torch.tensor([1.0, 2.0, -4.0])
        >>> diagonal(lambda v: [d * v[0]], [d], num_probes=2).value
        [tensor([ 1.,  2., -4.])]
    """
    estimates = {"hutchinson": _hutchinson, "xdiag": _xdiag}
    check_method("diagonal", method, tuple(estimates), num_probes)
    rows = Rows(operator, like)
    try:
        mean, error = estimates[method](rows, num_probes, generator)
    except FloatingPointError:
        mean = error = torch.full((rows.n,), torch.nan, dtype=rows.space.dtype)
    listed = rows.space.listed
    return DiagonalEstimate(listed(mean), listed(error), rows.num_products, num_probes - 1)


def _hutchinson(
    rows: Rows, num_probes: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Mean and standard error, updated with each group of probes (Chan, Golub and LeVeque)."""
    mean = squares = torch.zeros(rows.n, dtype=rows.space.dtype, device=rows.space.device)
    for first in range(0, num_probes, rows.at_once):
        count = min(rows.at_once, num_probes - first)
        probes = rows.signs(count, generator)
        terms = probes * rows.products(probes)
        center = terms.mean(0)
        apart = center - mean
        squares = squares + ((terms - center) ** 2).sum(0)
        squares = squares + apart**2 * (first * count / (first + count))
        mean = mean + apart * (count / (first + count))
    if num_probes == 1:
        return mean, torch.full_like(mean, torch.inf)
    return mean, (squares / (num_probes * (num_probes - 1))).sqrt()


def _xdiag(rows: Rows, num_probes: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """dᵢ = diag(Qᵢ Qᵢᵀ A) + ωᵢ ⊙ (I − Qᵢ Qᵢᵀ) A ωᵢ, where the second is Q sᵢ sᵢᵀ C eᵢ."""
    probes = rows.signs(num_probes, generator)
    parts = LeaveOneOut(rows, probes)
    left = parts.left.to(rows.space.device, rows.space.dtype)
    lost = left.T @ parts.basis  # (k, n), the rows Q sᵢ
    remaining = (parts.left * parts.coordinates).sum(0).to(left)
    probes.mul_(remaining[:, None]).sub_(left.T @ parts.images)
    terms = probes.mul_(lost)
    inside = (parts.basis * parts.images).sum(0)
    return inside + terms.mean(0), standard_error(terms)
