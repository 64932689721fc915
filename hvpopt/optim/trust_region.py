"""Newton's method with conjugate gradients inside a trust region."""

import math
from typing import Any, Literal

from hvpopt import trees
from hvpopt.engines.choice import EngineName
from hvpopt.engines.split import Curvature
from hvpopt.optim.checks import check_stop, failure_of
from hvpopt.optim.damping import balanced_radius, reduction_ratio
from hvpopt.optim.newton import NewtonOptimizer
from hvpopt.optim.report import NewtonCGReport, Outcome
from hvpopt.optim.step import Step
from hvpopt.options import check_count, check_range
from hvpopt.preconditioners.base import Preconditioner
from hvpopt.solvers.steihaug import steihaug
from hvpopt.solvers.stopping import ForcingTerm, RelativeProgress, StoppingRule
from hvpopt.trees import TensorList

_LEAST_SHARE = 1e-3  # of the curvature along the gradient, in the norm of a preconditioner


class TrustRegionNewtonCG(NewtonOptimizer):
    """Newton's method with conjugate gradients inside a trust region (Steihaug 1983, Toint 1981).

    Each step minimises, by truncated CG, the model of F(θ) = loss + ½ wd ‖θ‖² on one batch

        m(p) = gᵀp + ½ pᵀB p     within ‖p‖_M ≤ r,     B the Hessian (or GGN) of F,

    and compares it with F by ρ = (F(θ+p) − F(θ)) / m(p):

        ρ < ¼: r ← ‖p‖_M / 4;     ρ > ¾ with ‖p‖_M = r: r ← 2 r;     θ ← θ + lr·p where ρ > 0.15.

    A step that is not accepted is tried again with the smaller radius. Directions of negative
    curvature are followed to the boundary, so that B may be indefinite: no damping is needed. M
    is the identity, or the preconditioner.

    On mini-batches r follows the slope of the new batch's loss along the last step, as the
    damping of `hvpopt.NewtonCG` does.

    Args:
        params: parameters, named parameters, or groups; ``lr`` and ``weight_decay`` may differ
            from group to group.
        lr: multiple of p that is taken.
        radius: initial r, in the units of the parameters (of ‖·‖_M with a preconditioner);
            "auto" is the length of the step along the gradient that minimises the first model.
        weight_decay: wd, in the loss's units; part of objective, gradient and curvature.
        curvature: "hessian" or "ggn".
        preconditioner: for CG, and the region's norm; see `hvpopt.preconditioners`.
        max_cg_steps: at most so many products for a trial step.
        cg_stop: when CG has done enough; Martens' relative progress by default.
        max_evaluations: trial steps before a step is rejected.
        grad_tolerance, decoupled_weight_decay, seed, engine, max_consecutive_failures: as of
            `hvpopt.NewtonCG`.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for complex, integer or sparse parameters.

    Source: Conn, Gould and Toint, Trust-Region Methods (2000), algorithms 6.1.1 and 7.5.1; Nocedal
    and Wright (2006), algorithm 4.1.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.1]))
        >>> optimizer = TrustRegionNewtonCG([w])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w[0] ** 2 - w[1] ** 2 + w[1] ** 4 / 4
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(12):
        ...     loss = optimizer.step(closure)
        >>> round(loss.item(), 4)
        -1.0
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        radius: float | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        *,
        curvature: Curvature = "hessian",
        preconditioner: Preconditioner | None = None,
        max_cg_steps: int = 250,
        cg_stop: StoppingRule | ForcingTerm | None = None,
        max_evaluations: int = 10,
        grad_tolerance: float = 0.0,
        decoupled_weight_decay: bool = False,
        seed: int = 0,
        engine: EngineName = "auto",
        max_consecutive_failures: int = 5,
    ) -> None:
        self._radius = radius
        if radius != "auto":
            check_range("radius", radius, 1e-30, 1e30)
        self._max_cg_steps = check_count("max_cg_steps", max_cg_steps)
        self._cg_stop = RelativeProgress() if cg_stop is None else check_stop(cg_stop)
        self._max_evaluations = check_count("max_evaluations", max_evaluations)
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay},
            curvature=curvature,
            preconditioner=preconditioner,
            grad_tolerance=grad_tolerance,
            decoupled_weight_decay=decoupled_weight_decay,
            seed=seed,
            engine=engine,
            max_consecutive_failures=max_consecutive_failures,
        )

    def _descend(self, step: Step) -> NewtonCGReport:
        objective, lr = step.objective, self._per_parameter("lr")
        metric, kept = self._metric(step), step.number("radius")
        radius = self._first_radius(step, metric) if kept is None else kept
        slope_ratio = step.slope_ratio()
        if not math.isnan(slope_ratio):
            radius = balanced_radius(radius, slope_ratio)
        elif objective.is_partial:
            late = step.late_ratio()
            radius *= 0.25 if late < 0.25 else 2.0 if late > 0.75 else 1.0
        rhs = trees.scale(objective.grad, -1.0)
        is_judged = math.isnan(slope_ratio) and not objective.is_partial  # by F itself
        num_steps = 0
        for _ in range(self._max_evaluations):
            inner = steihaug(
                objective.product,
                rhs,
                radius,
                preconditioner=metric,
                stop=step.stopping(self._cg_stop),
                max_steps=self._max_cg_steps,
            )
            num_steps += inner.num_steps
            if failure := failure_of(inner):
                objective.restore()
                return step.report(failure, radius=radius, cg_status=inner.status)
            update, predicted, slope = self._scaled(step, lr, inner.value, inner.model_value)
            value = objective.move(update, 1.0)
            ratio = reduction_ratio(value - objective.value, predicted, noise=objective.noise)
            tried = radius
            if ratio < 0.25:
                radius = 0.25 * inner.norm
            elif ratio > 0.75 and inner.is_on_boundary and is_judged:
                radius = 2 * radius
            accepted = ratio > 0.15 or math.isnan(ratio)
            if accepted or not 1e-30 < radius < math.inf:
                break
        if not accepted:
            objective.restore()
        length = 1.0 if accepted else 0.0
        step.remember(radius=radius, predicted=predicted)
        step.keep(update=trees.scale(update, length))
        step.expect(
            (value if accepted else objective.value) - objective.tilt(update, length),
            length * slope,
        )
        return step.report(
            Outcome.STEPPED if accepted else Outcome.REJECTED,
            objective_after=value if accepted else objective.value,
            radius=tried,
            reduction_ratio=ratio,
            slope_ratio=slope_ratio,
            cg_steps=num_steps,
            cg_status=inner.status,
            cg_iterate=inner.num_steps,
            min_curvature=inner.min_curvature,
            step_length=length,
            update_norm=length * float(trees.norm(update)),
        )

    def _scaled(
        self, step: Step, lr: list[float], p: TensorList, model_value: float
    ) -> tuple[TensorList, float, float]:
        """lr·p, the model's change along it, and its slope."""
        objective = step.objective
        update = trees.scale_each(lr, p)
        slope = float(trees.dot(objective.grad, update))
        if len(set(lr)) == 1:
            full = float(trees.dot(objective.grad, p))
            return update, slope + lr[0] ** 2 * (model_value - full), slope
        return update, slope + 0.5 * float(trees.dot(update, objective.product(update))), slope

    def _metric(self, step: Step) -> Any:
        """r ↦ M⁻¹ r, where there is a preconditioner."""
        precondition = step.precondition
        if precondition is None:
            return None
        objective = step.objective
        g = objective.grad
        along = abs(float(trees.dot(g, objective.product(g)) / trees.dot(g, g)))
        least = _LEAST_SHARE * along if math.isfinite(along) else 0.0  # CG will meet it, too
        shift = [wd + least for wd in objective.decay]
        return precondition(shift)

    def _first_radius(self, step: Step, metric: Any) -> float:
        """‖p‖_M at the minimiser of the first model along −M⁻¹g; a tenth of ‖θ‖ without one."""
        if self._radius != "auto":
            return float(self._radius)
        objective = step.objective
        g = objective.grad
        z = g if metric is None else metric(g)
        gz, curved = float(trees.dot(g, z)), float(trees.dot(z, objective.product(z)))
        if gz > 0 and curved > 0 and math.isfinite(gz**1.5 / curved):
            return gz**1.5 / curved
        return 0.1 * max(1.0, objective.start_norm)
