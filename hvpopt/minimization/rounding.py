"""The last steps, whose decrease of f is lost in its rounding."""

import math

from hvpopt import trees
from hvpopt.minimization.objective import Objective, Point
from hvpopt.minimization.result import Ending
from hvpopt.trees import TensorList


def settled(
    objective: Objective,
    point: Point,
    step: TensorList,
    predicted: float,
    *,
    is_newton: bool,
) -> Point | Ending:
    """The point a step away if the gradient is smaller there; else why no step can be judged.

    Args:
        objective: f.
        point: Where no step is seen to decrease f.
        step: To the model's minimiser.
        predicted: The decrease that the model promises of it.
        is_newton: Whether the model is positive definite and ``step`` goes to its minimum: f is
            then at its own, as far as its values can tell, if ``predicted`` is within their noise.
    """
    new = objective.expand(trees.add(point.x, step))
    noise = objective.noise(point.value)
    if predicted > noise and is_newton:
        noise = max(noise, measured_noise(objective, point, step))
    if not new.is_finite:
        return Ending.NOT_FINITE
    if new.value <= point.value + noise and new.grad_norm <= 0.9 * point.grad_norm:
        return new
    return Ending.ROUNDING if is_newton and predicted <= noise else Ending.STALLED


def measured_noise(objective: Objective, point: Point, step: TensorList) -> float:
    """How far values of f scatter about a line over distances at which f itself is straight.

    The largest second difference of seven values, some 10 ε ‖x‖ apart.

    Source: after Moré and Wild, "Estimating computational noise" (SIAM J. Sci. Comput. 33, 2011).
    """
    length = float(trees.norm(step))
    size = float(trees.norm(point.x))
    if not (0 < length < math.inf and size > 0):
        return 0.0
    spacing = min(10 * objective.rounding * size / length, 1.0)
    values = [objective.value(trees.add(point.x, step, spacing * k)) for k in range(-3, 4)]
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return max(map(abs, bends)) if all(map(math.isfinite, bends)) else 0.0
