"""The way off a saddle point, where the gradient shows none."""

from hvpopt.optim.line_search import LineSearchResult
from hvpopt.optim.objective import Objective
from hvpopt.trees import TensorList


def escaped(
    objective: Objective,
    eigenvalue: float,
    vector: TensorList,
    *,
    sufficient_decrease: float = 0.1,
    max_evaluations: int = 30,
) -> LineSearchResult:
    """Moves the parameters along ± a direction of negative curvature until F falls enough:

        F(θ ± t v) ≤ F(θ) + ½ c t² λ,      t = 1, ½, ¼ …

    Where no t does, the parameters are as before. The step is negative where −v was taken.

    Source: Moré and Sorensen, "On the use of directions of negative curvature in a modified
    Newton method" (Mathematical Programming, 1979), section 3, without the curved path.
    """
    length, first = 1.0, float("nan")
    for trial in range(1, max_evaluations + 1):
        signed = length if trial % 2 else -length
        reached = objective.move(vector, signed)
        first = reached if trial == 1 else first
        bound = 0.5 * sufficient_decrease * length**2 * eigenvalue
        if reached <= objective.value + bound and reached < objective.value - objective.noise:
            return LineSearchResult(signed, reached, first, trial)
        length *= 1.0 if trial % 2 else 0.5
    objective.restore()
    return LineSearchResult(0.0, objective.value, first, max_evaluations)
