"""How far to go along a direction."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LineSearchResult:
    """Where a line search ended.

    Attributes:
        step: the accepted multiple of the direction; 0 where none was accepted.
        value: the loss there.
        first_value: the loss at the first trial, the full step.
        num_evaluations: how many losses were computed.
    """

    step: float
    value: float
    first_value: float
    num_evaluations: int


def armijo(
    evaluate: Callable[[float], float],
    value: float,
    slope: float,
    *,
    sufficient_decrease: float = 1e-2,
    factor: float = 0.5,
    max_evaluations: int = 10,
    noise: float = 0.0,
    first_value: float | None = None,
) -> LineSearchResult:
    """The first of the steps 1, factor, factor², … that decreases the loss sufficiently:

        F(θ + t p) ≤ F(θ) + c t gᵀp + noise.

    Args:
        evaluate: t ↦ F(θ + t p); NaN and infinities count as no decrease.
        value: F(θ).
        slope: gᵀp, negative.
        sufficient_decrease: c.
        factor: what a rejected step is multiplied by.
        max_evaluations: after so many trials the search gives up.
        noise: the rounding error of the loss, below which an increase is none.
        first_value: F(θ + p), where it is known and ``evaluate`` was last called with 1.

    Returns:
        The last step tried is the accepted one, so that what ``evaluate`` moved stays there.

    Source: Armijo (1966); Nocedal and Wright (2006), algorithm 3.1.

    Examples:
        >>> armijo(lambda t: (1 - 4 * t) ** 2, value=1.0, slope=-8.0).step
        0.25
    """
    step, first = 1.0, math.nan
    for trial in range(1, max_evaluations + 1):
        known = first_value if trial == 1 else None
        reached = evaluate(step) if known is None else known
        if trial == 1:
            first = reached
        if reached <= value + sufficient_decrease * step * slope + noise:
            return LineSearchResult(step, reached, first, trial)
        step *= factor
    return LineSearchResult(0.0, value, first, max_evaluations)
