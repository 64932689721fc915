"""The way off a saddle point, where the gradient shows none."""

import torch

from hvpopt import trees
from hvpopt.optim.line_search import LineSearchResult
from hvpopt.optim.objective import Objective
from hvpopt.solvers.lanczos import top_eigenpairs
from hvpopt.solvers.result import Status
from hvpopt.trees import TensorList


def most_negative(
    objective: Objective, like: TensorList, *, seed: int, max_steps: int = 40
) -> tuple[float, TensorList] | None:
    """The least eigenvalue of the objective's Hessian and its unit vector; None if not negative.

    Negative is what lies below zero by more than Lanczos' error and 1e-3 of the largest
    eigenvalue met in absolute value.

    Args:
        objective: whose ``product`` is the Hessian's.
        like: the parameters.
        seed: of the random start.
        max_steps: the most products.
    """
    largest = 0.0

    def negated(v: TensorList) -> TensorList:
        nonlocal largest
        product = objective.product(v)
        largest = max(largest, float(trees.norm(product) / trees.norm(v)))
        return trees.scale(product, -1.0)

    generator = torch.Generator().manual_seed(seed)
    found = top_eigenpairs(
        negated, like, max_steps=min(max_steps, sum(p.numel() for p in like)),
        generator=generator,
    )  # fmt: skip
    if found.status is Status.BREAKDOWN:
        return None
    value = -found.values[0]
    if value + found.residual_bounds[0] >= 0 or value > -1e-3 * largest:
        return None
    return value, found.vectors[0]


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
