"""The sharpness of a loss against the edge of stability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.curvature.limits import StabilityLimit
from hvpopt.curvature.reading import as_operator
from hvpopt.operators import LinearOperator
from hvpopt.solvers.checks import Operator, checked_like
from hvpopt.solvers.eigenpairs import Eigenpairs, Start, top_eigenpairs
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class Sharpness:
    """The largest curvature, and the one up to which an optimizer is stable."""

    value: float
    """The largest eigenvalue of A, or of P^-½ (A + W) P^-½ where the limit has P or W."""
    error: float
    """What it is expected to be off by."""
    limit: StabilityLimit | None
    """As given."""
    eigenpairs: Eigenpairs
    """To start the next call from; of the preconditioned matrix where there is one."""
    num_products: int
    """Products with A."""

    @property
    def ratio(self) -> float:
        """The value over the limit's threshold, above 1 beyond it; NaN without a limit."""
        return self.value / self.limit.threshold if self.limit else math.nan

    @property
    def largest_stable_lr(self) -> float:
        """The learning rate whose limit is the value; ∞ where nothing is curved upwards.

        Other groups' learning rates keep their proportion to it. NaN without a limit.
        """
        if self.limit is None:
            return math.nan
        return self.limit.lr / self.ratio if self.value > 0 else math.inf


def sharpness(
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    limit: StabilityLimit | None = None,
    max_steps: int = 50,
    rtol: float = 1e-2,
    generator: torch.Generator | None = None,
    start: Start | None = None,
) -> Sharpness:
    """The largest eigenvalue of a symmetric A, beside the limit of an optimizer's stability.

    Gradient descent with learning rate lr on a quadratic diverges along eigenvectors of more than
    2/lr; in training, the sharpness rises until it hovers there. Costs ``max_steps`` products at
    most, 5 to 20 as a rule, and fewer from the last result.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``; commonly the
            Hessian of the loss over all of the data.
        like: For the latter: gives shapes, dtypes and devices.
        limit: As of `gradient_descent_limit` or `optimizer_limit`. Its weight decay is added to A,
            and the sharpness is that of the matrix which its preconditioner makes of A.
        max_steps: The most products.
        rtol: The relative error of the eigenvalue that is small enough.
        generator: For the random start (a CPU generator).
        start: The last result's ``eigenpairs``, or another start of `top_eigenpairs`.

    Raises:
        ValueError: If the limit's preconditioner is not positive or does not fit, and as
            `top_eigenpairs`.
        TypeError: As `top_eigenpairs`.

    Examples:
        >>> from hvpopt.curvature import gradient_descent_limit
        >>> d = torch.tensor([30.0, 1.0])
        >>> found = sharpness(lambda v: [d * v[0]], [d], limit=gradient_descent_limit(0.1))
        >>> round(found.ratio, 4)
        1.5
    """
    seen = as_operator(operator, like)
    pairs = top_eigenpairs(
        seen if limit is None else _as_seen(seen, limit),
        max_steps=max_steps,
        rtol=rtol,
        converge="values",
        generator=generator,
        start=start,
    )
    return Sharpness(pairs.values[0], pairs.value_errors[0], limit, pairs, pairs.num_products)


def _as_seen(operator: LinearOperator, limit: StabilityLimit) -> LinearOperator:
    """P^-½ (A + W) P^-½."""
    if limit.weight_decay is not None:
        operator = operator.damped(limit.weight_decay)
    if limit.preconditioner is None:
        return operator
    diagonal = checked_like(limit.preconditioner, operator.like, "the limit's preconditioner")
    if not all(bool((x > 0).all()) for x in diagonal):
        raise ValueError("The limit's preconditioner has entries that are not positive.")
    roots = [x.rsqrt() for x in diagonal]

    def scaled(v: Sequence[Tensor]) -> TensorList:
        return list(torch._foreach_mul(roots, list(v)))

    return LinearOperator(operator.like, lambda v: scaled(operator(scaled(v))))
