"""Levenberg-Marquardt damping: how far to trust a quadratic model of the loss."""

import math

_NO_PART = 0.01


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
    growth: float | None = None,
    bounds: tuple[float, float] = (1e-12, 1e12),
) -> float:
    """The damping for the next step, from the reduction ratio of this one.

    λ ← growth·λ where ρ < ¼; λ ← λ/factor where ρ > ¾; unchanged in between and where ρ is NaN.

    Args:
        damping: λ, in the units of the curvature.
        ratio: ρ, see `reduction_ratio`.
        factor: 3/2 in the source; 1 keeps the damping from falling.
        growth: ``factor`` where None, as in the source.
        bounds: λ is clipped to them.

    Source: Martens (2010), section 4.1.

    Examples:
        >>> levenberg_marquardt(1.0, 0.1), levenberg_marquardt(1.5, 0.9)
        (1.5, 1.0)
    """
    if ratio < 0.25:
        damping *= factor if growth is None else growth
    elif ratio > 0.75:
        damping /= factor
    return min(max(damping, bounds[0]), bounds[1])


def damping_after(
    damping: float,
    ratio: float,
    slope_ratio: float,
    num_batches: int,
    factor: float = 1.5,
    least: float = 1e-12,
    share: float = math.inf,
) -> float:
    """The damping for the next step, on the same batch or on others.

    On the same batch, where s is NaN, `levenberg_marquardt` with growth by factor²: with momentum
    a large λ costs little, and a step that goes too far costs much. It does not fall where it has
    next to no part in the step, pᵀΛ p < 0.01 pᵀB p: good steps are not its merit then, and it would
    fall for ever, and with it what keeps a preconditioner in bounds. Where each step has another
    batch,

        λ ← factor²·λ where ρ < ½ or s < −1;    λ ← λ / factor^γ where ρ > ¾ and s > −¼,

    with γ = max(¼, 1/√k), and not below ``least``. Steps are short there for the noise's sake
    (`balanced_scale`), and ρ is near 1 for any λ until the model breaks down at once: so λ falls
    slower, not while steps go too far, and grows faster.

    Args:
        damping: λ, in the units of the curvature.
        ratio: ρ of this step, on its own batch.
        slope_ratio: s, as in `balanced_scale`.
        num_batches: k, so far.
        factor: 1 keeps λ.
        least: what λ falls to on other batches.
        share: pᵀΛ p / pᵀB p of this step.

    Examples:
        >>> damping_after(1.0, 0.9, math.nan, 0), damping_after(1.0, 0.9, -2.0, 1)
        (0.6666666666666666, 2.25)
    """
    if factor == 1:
        return damping
    if math.isnan(slope_ratio):
        if ratio > 0.75 and share < _NO_PART:
            return damping
        return levenberg_marquardt(damping, ratio, factor=factor, growth=factor**2)
    if ratio < 0.5 or slope_ratio < -1:
        damping *= factor**2
    elif ratio > 0.75 and slope_ratio > -0.25:
        damping /= factor ** max(0.25, 1 / math.sqrt(max(num_batches, 1)))
    return min(max(damping, least, 1e-12), 1e12)


def balanced_radius(
    radius: float, slope_ratio: float, *, factor: float = 1.5, gain: float = 0.2
) -> float:
    """The trust region's radius for a new batch, from its slope at the end of the last step.

        Δ ← Δ · factor^(gain · s),      s = g′ᵀp / gᵀp  within [−1/gain, 1].

    The step p was made on another batch, whose gradient at its start was g; g′ is the new batch's
    at its end. On the average over batches s is zero where p ended at the minimum of the expected
    loss along p, whatever the noise of the gradients: so Δ settles. The reduction ratio on p's
    own batch does not see that p fits its noise, and Δ would grow until it does; the ratio on the
    new batch is small for any Δ where the noise is large, and Δ would fall forever. NaN leaves Δ.

    Args:
        radius: Δ, from 1e-30 to 1e30.
        slope_ratio: s.
        factor: the radius's factor a step.
        gain: a fraction of it, as one batch says little.

    Source: hypergradient descent (Baydin et al., ICLR 2018), for a radius in place of a learning
    rate.

    Examples:
        >>> balanced_radius(1.0, 1.0, gain=1.0)
        1.5
    """
    if math.isnan(slope_ratio):
        return radius
    radius *= factor ** (gain * min(max(slope_ratio, -1 / gain), 1.0))
    return min(max(radius, 1e-30), 1e30)


def balanced_scale(
    scale: float,
    slope_ratio: float,
    num_batches: int,
    *,
    gain: float = 0.1,
    overshoot: float = 0.02,
) -> float:
    """What steps are multiplied by after a new batch, from its slope at the end of the last step.

        α ← α · 2^c,    c = γ (s + τ) within [−2, γ],    γ = max(gain, 1/√(1 + k)),    α ≤ 1,

    with s = g′ᵀp over the average gᵀp of the last steps, see `balanced_radius`, and k the batches
    so far. On the average s is zero where p ends at the minimum of the expected loss along it, so
    α settles where noise and progress balance: near 1 while batches agree, small where the gradient
    is mostly noise. That is the best end of one step alone, and too short for the many: along the
    directions of little curvature there is further to go (the short-horizon bias of Wu et al.,
    ICLR 2018). So steps may go too far by a share τ of their slope.

    The length is the right thing to adapt. With λ small all directions contract at one rate, which
    one number can balance against the noise. A larger λ would shorten the steps in the directions
    of little curvature alone. NaN leaves α.

    Args:
        scale: α, at first 1.
        slope_ratio: s.
        num_batches: k.
        gain: of late batches; 0 keeps α.
        overshoot: τ, about what the noise may cost of a batch's decrease.

    Source: hypergradient descent (Baydin et al., ICLR 2018).

    Examples:
        >>> balanced_scale(0.5, -0.02, 10), balanced_scale(1.0, -1.02, 0)
        (0.5, 0.5)
        >>> balanced_scale(1.0, 1.0, 0)
        1.0
    """
    if math.isnan(slope_ratio) or gain == 0:
        return scale
    pace = max(gain, 1 / math.sqrt(1 + num_batches))
    return min(scale * 2.0 ** min(max(pace * (slope_ratio + overshoot), -2.0), pace), 1.0)
