"""Newton-CG with a line search, which also follows negative curvature."""

import math

from hvpopt import trees
from hvpopt.minimization.forcing import Forcing
from hvpopt.minimization.line_search import Ray, search
from hvpopt.minimization.objective import Objective, Point
from hvpopt.minimization.result import Ending
from hvpopt.minimization.rounding import settled
from hvpopt.solvers.capped_cg import capped_cg
from hvpopt.solvers.result import Solution
from hvpopt.solvers.stopping import ResidualNorm
from hvpopt.trees import TensorList


class NewtonCG:
    """Steps along the capped conjugate-gradient solution, or a direction of negative curvature.

    Args:
        objective: f.
        forcing: How accurately the Newton system is solved.
        max_inner_steps: The most products of one iteration.
        damping: ε over the norm of H: H + 2εI is solved, and curvature below −ε is followed.

    Source: Royer, O'Neill and Wright (2020), algorithm 3, with the forcing terms of Nocedal and
    Wright in the place of its accuracy.
    """

    def __init__(
        self, objective: Objective, forcing: Forcing, max_inner_steps: int, damping: float = 1e-8
    ) -> None:
        self._objective, self._forcing = objective, forcing
        self._max_inner_steps, self._damping = max_inner_steps, damping

    def step(self, point: Point) -> Point | Ending:
        """A point at which f is lower, or why there is none."""
        solution = self._solve(point)
        if solution is None:
            return Ending.NOT_FINITE
        objective = self._objective
        d, curvature = _direction(solution)
        is_newton = solution.direction is None
        slope = float(trees.dot(point.grad, d))
        ray = Ray(point.value, slope, curvature, is_newton, objective.noise(point.value))
        predicted = ray.predicted_decrease(1.0)
        converged = is_newton and solution.status.converged
        if predicted <= ray.noise and is_newton:
            return settled(objective, point, d, predicted, is_newton=converged)
        longest = math.inf
        for _ in range(10):
            found = search(
                lambda t: objective.value(trees.add(point.x, d, t)),
                ray,
                first=min(longest, 1.0 if solution.num_steps else _first_length(point, d, ray)),
                may_lengthen=longest == math.inf,
            )
            if found is Ending.STALLED and is_newton:
                return settled(objective, point, d, predicted, is_newton=converged)
            if isinstance(found, Ending):
                return found
            new = objective.expand(trees.add(point.x, d, found))
            if new.is_finite:
                return new
            longest = found / 2
        return Ending.NOT_FINITE

    def _solve(self, point: Point) -> Solution | None:
        """The solution or direction; None where no product is finite."""
        b = trees.scale(point.grad, -1.0)
        first = point.product(b)
        norm = float(trees.norm(first)) / point.grad_norm
        if not math.isfinite(norm):
            return None
        unused = [first]

        def product(v: TensorList) -> TensorList:
            return unused.pop() if unused else point.product(v)  # CG begins with b itself

        return capped_cg(
            product,
            b,
            epsilon=self._damping * norm or 1.0,
            stop=ResidualNorm(rtol=self._forcing.rtol(point)),
            max_steps=self._max_inner_steps,
        )


def _direction(solution: Solution) -> tuple[TensorList, float]:
    """The direction d to search along, and dᵀHd.

    Where negative curvature was met after some steps, it is the iterate plus the direction at the
    same length: they are conjugate, so the model falls along both.
    """
    y, p = solution.value, solution.direction
    curved = -2 * solution.model_value
    if p is None:
        return y, curved
    length = float(trees.norm(p))
    if solution.num_steps == 0:
        return p, solution.min_curvature * length**2
    share = float(trees.norm(y)) / length
    return trees.add(y, p, share), curved + solution.min_curvature * (share * length) ** 2


def _first_length(point: Point, d: TensorList, ray: Ray) -> float:
    """Where the model along negative curvature has fallen twice as far as the slope alone."""
    size = max(1.0, float(trees.norm(point.x))) / float(trees.norm(d))
    if ray.curvature == 0:
        return size
    return min(-ray.slope / -ray.curvature, size) if ray.slope < 0 else size
