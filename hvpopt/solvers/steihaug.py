"""Truncated conjugate gradients inside a trust region."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.checks import Operator, checked_like, checked_map, checked_vector
from hvpopt.solvers.conjugate import CarriedNorms, take_step, times
from hvpopt.solvers.packing import Packing
from hvpopt.solvers.result import Status, TrustRegionStep
from hvpopt.solvers.stopping import (
    FirstOf,
    Progress,
    RelativeProgress,
    ResidualNorm,
    StoppingRule,
)
from hvpopt.trees import TensorList


def steihaug(
    matvec: Operator,
    b: Sequence[Tensor],
    radius: float,
    *,
    scaling: Sequence[Tensor] | None = None,
    preconditioner: Operator | None = None,
    stop: StoppingRule = RelativeProgress(),  # noqa: B008 (frozen)
    max_steps: int = 250,
) -> TrustRegionStep:
    """The approximate minimiser of m(x) = ½ xᵀAx − bᵀx within ‖x‖_M ≤ radius, A symmetric.

    Conjugate gradients from zero, whose iterates grow in the norm ‖x‖²_M = xᵀMx, up to the first
    that would leave the region, or whose direction p has pᵀAp ≤ 0: the last step then goes along
    p to the boundary. The model falls with every step, whatever the sign of A. M is the identity,
    or as ``scaling`` or ``preconditioner`` say.

    Args:
        matvec: v ↦ A v, on lists shaped like ``b``; called once a step.
        b: The right-hand side, minus the gradient of f.
        radius: Of the trust region, in the norm of M; finite.
        scaling: Positive entries d, shaped like ``b``: M = diag(d²), so that
            ‖x‖_M = ‖d ⊙ x‖.
        preconditioner: r ↦ M⁻¹ r, symmetric positive definite, in place of ``scaling``; M itself
            is never needed.
        stop: The stopping rule, asked after each step, as of `cg`.
        max_steps: The most steps.

    Returns:
        The step. Its status is BOUNDARY or NEGATIVE_CURVATURE on the boundary (``direction`` then
        being p), else as of `cg`.

    Raises:
        TypeError: If ``b`` holds tensors that are not real floating point.
        ValueError: For an empty ``b``, a radius that is not positive and finite, ``max_steps``
            < 1, both ``scaling`` and ``preconditioner``, a scaling that is not positive, or
            shapes that differ from those of ``b``.

    Source: Steihaug (SIAM J. Numer. Anal. 20, 1983); Toint (1981); Conn, Gould and Toint (2000),
    algorithm 7.5.1; Nocedal and Wright (2006), algorithm 7.2.

    Examples:
        >>> A = torch.tensor([2.0, 1.0])
        >>> step = steihaug(lambda v: [A * v[0]], [torch.tensor([2.0, 3.0])], radius=10.0)
        >>> step.value[0], step.is_on_boundary
        (tensor([1., 3.]), False)
        >>> steihaug(lambda v: [-A * v[0]], [torch.tensor([0.0, 3.0])], radius=2.0).value[0]
        tensor([0., 2.])
    """
    if max_steps < 1:
        raise ValueError(f"steihaug needs max_steps ≥ 1, got {max_steps}.")
    if not 0 < radius < math.inf:
        raise ValueError(f"steihaug needs a positive finite radius, got {radius}.")
    b = checked_vector(b, "the right-hand side")
    packing = Packing(b)
    apply = packing.map(checked_map(matvec, b, "matvec"))
    preconditioner = _one_of(scaling, preconditioner, b)
    precondition = None
    if preconditioner is not None:
        precondition = packing.map(checked_map(preconditioner, b, "preconditioner"))
    b = packing.pack(b)
    x, r = trees.zeros_like(b), trees.clone(b)
    rhs_norm = residual_norm = float(trees.norm(b))
    rounding = torch.finfo(trees.dot(b, b).dtype).eps
    stop = FirstOf((ResidualNorm(rtol=rounding), stop))
    values, min_curvature, direction = [0.0], math.inf, None
    step = num_products = 0

    status: Status | None = None
    if rhs_norm == 0.0:
        status = Status.CONVERGED
    elif not math.isfinite(rhs_norm):
        status = Status.BREAKDOWN
    else:
        status = stop(Progress(0, residual_norm, rhs_norm, values))
    if status is None:
        z = precondition(r) if precondition else r
        p, rz = trees.clone(z), trees.dot(r, z)
        norms = CarriedNorms(rz)
    while status is None:
        taken = take_step(apply, b, x, r, p, rz, rounding, reach=norms.reach(radius))
        num_products += 1
        if math.isfinite(taken.curvature):
            min_curvature = min(min_curvature, taken.curvature)
        if taken.refusal is not None:
            status = taken.refusal
            if status is Status.INDEFINITE_PRECONDITIONER and precondition is None:
                status = Status.BREAKDOWN  # rᵀr itself under- or overflowed
            break
        step += 1
        residual_norm = taken.residual_norm
        values.append(taken.model)
        norms.advance(taken.alpha)
        if taken.is_cut:
            status = Status.BOUNDARY if taken.is_curved else Status.NEGATIVE_CURVATURE
            direction = None if taken.is_curved else p
            break
        status = stop(Progress(step, residual_norm, rhs_norm, values))
        if status is None and step == max_steps:
            status = Status.STEP_LIMIT
        if status is None:
            z = precondition(r) if precondition else r
            rz, rz_before = trees.dot(r, z), rz
            beta = rz / rz_before
            p = trees.add(z, times(beta, p))
            norms.turn(beta, rz)
    is_on_boundary = status in (Status.BOUNDARY, Status.NEGATIVE_CURVATURE)
    inside = math.sqrt(float(norms.xx)) if step else 0.0
    return packing.solution(
        TrustRegionStep(
            value=x,
            status=status,
            num_steps=step,
            num_products=num_products,
            residual_norm=residual_norm,
            model_values=tuple(values),
            min_curvature=min_curvature,
            direction=direction,
            norm=radius if is_on_boundary else inside,
            is_on_boundary=is_on_boundary,
        )
    )


def _one_of(
    scaling: Sequence[Tensor] | None, preconditioner: Operator | None, b: TensorList
) -> Operator | None:
    """r ↦ M⁻¹ r, from the one that is given."""
    if scaling is None:
        return preconditioner
    if preconditioner is not None:
        raise ValueError("scaling and preconditioner are both given; expected one of them.")
    d = checked_scaling(scaling, b)
    return lambda r: [ri / di**2 for ri, di in zip(r, d, strict=True)]


def checked_scaling(scaling: Sequence[Tensor], b: TensorList) -> TensorList:
    """The scaling, if its entries are positive and finite.

    Raises:
        ValueError: If they are not, or their shapes differ from those of ``b``.
    """
    d = checked_like(scaling, b, "scaling")
    for i, di in enumerate(d):
        if not bool(((di > 0) & torch.isfinite(di)).all()):
            raise ValueError(f"scaling must be positive and finite, but entry {i} is not.")
    return d
