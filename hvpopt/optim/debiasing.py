"""A direction from one part of a batch, at the length that the rest of it asks for.

Both parts come from the one batch of the closure, which cannot be made smaller from here: a product
of a part costs as much as one of the whole batch (`hvpopt.closure.rows`). Where the gradient may
use more data than the curvature to save time, accumulate gradients over micro-batches (Lightning's
``accumulate_grad_batches``): the curvature is then of the last one.
"""

from dataclasses import replace

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.linearization import LinearizedClosure
from hvpopt.optim.model import DampedModel
from hvpopt.optim.objective import Objective, clipping
from hvpopt.solvers.result import Solution


def halves_of(
    objective: Objective, oracle: ClosureOracle, point: LinearizedClosure
) -> tuple[Objective, Objective] | None:
    """The objective with gradient and curvature of a part of the rows, and with the rest's.

    Of a gradient that was summed over micro-batches, or clipped, the rows of the last micro-batch
    enter by as much as they did. None where the part has no gradient.

    Args:
        objective: of the whole batch.
        oracle: after a trace with rows.
        point: what that returned.
    """
    share = min(clipping(point.grad, point.batch_grad), 1 / oracle.loss_scale)
    halves = []
    for which in ("part", "rest"):
        half = oracle.of_part(point, which)
        excess = trees.add(half.grad, point.grad, -1.0)
        halves.append(objective.at(replace(half, grad=trees.add(point.grad, excess, share))))
    part, rest = halves
    return (part, rest) if float(trees.norm(part.grad)) > 0 else None


def relengthened(whole: DampedModel, rest: DampedModel, solution: Solution) -> Solution:
    """CG's solution d for a part of the batch, at the minimum of the rest's model along it:

        t d,      t = max(0, −g_Cᵀd / dᵀ(B_C + λ I) d).

    Where gradient and curvature are those that d was made from, d fits their noise: the slope
    along it is exaggerated, and the curvature too where d is large. The rest C has not seen d. It
    has nothing to say of the steps of CG before the last, which are dropped, and t is zero where
    it does not confirm d.

    Args:
        whole: the model of the whole batch, whose value at t d is reported.
        rest: the model of C.
        solution: of the part's model.

    Source: Tatzel, Mucsányi, Hackel and Hennig, "Debiasing mini-batch quadratics for applications
    in deep learning" (ICLR 2025), who take a length for each direction of CG; one for all of them
    costs one product of the rest.
    """
    d = solution.value
    slope, curved = (float(trees.dot(x, d)) for x in (rest.grad, rest.product(d)))
    length = -slope / curved if slope < 0 < curved else 0.0
    value = trees.scale(d, length)
    along = float(trees.dot(whole.grad, value))
    model_value = along + 0.5 * float(trees.dot(value, whole.product(value)))
    return replace(solution, value=value, iterates=(), model_values=(model_value,))
