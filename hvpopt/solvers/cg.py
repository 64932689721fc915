"""Conjugate gradients on lists of tensors."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.checks import Operator, checked_like, checked_map, checked_vector
from hvpopt.solvers.conjugate import model_at, numbers, take_step, times
from hvpopt.solvers.packing import Packing
from hvpopt.solvers.result import Iterate, Solution, Status
from hvpopt.solvers.stopping import (
    FirstOf,
    Progress,
    RelativeProgress,
    ResidualNorm,
    StoppingRule,
)
from hvpopt.trees import TensorList


def cg(
    matvec: Operator,
    b: Sequence[Tensor],
    *,
    x0: Sequence[Tensor] | None = None,
    preconditioner: Operator | None = None,
    stop: StoppingRule = RelativeProgress(),  # noqa: B008 (frozen)
    max_steps: int = 250,
    keep_iterates: bool = False,
) -> Solution:
    """The approximate solution x of A x = b for a symmetric positive definite A.

    Each step minimises the quadratic model m(x) = ½ xᵀAx − bᵀx along a direction p that is
    A-orthogonal to the earlier ones. With r = b − A x and z = M⁻¹ r:

        α = rᵀz / pᵀAp,   x ← x + α p,   r ← r − α A p,
        β = r₊ᵀz₊ / rᵀz,  p ← z₊ + β p.

    The model costs one dot: m(x) = −½ xᵀ(r + b). Scalars are float32 or wider and stay on the
    device; the host waits for them once a step.

    Args:
        matvec: v ↦ A v, on lists shaped like ``b``; called once a step, and once for ``x0``.
        b: The right-hand side. Newton's step is ``b = -gradient``.
        x0: Where to start, zero by default, and zero where m(x₀) > m(0) = 0.
        preconditioner: r ↦ M⁻¹ r with M ≈ A symmetric positive definite, the same map
            throughout the call.
        stop: The stopping rule, asked after each step. Whatever it says, the solver stops as
            converged once ‖r‖ ≤ ε ‖b‖ with the machine's ε of the scalars: below it there is
            only rounding.
        max_steps: The most steps.
        keep_iterates: Keeps copies of x at steps ⌈5·1.3ʲ⌉ and at the last, for CG backtracking.

    Returns:
        The solution with its status. A direction with pᵀAp ≤ ε ‖p‖ ‖Ap‖ (zero curvature is
        not told from rounding below that) ends the solve with the iterate so far, x₀ if it is
        the first. A NaN or infinite product leaves the last finite iterate. Nothing is recorded
        by autograd.

    Raises:
        TypeError: If ``b`` holds tensors that are not real floating point.
        ValueError: For an empty ``b``, ``max_steps`` < 1, or an ``x0``, product or
            preconditioned vector whose shapes differ from those of ``b``.

    Source: Hestenes and Stiefel (1952); Nocedal and Wright, Numerical Optimization (2006),
    algorithm 5.3; backtracking and the stopping rule from Martens (ICML 2010), section 4.

    Examples:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> solution = cg(lambda v: [A @ v[0]], [torch.tensor([1.0, 2.0])])
        >>> solution.value[0]
        tensor([0.0909, 0.6364])
        >>> solution.status.name
        'CONVERGED'
    """
    if max_steps < 1:
        raise ValueError(f"cg needs max_steps ≥ 1, got {max_steps}.")
    b = checked_vector(b, "the right-hand side")
    packing = Packing(b)
    apply = packing.map(checked_map(matvec, b, "matvec"))
    precondition = None
    if preconditioner is not None:
        precondition = packing.map(checked_map(preconditioner, b, "preconditioner"))
    x0 = None if x0 is None else packing.pack(checked_like(x0, b, "x0"))
    b = packing.pack(b)
    x, r, num_products = _start(apply, b, x0)
    bb, rr, model = numbers(trees.dot(b, b), trees.dot(r, r), model_at(x, r, b))
    rhs_norm, residual_norm = math.sqrt(bb), math.sqrt(rr)
    rounding = torch.finfo(trees.dot(b, b).dtype).eps
    stop = FirstOf((ResidualNorm(rtol=rounding), stop))
    values, min_curvature, direction = [model], math.inf, None
    kept: list[Iterate] = []
    marks = _marks()
    mark = next(marks)

    status: Status | None = None
    if rhs_norm == 0.0:  # then zero is the solution, wherever the start was
        x, residual_norm, values, status = trees.zeros_like(b), 0.0, [0.0], Status.CONVERGED
    elif not math.isfinite(rhs_norm + residual_norm):
        status = Status.BREAKDOWN
    else:
        status = stop(Progress(0, residual_norm, rhs_norm, values))
    if status is None:
        z = precondition(r) if precondition else r
        p, rz = trees.clone(z), trees.dot(r, z)

    step = 0
    while status is None:
        taken = take_step(apply, b, x, r, p, rz, rounding)
        num_products += 1
        if math.isfinite(taken.curvature):
            min_curvature = min(min_curvature, taken.curvature)
        if taken.refusal is not None:
            status = taken.refusal
            if status is Status.NEGATIVE_CURVATURE:
                direction = p
            elif status is Status.INDEFINITE_PRECONDITIONER and precondition is None:
                status = Status.BREAKDOWN  # rᵀr itself under- or overflowed
            break
        step += 1
        residual_norm = taken.residual_norm
        values.append(taken.model)
        if keep_iterates and step == mark:
            kept.append(Iterate(step, taken.model, trees.clone(x)))
            mark = next(marks)
        status = stop(Progress(step, residual_norm, rhs_norm, values))
        if status is None and step == max_steps:
            status = Status.STEP_LIMIT
        if status is None:
            z = precondition(r) if precondition else r
            rz, rz_before = trees.dot(r, z), rz
            p = trees.add(z, times(rz / rz_before, p))

    if keep_iterates and step > 0 and (not kept or kept[-1].num_steps != step):
        kept.append(Iterate(step, values[-1], x))
    return packing.solution(
        Solution(
            value=x,
            status=status,
            num_steps=step,
            num_products=num_products,
            residual_norm=residual_norm,
            model_values=tuple(values),
            min_curvature=min_curvature,
            direction=direction,
            iterates=tuple(kept),
        )
    )


def _start(
    apply: Operator, b: TensorList, x0: TensorList | None
) -> tuple[TensorList, TensorList, int]:
    """x₀, the residual there, and the number of products that took.

    An x₀ where the model is above its value at zero, or not finite, gives way to zero.
    """
    if x0 is None:
        return trees.zeros_like(b), trees.clone(b), 0
    x = trees.clone(x0)
    r = trees.add(b, apply(x), -1.0)
    if not float(model_at(x, r, b)) <= 0:
        return trees.zeros_like(b), trees.clone(b), 1
    return x, r, 1


def _marks() -> Iterator[int]:
    """The steps ⌈5·1.3ʲ⌉ at which iterates are kept (Martens 2010, section 4.5), as a stream."""
    return (math.ceil(5 * 1.3**j) for j in itertools.count())
