"""The Frobenius norm of an operator from random probes."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hvpopt.curvature.bands import ScalarEstimate, mean_estimate
from hvpopt.curvature.trace import check_method, outside_signs
from hvpopt.operators import LinearOperator
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.rows import Rows

NormMethod = Literal["hutchinson", "hutch++"]


def frobenius_norm(
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    method: NormMethod = "hutchinson",
    num_probes: int = 10,
    generator: torch.Generator | None = None,
) -> ScalarEstimate:
    """‖A‖_F = (Σᵢ λᵢ²)^½ of a symmetric A, from k random probes of signs.

    ‖A z‖² is zᵀA²z, so that its mean is tr A² = ‖A‖²_F, which the estimate of the square is
    unbiased for. "hutchinson" takes k products. "hutch++" takes ‖A Q‖²_F on the range of A S, of
    ⌈k/2⌉ columns, exactly, and samples ‖A z‖² outside of it: k + ⌈k/2⌉ products, exact where the
    rank of A is less than k/2, and far better where a few eigenvalues are large, as they carry
    nearly all of the norm.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices.
        method: Which estimate.
        num_probes: k.
        generator: For the probes (a CPU generator).

    Returns:
        The norm, with the standard error that its square's has to first order; NaN if a product
        is not finite.

    Raises:
        ValueError: For ``num_probes`` < 1, or 2 for hutch++; an unknown method, an empty ``like``,
            an operator that is not symmetric, or products of other shapes.
        TypeError: If ``like`` is missing or holds tensors that are not real floating point.

    Examples:
        >>> d = torch.tensor([3.0, -4.0])
        >>> frobenius_norm(lambda v: [d * v[0]], [d], num_probes=2).value
        5.0
    """
    check_method("frobenius_norm", method, ("hutchinson", "hutch++"), num_probes)
    rows = Rows(operator, like)
    inside, terms = 0.0, []
    try:
        if method == "hutch++":
            _, images, probes = outside_signs(rows, num_probes, generator)
            inside = float(torch.linalg.vector_norm(images)) ** 2
            terms.append(_squares(rows, probes))
        else:
            for first in range(0, num_probes, rows.at_once):
                count = min(rows.at_once, num_probes - first)
                terms.append(_squares(rows, rows.signs(count, generator)))
    except FloatingPointError:
        return ScalarEstimate(math.nan, math.nan, rows.num_products, num_probes - 1)
    squares = inside + torch.cat(terms).cpu().double()
    square = mean_estimate(squares, rows.num_products, ScalarEstimate)
    norm = math.sqrt(square.value)
    error = square.standard_error / (2 * norm) if norm > 0 else square.standard_error
    return ScalarEstimate(norm, error, rows.num_products, square.degrees_of_freedom)


def _squares(rows: Rows, probes: Tensor) -> Tensor:
    products = rows.products(probes)
    return torch.linalg.vecdot(products, products)
