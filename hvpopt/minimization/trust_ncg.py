"""Trust-region Newton-CG: steps no longer than the quadratic model has proved good for."""

import math

from hvpopt import trees
from hvpopt.minimization.forcing import Forcing
from hvpopt.minimization.objective import Objective, Point
from hvpopt.minimization.result import Ending
from hvpopt.minimization.rounding import settled
from hvpopt.solvers.gltr import KrylovTrustRegion
from hvpopt.solvers.result import Status, TrustRegionStep

_ACCEPTED, _POOR, _GOOD, _BEST = 1e-3, 0.25, 0.75, 0.9
_EXACT = 1e-3  # |ρ − 1| of a model that is worth solving to the end
_MAX_TRIALS = 60
_SHORTEST = 1e-100  # whose square is still a number


class TrustNCG:
    """Steps within the radius in which the quadratic model predicts f.

    One Krylov space serves all trials of an iteration: a radius at which the model failed is
    shortened, one on whose boundary it was good doubled, and a step inside at which it was exact
    solved for to the end, without products but those that this needs.

    Args:
        objective: f.
        forcing: How accurately the subproblem is solved.
        max_inner_steps: The most products of one iteration.
        gtol: The norm of the gradient that is small enough.

    Source: Conn, Gould and Toint (2000), algorithm 6.1.1, with the subproblem of section 7.5.4;
    the doubling within an iteration is Dennis and Schnabel's (1983), section 6.4.3.
    """

    def __init__(
        self, objective: Objective, forcing: Forcing, max_inner_steps: int, gtol: float
    ) -> None:
        self._objective, self._forcing, self._gtol = objective, forcing, gtol
        self._max_inner_steps = max_inner_steps
        self._radius: float | None = None
        self._min_steps = 1

    def step(self, point: Point) -> Point | Ending:
        """A point at which f is lower, or why there is none."""
        region = KrylovTrustRegion(
            point.product, trees.scale(point.grad, -1.0), max_steps=self._max_inner_steps
        )
        rtol = self._forcing.rtol(point)
        if self._radius is None:
            self._radius = max(1.0, float(trees.norm(point.x)))
        noise = self._objective.noise(point.value)
        radius = self._radius
        for trial in range(_MAX_TRIALS):
            step = region.step(radius, rtol=rtol, min_steps=self._min_steps)
            if step.num_steps == 0:
                return Ending.NOT_FINITE
            x = trees.add(point.x, step.value)
            if step.predicted_decrease <= noise or step.norm < _SHORTEST:
                break
            value = self._objective.value(x)
            ratio = _ratio(point, step, value)
            if ratio >= _ACCEPTED:
                if trial == 0 and ratio >= _BEST:
                    better = self._improved(point, region, step, value, radius, rtol)
                    if isinstance(better, Ending):
                        return better
                    step, ratio = better
                    x = trees.add(point.x, step.value)
                new = self._objective.expand(x)
                if new.is_finite:
                    self._min_steps = 2  # but first by the gradient: no scale is known yet
                    self._radius = _next_radius(step, ratio, radius)
                    return new
                value = math.nan
            radius = step.norm * _shrinkage(point, step, value)
        newton = region.step(1e6 * max(step.norm, _SHORTEST), rtol=rtol)
        return settled(
            self._objective,
            point,
            newton.value,
            newton.predicted_decrease,
            is_newton=newton.status is Status.CONVERGED,
        )

    def _improved(
        self,
        point: Point,
        region: KrylovTrustRegion,
        step: TrustRegionStep,
        value: float,
        radius: float,
        rtol: float,
    ) -> tuple[TrustRegionStep, float] | Ending:
        """The best of longer steps while the model is good on the boundary; inside, an exact one.

        The last of the steps at doubled radii up to which f falls as the model does.
        """
        ratio, exact = _ratio(point, step, value), 0.5 * self._gtol / point.grad_norm
        for _ in range(_MAX_TRIALS):
            if not step.is_on_boundary:
                if abs(ratio - 1) > _EXACT or exact >= rtol:
                    return step, ratio
                rtol = exact
            radius = max(radius, 2 * step.norm)
            better = region.step(radius, rtol=rtol)
            reached = self._objective.value(trees.add(point.x, better.value))
            if reached == -math.inf:
                return Ending.UNBOUNDED
            reached_ratio = _ratio(point, better, reached)
            if not (reached < value and reached_ratio >= _POOR):
                return step, ratio
            step, value, ratio = better, reached, reached_ratio
            if ratio < _BEST:
                return step, ratio
        return Ending.UNBOUNDED


def _ratio(point: Point, step: TrustRegionStep, value: float) -> float:
    """ρ, the decrease of f over the model's; −∞ where f is not finite."""
    if not math.isfinite(value):
        return -math.inf
    return (point.value - value) / step.predicted_decrease


def _next_radius(step: TrustRegionStep, ratio: float, radius: float) -> float:
    if ratio < _POOR:
        return 0.5 * step.norm
    if step.is_on_boundary:
        return 2 * step.norm if ratio > _GOOD else step.norm
    return radius


def _shrinkage(point: Point, step: TrustRegionStep, value: float) -> float:
    """The factor at which a parabola through f, its slope and the trial value is least."""
    slope = float(trees.dot(point.grad, step.value))
    bend = value - point.value - slope
    if not (math.isfinite(bend) and bend > 0):
        return 0.25
    return min(max(-0.5 * slope / bend, 0.1), 0.5)
