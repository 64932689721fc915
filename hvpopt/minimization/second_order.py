"""Where the gradient vanishes: is it a minimum, and if not, which way is down?"""

import math
from collections.abc import Callable

from hvpopt import trees
from hvpopt.minimization.objective import Objective, Point
from hvpopt.solvers.curvature import LeastCurvature
from hvpopt.trees import TensorList


def way_down(
    objective: Objective, point: Point, least: LeastCurvature, gtol: float
) -> TensorList | None:
    """A point to which f falls from a stationary one, along the eigenvector; None if none is seen.

    With a negative eigenvalue λ, one with f(x ± t v) ≤ f(x) − 0.1 · ½ |λ| t². With an eigenvalue
    of zero, as on a monkey saddle, one where f has fallen by more than ten times what the
    tolerance on the gradient lets it, at one of three short distances.
    """
    size = max(1.0, float(trees.norm(point.x)))
    downhill = -math.copysign(1.0, float(trees.dot(point.grad, least.vector)))

    def fallen(t: float) -> float:
        return point.value - objective.value(trees.add(point.x, least.vector, t))

    noise = objective.noise(point.value)
    if not least.is_negative:
        if not _leaves_open(least, gtol, size):
            return None
        for distance in (1e-3, 1e-2, 1e-1):
            for sign in (downhill, -downhill):
                t = sign * distance * size
                if fallen(t) > max(noise, 10 * gtol * abs(t)):
                    return trees.add(point.x, least.vector, t)
        return None
    t, enough = 0.1 * size, 0.05 * abs(least.value)
    while enough * t**2 > noise and t > objective.rounding * size:
        for sign in (downhill, -downhill):
            gained = fallen(sign * t)
            if gained >= enough * t**2:
                return trees.add(point.x, least.vector, _stretched(fallen, sign * t, gained))
        t *= 0.25
    return None


def _stretched(fallen: Callable[[float], float], t: float, gained: float) -> float:
    """The last of t, 2t, 4t, … up to which f goes on falling."""
    for _ in range(60):
        more = fallen(2 * t)
        if not more > gained:
            break
        t, gained = 2 * t, more
    return t


def _leaves_open(least: LeastCurvature, gtol: float, size: float) -> bool:
    """Whether the least curvature does not tell what kind of point this is.

    So where it is zero, or so small that a gradient of ``gtol`` may belong to a stationary point
    that is not close by, next to the size of x: an inflection, say.
    """
    is_zero = abs(least.value) <= least.tolerance * least.scale
    return is_zero or least.value * least.tolerance**0.75 * size < gtol
