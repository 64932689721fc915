"""The condition number of an operator, by its extreme eigenpairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.curvature.reading import as_operator
from hvpopt.operators import LinearOperator
from hvpopt.options import check_range
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.eigenpairs import Eigenpairs, extreme_eigenpairs
from hvpopt.solvers.flat import Flat
from hvpopt.solvers.result import Status


@dataclass(frozen=True)
class ConditionNumber:
    """The condition number κ of A + damping · I."""

    value: float
    """λmax / λmin, both as found, so that κ itself is no less up to their errors; ∞ where the
    matrix is not positive definite beyond rounding."""
    largest: Eigenpairs
    """The largest eigenvalue of A + damping · I."""
    smallest: Eigenpairs
    """The smallest, which Lanczos approaches from above."""
    num_products: int
    """Products with A."""
    status: Status
    """CONVERGED where both are within ``rtol``."""


def condition_number(
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    damping: float = 0.0,
    max_steps: int = 100,
    rtol: float = 1e-2,
    generator: torch.Generator | None = None,
    start: tuple[Eigenpairs, Eigenpairs] | None = None,
) -> ConditionNumber:
    """κ = (λmax + damping) / (λmin + damping) of a symmetric A, by one Lanczos run.

    Without damping a network's κ is infinite, or as good as: with it, conjugate gradients on the
    damped system take some √κ / 2 · ln(2/ε) steps at most. It costs ``max_steps`` products at
    most, one a step.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices.
        damping: λ ≥ 0, in the units of A.
        max_steps: The most products; where they do not do, κ is a lower bound.
        rtol: The relative error of both eigenvalues that is small enough.
        generator: For the random start (a CPU generator).
        start: (largest, smallest) of an earlier result.

    Raises:
        ValueError: For a negative damping, and as `extreme_eigenpairs`.
        TypeError: As `extreme_eigenpairs`.

    Examples:
        >>> d = torch.tensor([3.0, 0.0])
        >>> round(condition_number(lambda v: [d * v[0]], [d], damping=1.0).value, 4)
        4.0
    """
    check_range("damping", damping, 0.0)
    damped = as_operator(operator, like).damped(damping)
    largest, smallest = extreme_eigenpairs(
        damped,
        max_steps=max_steps,
        rtol=rtol,
        converge="values",
        generator=generator,
        start=start,
    )
    high, low = largest.values[0], smallest.values[0]
    is_definite = low > 10 * torch.finfo(Flat(damped.like).dtype).eps * abs(high)
    value = high / low if is_definite else (math.nan if math.isnan(low) else math.inf)
    return ConditionNumber(value, largest, smallest, largest.num_products, largest.status)
