"""The first damping, from trial steps that leave the parameters where they are."""

import math
from collections.abc import Callable, Sequence

from hvpopt import trees
from hvpopt.optim.damping import reduction_ratio
from hvpopt.optim.model import DampedModel, trial
from hvpopt.optim.objective import Objective
from hvpopt.solvers.result import Solution


def first_damping(
    objective: Objective,
    lr: Sequence[float],
    model_of: Callable[[float], DampedModel],
    minimized: Callable[[DampedModel], Solution],
) -> float:
    """λ for the first step, in the units of the curvature.

    The search (`calibrated`) begins at gᵀBg / gᵀg, the curvature along the gradient; without any
    there, λ is 1.

    Args:
        objective: at the parameters, where it is left.
        lr: of each parameter; smaller ones than 1, of a warm-up say, are scaled up, so that the
            model is asked about steps of its own length.
        model_of: λ ↦ the model with it.
        minimized: a model ↦ its solution.
    """

    longest = max(lr)
    lr = [each / longest for each in lr] if 0 < longest < 1 else lr if longest else [1.0] * len(lr)

    def ratio(damping: float) -> float:
        model = model_of(damping)
        solution = minimized(model)
        if solution.num_steps == 0:
            return math.nan
        found = trial(model, lr, solution.value, solution.num_steps, solution.model_value)
        change = found.value - objective.value
        return reduction_ratio(change, found.predicted(), noise=objective.noise)

    g = objective.grad
    along = abs(float(trees.dot(g, objective.product(g)) / trees.dot(g, g)))
    if objective.is_partial:  # its F says nothing of the other data's curvature
        return along if 0 < along < math.inf else 1.0
    damping = calibrated(ratio, along) if 0 < along < math.inf else 1.0
    objective.restore()
    return damping


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
