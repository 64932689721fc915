"""Minimisation of a function of tensors, with the interface of ``scipy.optimize.minimize``."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hvpopt.minimization.forcing import Forcing, ForcingName
from hvpopt.minimization.newton_cg import NewtonCG
from hvpopt.minimization.objective import Objective, Point, ProductLimitError
from hvpopt.minimization.result import Ending, MinimizeResult
from hvpopt.minimization.second_order import way_down
from hvpopt.minimization.trust_ncg import TrustNCG
from hvpopt.pytrees import Tree
from hvpopt.solvers.curvature import least_curvature

MethodName = Literal["trust-ncg", "newton-cg"]
_LOOKS = 8  # random directions of no curvature, along some of which f may fall and not others
Callback = Callable[[MinimizeResult], object]


class _Method(Protocol):
    def step(self, point: Point) -> Point | Ending:
        """A point at which f is lower, or why there is none."""


def minimize(
    f: Callable[..., Tensor],
    x0: Tree,
    *,
    args: tuple[Any, ...] = (),
    method: MethodName = "trust-ncg",
    gtol: float | None = None,
    max_iter: int | None = None,
    max_products: int | None = None,
    max_inner_steps: int = 250,
    forcing: ForcingName | float = "sqrt",
    callback: Callback | None = None,
    seed: int = 0,
) -> MinimizeResult:
    """A local minimum of f, from x0, by its gradients and Hessian products.

    Args:
        f: ``f(x, *args)``, a real floating-point tensor without dimensions, twice
            differentiable, and the same at each call.
        x0: Where to start: a tensor, or dicts, lists and tuples of tensors. Stays as it is.
        args: Passed on to ``f``, not differentiated.
        method: "trust-ncg" (a trust region, its subproblem solved on a Krylov space that is kept)
            or "newton-cg" (capped conjugate gradients and a line search; holds few vectors).
        gtol: Converged at this Euclidean norm of the gradient; by default the square root of the
            machine's ε of x0's dtype (1.5e-8 in float64).
        max_iter: The most iterations; by default 1000 and ten for each variable.
        max_products: The most Hessian products; no limit by default.
        max_inner_steps: The most Hessian products of one iteration, and vectors that "trust-ncg"
            holds.
        forcing: How accurately each step is solved for: ‖H d + g‖ ≤ η ‖g‖ with η = min(cap, √‖g‖)
            for "sqrt", Eisenstat and Walker's second choice, or a number; the cap is 0.2 for
            "trust-ncg" and 0.5 for "newton-cg".
        callback: Called after each iteration with the result so far; ends the run by raising
            ``StopIteration``.
        seed: Of the random direction from which Lanczos starts.

    Returns:
        The result. It is a success where the gradient is small, or the decrease that Newton's
        step promises is below the rounding error of f, and the Hessian has no negative eigenvalue
        that Lanczos finds in up to 100 products. A saddle is left along the eigenvector; where
        second derivatives are too small to tell, f is looked at nearby.

    Raises:
        TypeError: For an x0 that is not of real floating-point tensors, or an f whose value is no
            such tensor.
        ValueError: For an empty x0, an f whose value has dimensions or is not finite at x0, or an
            argument out of range.

    Examples:
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> found = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> found.success, found.x
        (True, tensor([1.0000, 1.0000], dtype=torch.float64))
    """
    _check(method, gtol, max_iter, max_products, max_inner_steps, callback)
    objective = Objective(f, x0, tuple(args), max_products)
    term = Forcing(forcing, cap=0.2 if method == "trust-ncg" else 0.5)
    point = objective.expand(objective.start)
    gtol = objective.rounding**0.5 if gtol is None else gtol
    solver: _Method = (
        TrustNCG(objective, term, max_inner_steps, gtol)
        if method == "trust-ncg"
        else NewtonCG(objective, term, max_inner_steps)
    )
    if max_iter is None:
        max_iter = 1000 + 10 * sum(x.numel() for x in objective.start)
    run = _Run(objective, point, gtol)
    if not run.point.is_finite:
        raise ValueError(
            f"f or its gradient is not finite at x0: f(x0) = {run.point.value}, "
            f"‖∇f(x0)‖ = {run.point.grad_norm}; start where both are."
        )
    generator = torch.Generator().manual_seed(seed)
    try:
        return run.result(_advance(run, solver, max_iter, callback, generator))
    except ProductLimitError:
        return run.result(Ending.PRODUCT_LIMIT)


@dataclass
class _Run:
    """How far a minimisation has come."""

    objective: Objective
    point: Point
    gtol: float
    num_iterations: int = 0
    min_eigenvalue: float | None = None

    def move(self, point: Point) -> None:
        """Takes a point."""
        self.point, self.min_eigenvalue = point, None
        self.num_iterations += 1

    def result(self, ending: Ending) -> MinimizeResult:
        """The result, if it ended here."""
        return MinimizeResult(
            x=self.objective.tree(self.point.x),
            fun=self.point.value,
            jac=self.objective.tree(self.point.grad),
            success=ending.code == 0,
            status=ending.code,
            message=ending.sentence,
            nit=self.num_iterations,
            nfev=self.objective.nfev,
            njev=self.objective.njev,
            nhev=self.objective.nhev,
            min_eigenvalue=self.min_eigenvalue,
        )


def _advance(
    run: _Run,
    solver: _Method,
    max_iter: int,
    callback: Callback | None,
    generator: torch.Generator,
) -> Ending:
    """Iterates; the way it ends."""
    while True:
        ending: Ending | None = None
        if run.point.grad_norm <= run.gtol:
            ending = Ending.CONVERGED
        elif run.num_iterations < max_iter:
            new = solver.step(run.point)
            if isinstance(new, Ending):
                ending = new
            else:
                run.move(new)
        if ending in (Ending.CONVERGED, Ending.ROUNDING, Ending.STALLED):
            ending = _look_around(run, ending, max_iter, generator)
        if ending is not None:
            return ending
        if callback is not None:
            try:
                callback(run.result(Ending.RUNNING))
            except StopIteration:
                return Ending.STOPPED
        if run.num_iterations >= max_iter and run.point.grad_norm > run.gtol:
            return Ending.ITERATION_LIMIT


def _look_around(
    run: _Run, ending: Ending, max_iter: int, generator: torch.Generator
) -> Ending | None:
    """The ending, if this is a minimum; None where there was a way down, which is then taken."""
    objective, point = run.objective, run.point
    for _ in range(_LOOKS):
        found = least_curvature(
            point.product,
            point.x,
            tolerance=math.sqrt(objective.rounding),
            generator=generator,
        )
        if found is None:
            return Ending.NOT_FINITE
        least = found
        run.min_eigenvalue = least.value
        x = way_down(objective, point, least, run.gtol)
        if x is not None or abs(least.value) > least.tolerance * least.scale:
            break
    if x is None:
        return Ending.SADDLE if least.is_negative else ending
    if run.num_iterations >= max_iter:
        return Ending.ITERATION_LIMIT
    new = objective.expand(x)
    if not new.is_finite:
        return Ending.NOT_FINITE
    run.move(new)
    return None


def _check(
    method: str,
    gtol: float | None,
    max_iter: int | None,
    max_products: int | None,
    max_inner_steps: int,
    callback: Callback | None,
) -> None:
    if method not in ("trust-ncg", "newton-cg"):
        raise ValueError(f"method={method!r} is unknown: choose 'trust-ncg' or 'newton-cg'.")
    if gtol is not None and not gtol > 0:
        raise ValueError(f"gtol={gtol} is out of range: give a positive number, or None.")
    counts = {
        "max_iter": max_iter,
        "max_products": max_products,
        "max_inner_steps": max_inner_steps,
    }
    for name, count in counts.items():
        if count is None and name != "max_inner_steps":
            continue
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name}={count!r} is out of range: give an int of at least 1.")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is a {type(callback).__name__}; expected a function.")
