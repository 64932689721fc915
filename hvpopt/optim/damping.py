"""Levenberg-Marquardt damping: how far to trust a quadratic model of the loss."""

import math
from collections.abc import Callable


def reduction_ratio(actual: float, predicted: float, *, noise: float = 0.0) -> float:
    """The decrease of the loss over the decrease that its model predicts.

    ρ = (F(θ+p) − F(θ)) / (gᵀp + ½ pᵀB p), both negative for a good step, B without damping.

    Args:
        actual: F(θ+p) − F(θ).
        predicted: the model's change, negative.
        noise: the rounding error of ``actual``.

    Returns:
        ρ; −inf where the loss rose, or the model does not predict a decrease; NaN where the
        change is too small to be measured, which says nothing about the model.

    Source: Martens (2010), "Deep learning via Hessian-free optimization", section 4.1.

    Examples:
        >>> reduction_ratio(-0.9, -1.0)
        0.9
    """
    if math.isnan(actual) or math.isnan(predicted):
        return -math.inf
    if abs(actual) <= noise and abs(predicted) <= noise:
        return math.nan
    if actual > 0 or predicted >= 0:
        return -math.inf
    return actual / predicted


def levenberg_marquardt(
    damping: float,
    ratio: float,
    *,
    factor: float = 1.5,
    bounds: tuple[float, float] = (1e-12, 1e12),
) -> float:
    """The damping for the next step, from the reduction ratio of this one.

    λ ← factor·λ where ρ < ¼; λ ← λ/factor where ρ > ¾; unchanged in between and where ρ is NaN.

    Args:
        damping: λ, in the units of the curvature.
        ratio: ρ, see `reduction_ratio`.
        factor: 3/2 in the source; 1 keeps the damping fixed.
        bounds: λ is clipped to them.

    Source: Martens (2010), section 4.1.

    Examples:
        >>> levenberg_marquardt(1.0, 0.1), levenberg_marquardt(1.5, 0.9)
        (1.5, 1.0)
    """
    if ratio < 0.25:
        damping *= factor
    elif ratio > 0.75:
        damping /= factor
    return min(max(damping, bounds[0]), bounds[1])


def slope_balanced(
    damping: float,
    slope_ratio: float,
    *,
    factor: float = 1.5,
    gain: float = 0.2,
    bounds: tuple[float, float] = (1e-12, 1e12),
) -> float:
    """The damping for a new batch, from its slope at the end of the last step.

        λ ← λ · factor^(−gain · s),      s = g′ᵀp / gᵀp  within [−1/gain, 1].

    The step p was made on another batch, whose gradient at its start was g; g′ is the new batch's
    at its end. On the average over batches s is zero where p ended at the minimum of the expected
    loss along p, whatever the noise of the gradients: so λ settles. The reduction ratio on p's
    own batch does not see that p fits its noise, and λ would fall until it does; the ratio on the
    new batch is small for any λ where the noise is large, and λ would grow forever. NaN leaves λ.

    Args:
        damping: λ, in the units of the curvature.
        slope_ratio: s.
        factor: the damping's factor a step.
        gain: a fraction of it, as one batch says little.
        bounds: λ is clipped to them.

    Source: hypergradient descent (Baydin et al., ICLR 2018), for a damping in place of a learning
    rate.

    Examples:
        >>> round(slope_balanced(1.0, -1.0, gain=1.0), 6)
        1.5
    """
    if math.isnan(slope_ratio):
        return damping
    damping *= factor ** (-gain * min(max(slope_ratio, -1 / gain), 1.0))
    return min(max(damping, bounds[0]), bounds[1])


def calibrated(
    ratio: Callable[[float], float],
    damping: float,
    *,
    low: float = 0.75,
    high: float = 0.95,
    factor: float = 10.0,
    max_trials: int = 5,
) -> float:
    """A damping with which the model agrees with the loss, but not by being timid.

    Looks for λ with low ≤ ρ(λ) ≤ high: in steps of ``factor`` until ρ is on the other side, then
    once halfway (in ln λ). Where none is found, the least λ with ρ ≥ low that was tried, or else
    the first.

    Args:
        ratio: λ ↦ the reduction ratio of a trial step with it; NaN ends the search.
        damping: the first λ tried, of the size of the curvature.
        low, high: the bounds of ρ.
        factor: how far apart the λ tried are.
        max_trials: at most so many.

    Examples:
        >>> calibrated(lambda x: x / (x + 1.0), 1.0)
        10.0
    """
    tried: dict[float, float] = {}
    for _ in range(max_trials):
        rho = tried[damping] = ratio(damping)
        if math.isnan(rho) or low <= rho <= high:
            break
        below = [x for x, r in tried.items() if r < low]
        above = [x for x, r in tried.items() if r > high]
        if below and above:
            middle = math.sqrt(max(below) * min(above))
            if min(above) / max(below) < 1.01 * math.sqrt(factor):
                break
            damping = middle
        else:
            damping = damping * factor if below else damping / factor
    good = [x for x, r in tried.items() if r >= low]
    return min(good) if good else next(iter(tried))
