"""Newton-CG, also known as Hessian-free optimization."""

import math
from dataclasses import replace
from typing import Any

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineName
from hvpopt.engines.split import Curvature
from hvpopt.optim.base import ClosureOptimizer, check_count, check_range
from hvpopt.optim.damping import levenberg_marquardt, reduction_ratio
from hvpopt.optim.line_search import LineSearchResult, armijo
from hvpopt.optim.objective import Objective
from hvpopt.optim.report import NewtonCGReport, Outcome, StepReport
from hvpopt.solvers.cg import cg
from hvpopt.solvers.result import Solution, Status
from hvpopt.solvers.stopping import RelativeProgress, StoppingRule
from hvpopt.trees import TensorList


class NewtonCG(ClosureOptimizer):
    """Newton's method with conjugate gradients on curvature products (Martens 2010).

    Each step minimises, by CG, the model of the objective F(θ) = loss + ½ wd ‖θ‖² on one batch

        m(d) = gᵀd + ½ dᵀ(B + λ I) d,     B the GGN (or Hessian) of F,

    from the last step's solution, goes along p = lr·d by backtracking until F decreases
    sufficiently, and adapts λ to how well the model without λ predicted the decrease. A step that
    no length makes a decrease is rejected: the parameters stay exactly as they were and λ grows.

    Where ``p.grad`` is not the gradient of the loss that the closure computes (accumulated
    micro-batches, clipping), F is that loss plus the linear term that gives it the gradient
    ``p.grad``: curvature and line search use the last micro-batch, the gradient uses all of them
    (the surrogate of Shamir, Srebro and Zhang 2014, equation 3). A model's agreement with a part
    of the data says little of the rest: λ then never falls below its initial value.

    Args:
        params: parameters, named parameters, or groups; ``lr``, ``damping`` and ``weight_decay``
            may differ from group to group.
        lr: multiple of the Newton direction that is tried first.
        damping: initial λ, in the units of the curvature (of the loss's mean over the batch where
            the loss is a mean).
        weight_decay: wd, in the loss's units; part of objective, gradient and curvature.
        curvature: "ggn" (positive semi-definite where the loss is convex in the network's
            outputs) or "hessian".
        max_cg_steps: at most so many products a step.
        cg_stop: when CG has done enough, on the gradient scaled to unit length; Martens' relative
            progress by default.
        warm_start: CG starts from this multiple of the last step's solution.
        damping_factor: λ grows or shrinks by it a step; 1 keeps λ fixed.
        sufficient_decrease: Armijo's c.
        backtracking: what a rejected trial step is multiplied by.
        max_evaluations: trial steps before a step is rejected.
        grad_tolerance: at or below this norm of F's gradient the parameters stay.
        engine: see `hvpopt.closure.ClosureOracle`.
        max_consecutive_failures: so many failed steps in a row raise FloatingPointError.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for complex, integer or sparse parameters.

    Source: Martens, "Deep learning via Hessian-free optimization" (2010), section 4; the GGN is
    Schraudolph's (2002).

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = NewtonCG([w], damping=0.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     scaled = torch.tensor([1.0, 10.0]) * w
        ...     loss = torch.nn.functional.mse_loss(scaled, torch.ones(2))
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        222.5
        >>> w.data
        tensor([1.0000, 0.1000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        damping: float = 1.0,
        weight_decay: float = 0.0,
        *,
        curvature: Curvature = "ggn",
        max_cg_steps: int = 250,
        cg_stop: StoppingRule | None = None,
        warm_start: float = 0.95,
        damping_factor: float = 1.5,
        sufficient_decrease: float = 1e-2,
        backtracking: float = 0.5,
        max_evaluations: int = 10,
        grad_tolerance: float = 0.0,
        engine: EngineName = "auto",
        max_consecutive_failures: int = 5,
    ) -> None:
        if curvature not in ("ggn", "hessian"):
            raise ValueError(f"curvature={curvature!r} is unknown: choose 'ggn' or 'hessian'.")
        if cg_stop is not None and not callable(cg_stop):
            raise ValueError(
                f"cg_stop={cg_stop!r} is no stopping rule: expected one such as "
                "hvpopt.solvers.stopping.ResidualNorm(rtol=1e-3)."
            )
        self._curvature: Curvature = curvature
        self._max_cg_steps = check_count("max_cg_steps", max_cg_steps)
        self._cg_stop = RelativeProgress() if cg_stop is None else cg_stop
        self._warm_start = check_range("warm_start", warm_start, 0.0, 1.0)
        self._damping_factor = check_range("damping_factor", damping_factor, 1.0)
        self._sufficient_decrease = check_range(
            "sufficient_decrease", sufficient_decrease, 0.0, 1.0
        )
        self._backtracking = check_range("backtracking", backtracking, 0.01, 0.99)
        self._max_evaluations = check_count("max_evaluations", max_evaluations)
        self._grad_tolerance = check_range("grad_tolerance", grad_tolerance, 0.0)
        defaults = {"lr": lr, "damping": damping, "weight_decay": weight_decay}
        super().__init__(
            params, defaults, engine=engine, max_consecutive_failures=max_consecutive_failures
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; raises as `ClosureOptimizer.add_param_group` does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("initial_damping", group["damping"])

    def _check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_range("damping", group["damping"], 0.0)
        check_range("weight_decay", group["weight_decay"], 0.0)

    def _advance(self, oracle: ClosureOracle, params: TensorList, start: TensorList) -> StepReport:
        point = oracle.trace(self._curvature)
        self._check_gradients(oracle, params)
        objective = Objective(oracle, point, params, start, self._per_parameter("weight_decay"))
        grad_norm = float(trees.norm(objective.grad))
        said: dict[str, Any] = {
            "loss": float(point.loss),
            "objective": objective.value,
            "damping": float(self.param_groups[0]["damping"]),
            "grad_norm": grad_norm,
        }
        if not math.isfinite(objective.value):
            return self._report(oracle, Outcome.NONFINITE_LOSS, **said)
        if not math.isfinite(grad_norm):
            return self._report(oracle, Outcome.NONFINITE_GRADIENT, **said)
        if grad_norm <= self._grad_tolerance:
            return self._report(oracle, Outcome.CONVERGED, **said, objective_after=objective.value)

        solution = self._solve(objective, params)
        said.update(
            cg_steps=solution.num_steps,
            cg_status=solution.status,
            min_curvature=solution.min_curvature,
        )
        if solution.status is Status.BREAKDOWN and solution.num_steps == 0:
            return self._report(oracle, Outcome.NONFINITE_PRODUCT, **said)
        update, curved = self._update(objective, solution)
        slope = float(trees.dot(objective.grad, update))
        search = self._search(objective, update, slope)

        length = search.step
        ratio = self._ratio(objective, search, slope, curved)
        self._adapt_damping(ratio, is_tilted=objective.is_tilted)
        for p, d in zip(params, solution.value, strict=True):
            self.state[p]["direction"] = d
        said.update(
            objective_after=search.value,
            reduction_ratio=ratio,
            step_length=length,
            update_norm=length * float(trees.norm(update)),
        )
        return self._report(oracle, Outcome.STEPPED if length else Outcome.REJECTED, **said)

    def _report(self, oracle: ClosureOracle, outcome: Outcome, **said: Any) -> NewtonCGReport:
        return NewtonCGReport(
            outcome=outcome,
            num_closure_runs=oracle.num_runs,
            num_products=oracle.num_products,
            **said,
        )

    def _solve(self, objective: Objective, params: TensorList) -> Solution:
        """CG on (B + λ I) d = −g, from a multiple of the last solution where that helps."""
        damping = self._per_parameter("damping")

        def damped(v: TensorList) -> TensorList:
            return trees.add(objective.product(v), trees.scale_each(damping, v))

        last = [self.state[p].get("direction") for p in params]
        # CG is linear in its right-hand side: at unit length its squares cannot overflow
        size = float(trees.norm(objective.grad))
        x0 = None
        if self._warm_start > 0 and all(d is not None for d in last):
            x0 = trees.scale([d for d in last if d is not None], self._warm_start / size)
        rhs = trees.scale(objective.grad, -1 / size)
        unit = cg(damped, rhs, x0=x0, stop=self._cg_stop, max_steps=self._max_cg_steps)
        return replace(
            unit,
            value=trees.scale(unit.value, size),
            direction=None if unit.direction is None else trees.scale(unit.direction, size),
            residual_norm=unit.residual_norm * size,
            model_values=tuple(m * size**2 for m in unit.model_values),
        )

    def _ratio(
        self, objective: Objective, search: LineSearchResult, slope: float, curved: float
    ) -> float:
        """ρ of the step taken; −∞ where the full step raised F, NaN where there was no step."""
        if slope == 0:
            return math.nan
        if not search.first_value - objective.value <= objective.noise:
            return -math.inf
        predicted = search.step * slope + 0.5 * search.step**2 * curved
        return reduction_ratio(search.value - objective.value, predicted, noise=objective.noise)

    def _adapt_damping(self, ratio: float, *, is_tilted: bool) -> None:
        if self._damping_factor == 1:
            return
        for group in self.param_groups:
            floor = group["initial_damping"] if is_tilted else 1e-12
            group["damping"] = levenberg_marquardt(
                group["damping"], ratio, factor=self._damping_factor, bounds=(floor, 1e12)
            )

    def _update(self, objective: Objective, solution: Solution) -> tuple[TensorList, float]:
        """The update p = lr·d and pᵀB p, from what CG knows of dᵀ(B + λ I) d where it can."""
        lr, damping = self._per_parameter("lr"), self._per_parameter("damping")
        stuck = solution.num_steps == 0 and solution.direction is not None
        d = solution.direction if stuck and solution.direction is not None else solution.value
        update = trees.scale_each(lr, d)
        if stuck or len(set(lr)) > 1:
            return update, float(trees.dot(update, objective.product(update)))
        damped = 2 * (solution.model_value - float(trees.dot(objective.grad, d)))
        return update, lr[0] ** 2 * (damped - float(trees.dot(trees.scale_each(damping, d), d)))

    def _search(self, objective: Objective, update: TensorList, slope: float) -> LineSearchResult:
        if not slope < 0:
            return LineSearchResult(0.0, objective.value, math.inf, 0)
        search = armijo(
            lambda t: objective.move(update, t),
            objective.value,
            slope,
            sufficient_decrease=self._sufficient_decrease,
            factor=self._backtracking,
            max_evaluations=self._max_evaluations,
            noise=objective.noise,
        )
        if search.step == 0:
            objective.restore()
        return search
