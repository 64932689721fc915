"""The two forms in which estimators are given a matrix, as one."""

from collections.abc import Sequence

from torch import Tensor

from hvpopt.operators import LinearOperator, from_product
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.rows import read


def as_operator(
    operator: LinearOperator | Operator, like: Sequence[Tensor] | None
) -> LinearOperator:
    """A symmetric `LinearOperator`, from one or from a product v ↦ A v on lists like ``like``.

    Raises:
        As `hvpopt.solvers.rows.read`.
    """
    seen = read(operator, like)
    return seen if isinstance(seen, LinearOperator) else from_product(seen, seen.like)
