"""Conjugate gradients that return a solution or a direction of negative curvature."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.cap import Cap, Coefficients
from hvpopt.solvers.checks import Operator, checked_map, checked_vector
from hvpopt.solvers.conjugate import CarriedNorms, Taken, take_step, times
from hvpopt.solvers.result import Solution, Status
from hvpopt.solvers.stopping import FirstOf, Progress, ResidualNorm, StoppingRule
from hvpopt.trees import TensorList


def capped_cg(
    matvec: Operator,
    b: Sequence[Tensor],
    *,
    epsilon: float,
    accuracy: float = 0.5,
    stop: StoppingRule | None = None,
    norm_bound: float = 0.0,
    preconditioner: Operator | None = None,
    max_steps: int = 250,
) -> Solution:
    """The solution x of (A + 2ε M) x = b, or a direction d with dᵀAd ≤ −ε dᵀMd, A symmetric.

    Conjugate gradients from zero on Ā = A + 2ε M that stop at the first sign that Ā ⪰ ε M is
    false, so that A has an eigenvalue below −ε in the metric M: a direction p or an iterate x with
    less curvature than ε, or residuals that fall more slowly than the bound

        ‖rⱼ‖ ≤ √T τ^(j/2) ‖r₀‖,   κ = ‖Ā‖/ε,   τ = √κ/(√κ + 1),   T = 4κ⁴/(1 − √τ)²,

    which Ā ⪰ ε M would imply; then xⱼ₊₁ − xᵢ has too little curvature for one of the earlier
    iterates. Norms of residuals are those of M⁻¹. All tests come from scalars that the recurrence
    has: ‖Ā‖ is the largest of ‖Āv‖/‖v‖ over the directions, residuals and iterates so far. In
    place of all iterates, which the paper keeps, the one that is needed is computed again.

    Args:
        matvec: v ↦ A v, on lists shaped like ``b``; called once a step.
        b: The right-hand side, minus the gradient of f.
        epsilon: ε > 0, in the units of A (over those of M).
        accuracy: ζ in (0, 1): converged once ‖r‖ ≤ ζ ‖b‖ / (3κ), which makes the residual small
            next to ε ‖x‖.
        stop: A stopping rule in place of ``accuracy``, as of `cg`.
        norm_bound: What is known of ‖A‖ beforehand.
        preconditioner: r ↦ M⁻¹ r, symmetric positive definite; M is the identity by default.
        max_steps: The most steps.

    Returns:
        The solution. Where its status is NEGATIVE_CURVATURE, ``direction`` is d, with bᵀd ≥ 0 and
        ``min_curvature`` dᵀAd / dᵀMd ≤ −ε; ``value`` is the last iterate, which
        ``direction`` may be itself or differ from by an earlier one. The model's values
        are those of Ā, ``min_curvature`` is of A, over directions and iterates.

    Raises:
        TypeError: If ``b`` holds tensors that are not real floating point.
        ValueError: For an empty ``b``, an ε that is not positive, ``accuracy`` outside (0, 1), a
            negative ``norm_bound``, ``max_steps`` < 1, or shapes that differ from those of ``b``.

    Source: Royer, O'Neill and Wright, "A Newton-CG algorithm with complexity guarantees for
    smooth unconstrained optimization" (Mathematical Programming 180, 2020), algorithm 1.

    Examples:
        >>> A = torch.tensor([2.0, -1.0])
        >>> found = capped_cg(lambda v: [A * v[0]], [torch.tensor([1.0, 0.1])], epsilon=0.1)
        >>> found.status.name, found.min_curvature <= -0.1
        ('NEGATIVE_CURVATURE', True)
    """
    if max_steps < 1:
        raise ValueError(f"capped_cg needs max_steps ≥ 1, got {max_steps}.")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"capped_cg needs a positive finite epsilon, got {epsilon}.")
    if not 0 < accuracy < 1:
        raise ValueError(f"capped_cg needs 0 < accuracy < 1, got {accuracy}.")
    if not 0 <= norm_bound < math.inf:
        raise ValueError(f"capped_cg needs a finite norm_bound ≥ 0, got {norm_bound}.")
    b = checked_vector(b, "the right-hand side")
    apply = checked_map(matvec, b, "matvec")
    precondition = checked_map(preconditioner, b, "preconditioner") if preconditioner else None
    rhs_norm = float(trees.norm(b))
    if rhs_norm == 0.0 or not math.isfinite(rhs_norm):
        status = Status.CONVERGED if rhs_norm == 0.0 else Status.BREAKDOWN
        return Solution(trees.zeros_like(b), status, 0, 0, rhs_norm, (0.0,), math.inf)

    def run() -> _Run:
        return _Run(apply, b, precondition, epsilon)

    return _solve(run, Cap(epsilon, accuracy, norm_bound + 2 * epsilon), stop, max_steps)


class _Run:
    """Preconditioned conjugate gradients on A + 2ε M from zero, with M p by a recurrence."""

    def __init__(
        self,
        apply: Callable[[TensorList], TensorList],
        b: TensorList,
        precondition: Callable[[TensorList], TensorList] | None,
        epsilon: float,
    ) -> None:
        self._apply, self.b, self.epsilon = apply, b, epsilon
        self._precondition, self.is_preconditioned = precondition, precondition is not None
        self.x, self.r = trees.zeros_like(b), trees.clone(b)
        z = self._preconditioned()
        self.rz = trees.dot(self.r, z)
        self.p = trees.clone(z)
        self._Mp = trees.clone(self.r) if precondition else self.p
        self.norms = CarriedNorms(self.rz)
        self.rounding: float = torch.finfo(self.rz.dtype).eps

    def _preconditioned(self) -> TensorList:
        return self._precondition(self.r) if self._precondition else self.r

    def _product(self, p: TensorList) -> TensorList:
        return trees.add(self._apply(p), self._Mp, 2 * self.epsilon)

    def step(self) -> Taken:
        """Moves x and r, unless pᵀĀp < ε pᵀMp, or it breaks down."""
        floor = self.epsilon * self.norms.pp
        taken = take_step(
            self._product, self.b, self.x, self.r, self.p, self.rz, self.rounding, floor=floor
        )
        if taken.refusal is None:
            self.norms.advance(taken.alpha)
        return taken

    def in_metric(self, curvature: float) -> float:
        """pᵀĀp / pᵀMp from pᵀĀp / pᵀp."""
        if not self.is_preconditioned:
            return curvature
        return curvature * float(trees.dot(self.p, self.p) / self.norms.pp)

    def turn(self) -> float:
        """Takes the next direction; returns β."""
        z = self._preconditioned()
        self.rz, before = trees.dot(self.r, z), self.rz
        beta = self.rz / before
        self.p = trees.add(z, times(beta, self.p))
        self._Mp = trees.add(self.r, times(beta, self._Mp)) if self._precondition else self.p
        self.norms.turn(beta, self.rz)
        return float(beta)


def _solve(
    new_run: Callable[[], _Run], cap: Cap, stop: StoppingRule | None, max_steps: int
) -> Solution:
    run = new_run()
    rhs_norm = residual_norm = float(trees.norm(run.b))
    floor = ResidualNorm(rtol=run.rounding)
    rule = floor if stop is None else FirstOf((floor, stop))
    known = Coefficients([], [0.0], [float(run.rz)], [float(run.norms.pp)])
    values, least, direction = [0.0], math.inf, None
    step = num_products = 0
    is_slow = False
    status = rule(Progress(0, residual_norm, rhs_norm, values))
    while status is None:
        taken = run.step()
        num_products += 1
        if math.isfinite(taken.curvature):
            least = min(least, run.in_metric(taken.curvature))
        if taken.refusal is not None:
            status = taken.refusal
            direction = run.p if status is Status.NEGATIVE_CURVATURE else None
            break
        step += 1
        residual_norm = taken.residual_norm
        values.append(taken.model)
        known.alpha.append(taken.alpha)
        flat = known.flat_from(run.epsilon) if is_slow else None
        if flat is not None:
            earlier, least = flat[0], min(least, flat[1])
            direction = trees.add(run.x, _iterate(new_run(), earlier), -1.0)
            status, num_products = Status.NEGATIVE_CURVATURE, num_products + earlier
            break
        known.beta.append(run.turn())
        known.rho.append(float(run.rz))
        known.pp.append(float(run.norms.pp))
        xx = float(run.norms.xx)
        if known.rho[-1] >= 0:
            cap.see(known.norm_seen(xx))
        if xx > 0:  # else its square has underflowed
            least = min(least, -2 * taken.model / xx)
        if -2 * taken.model < run.epsilon * xx:
            status, direction = Status.NEGATIVE_CURVATURE, trees.clone(run.x)
        elif stop is None and cap.is_solved(known.rho):
            status = Status.CONVERGED
        else:
            status = rule(Progress(step, residual_norm, rhs_norm, values))
        if status is None and step == max_steps:
            status = Status.STEP_LIMIT
        is_slow = cap.is_slow(known.rho)
    if status is Status.INDEFINITE_PRECONDITIONER and not run.is_preconditioned:
        status = Status.BREAKDOWN  # rᵀr itself under- or overflowed
    return Solution(
        value=run.x,
        status=status,
        num_steps=step,
        num_products=num_products,
        residual_norm=residual_norm,
        model_values=tuple(values),
        min_curvature=least - 2 * run.epsilon,
        direction=direction,
    )


def _iterate(run: _Run, num_steps: int) -> TensorList:
    """The iterate after so many steps."""
    for _ in range(num_steps):
        run.step()
        run.turn()
    return run.x
