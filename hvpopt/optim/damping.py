"""Levenberg-Marquardt damping: how far to trust a quadratic model of the loss."""

import math


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
