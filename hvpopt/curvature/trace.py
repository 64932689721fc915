"""The trace of an operator from random probes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hvpopt.curvature.bands import ScalarEstimate, mean_estimate
from hvpopt.curvature.leave_one_out import LeaveOneOut, orthonormal
from hvpopt.operators import LinearOperator
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.rows import Rows

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]


@dataclass(frozen=True)
class TraceEstimate(ScalarEstimate):
    """A trace from random probes, in the operator's units, with its standard error."""


def trace(
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    method: TraceMethod = "hutchinson",
    num_probes: int = 10,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """The trace of a symmetric A, from k random probes.

    | method | what is averaged | products | holds |
    |---|---|---|---|
    | hutchinson | zᵀAz over signs z | k | as many vectors as go at once |
    | hutch++ | the trace on the range of A S, and zᵀAz outside | k + ⌈k/2⌉ | 2k vectors |
    | xtrace | the trace on the range of A Ω without one column, zᵀAz for that one | 2k | 4k |

    All are unbiased. Hutchinson's variance is 2 (‖A‖²_F − Σᵢ Aᵢᵢ²) / k: a diagonal A is exact with
    one probe. The others are exact where the rank of A is less than k/2, and k, and have the error
    of Hutchinson's on what a low-rank approximation leaves; they pay where a few eigenvalues carry
    ‖A‖_F, as those of loss functions do. Hutch++ takes ⌈k/2⌉ probes for S. XTrace takes each probe
    in turn for the one that is left out, and scales what is outside of the range to the length
    that it has on average, so that ‖A‖_F is not taken for the trace's own uncertainty.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices.
        method: Which estimate.
        num_probes: k. The standard error falls with its root, that of the others faster.
        generator: For the probes (a CPU generator).

    Returns:
        The estimate with its standard error, which for XTrace takes its terms for independent;
        NaN if a product is not finite.

    Raises:
        ValueError: For ``num_probes`` < 1, or 2 for hutch++; an unknown method, an empty ``like``,
            an operator that is not symmetric, or products of other shapes.
        TypeError: If ``like`` is missing or holds tensors that are not real floating point.

    Source: Hutchinson, Commun. Stat. Simul. Comput. 19 (1990); Meyer, Musco, Musco and Woodruff,
    "Hutch++: optimal stochastic trace estimation" (SOSA 2021), algorithm 1; Epperly, Tropp and
    Webber, "XTrace" (SIAM J. Matrix Anal. Appl. 45, 2024).

    Examples:
        >>> diagonal = torch.tensor([1.0, 2.0, -4.0])
        >>> estimate = trace(lambda v: [diagonal * v[0]], [diagonal], num_probes=2)
        >>> estimate.value, estimate.standard_error, estimate.num_products
        (-1.0, 0.0, 2)
    """
    estimates = {"hutchinson": _hutchinson, "hutch++": _hutch_pp, "xtrace": _xtrace}
    check_method("trace", method, tuple(estimates), num_probes)
    rows = Rows(operator, like)
    try:
        base, terms = estimates[method](rows, num_probes, generator)
    except FloatingPointError:
        return TraceEstimate(math.nan, math.nan, rows.num_products, num_probes - 1)
    return mean_estimate(base + terms, rows.num_products, TraceEstimate)


def check_method(what: str, method: str, methods: tuple[str, ...], num_probes: int) -> None:
    """Lets a known method with enough probes pass.

    Raises:
        ValueError: If it is neither.
    """
    if method not in methods:
        raise ValueError(
            f"method={method!r} is unknown: choose one of {', '.join(map(repr, methods))}."
        )
    least = 2 if method == "hutch++" else 1
    if num_probes < least:
        raise ValueError(f"{what} needs num_probes ≥ {least}, got {num_probes}.")


def outside_signs(
    rows: Rows, num_probes: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hutch++'s basis Q of the range of A S, A Q, and signs less their components along Q.

    S has ⌈k/2⌉ columns of signs, the other ⌊k/2⌋ probes are projected; all as rows.
    """
    sketch = rows.products(rows.signs((num_probes + 1) // 2, generator))
    basis, _ = orthonormal(sketch)
    images = rows.products(basis) if len(basis) else basis
    probes = rows.signs(num_probes // 2, generator)
    return basis, images, probes - (probes @ basis.T) @ basis


def _hutchinson(
    rows: Rows, num_probes: int, generator: torch.Generator | None
) -> tuple[float, Tensor]:
    terms = []
    for first in range(0, num_probes, rows.at_once):
        probes = rows.signs(min(rows.at_once, num_probes - first), generator)
        terms.append(torch.linalg.vecdot(probes, rows.products(probes)))
    return 0.0, torch.cat(terms).cpu().double()


def _hutch_pp(
    rows: Rows, num_probes: int, generator: torch.Generator | None
) -> tuple[float, Tensor]:
    basis, images, probes = outside_signs(rows, num_probes, generator)
    inside = float(torch.linalg.vecdot(basis, images).double().sum())
    return inside, torch.linalg.vecdot(probes, rows.products(probes)).cpu().double()


def _xtrace(rows: Rows, num_probes: int, generator: torch.Generator | None) -> tuple[float, Tensor]:
    """trᵢ = tr Qᵢᵀ A Qᵢ + (n − rank Qᵢ) μᵀAμ/μᵀμ with μ = (I − Qᵢ Qᵢᵀ) ωᵢ and normal ωᵢ."""
    probes = rows.normals(num_probes, generator)
    parts = LeaveOneOut(rows, probes)

    def small(x: Tensor) -> Tensor:
        return x.cpu().double()

    left, coordinates = parts.left, parts.coordinates
    inside = small(parts.basis @ parts.images.T)
    along = small(parts.basis @ probes.T)
    along = along - left * (left * along).sum(0)  # Qᵀ Qᵢ Qᵢᵀ ωᵢ
    curved = (
        small(torch.linalg.vecdot(probes, parts.sketch))
        - 2 * (along * coordinates).sum(0)
        + (along * (inside @ along)).sum(0)
    )
    lengths = small(torch.linalg.vecdot(probes, probes)) - (along**2).sum(0)
    remaining = rows.n - parts.ranks
    rest = torch.where(remaining > 0, remaining * curved / lengths, torch.zeros_like(curved))
    return float(inside.trace()), rest - (left * (inside @ left)).sum(0)
