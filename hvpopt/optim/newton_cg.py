"""Newton-CG, also known as Hessian-free optimization."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from hvpopt import trees
from hvpopt.engines.choice import EngineName
from hvpopt.engines.split import Curvature
from hvpopt.optim.damping import calibrated, levenberg_marquardt, reduction_ratio, slope_balanced
from hvpopt.optim.line_search import LineSearchResult, armijo
from hvpopt.optim.model import DampedModel, Trial, best_trial, ratio_of, tensors, trial
from hvpopt.optim.newton import NewtonOptimizer
from hvpopt.optim.objective import Objective
from hvpopt.optim.report import NewtonCGReport, Outcome
from hvpopt.optim.step import Step
from hvpopt.options import check_count, check_range
from hvpopt.preconditioners.base import Preconditioner
from hvpopt.solvers.result import Solution, Status
from hvpopt.solvers.stopping import RelativeProgress, StoppingRule, Worthwhile


class NewtonCG(NewtonOptimizer):
    """Newton's method with conjugate gradients on curvature products (Martens 2010).

    Each step minimises, by CG, the model of the objective F(θ) = loss + ½ wd ‖θ‖² on one batch

        m(d) = gᵀd + ½ dᵀ(B + λ I) d,     B the GGN (or Hessian) of F,

    takes the best of CG's iterates for F, goes along p = lr·d by backtracking until F decreases
    sufficiently, and adapts λ to how well the model without λ predicts decreases. A step that no
    length makes a decrease is rejected: the parameters stay exactly as they were and λ grows.

    On mini-batches a model's agreement with the batch that it was made from says little of the
    rest of the data. Where a step finds another loss than the last one left, the batch has
    changed, and λ follows the slope of the new batch's loss along the last step, at its end: it
    grows where that step went too far and shrinks where it stopped short, on the average over
    batches (`hvpopt.optim.damping.slope_balanced`).

    Where ``p.grad`` is not the gradient of the loss that the closure computes (accumulated
    micro-batches, clipping), F is that loss plus the linear term that gives it the gradient
    ``p.grad``: curvature and line search use the last micro-batch, the gradient uses all of them
    (the surrogate of Shamir, Srebro and Zhang 2014, equation 3).

    Args:
        params: parameters, named parameters, or groups; ``lr``, ``damping`` and ``weight_decay``
            may differ from group to group.
        lr: multiple of the Newton direction that is tried first.
        damping: initial λ, in the units of the curvature (of the loss's mean over the batch where
            the loss is a mean); "auto" looks for it at the first step, by up to five trial
            solves, from the curvature along the gradient.
        weight_decay: wd, in the loss's units; part of objective, gradient and curvature.
        curvature: "ggn" (positive semi-definite where the loss is convex in the network's
            outputs) or "hessian", whose directions of negative curvature are followed.
        preconditioner: for CG, one of `hvpopt.preconditioners`; "auto" is `Kronecker` for the GGN
            of a loss that is a negative log-likelihood (cross-entropy, mean squared error), and
            none otherwise.
        max_cg_steps: at most so many products a step.
        cg_stop: when CG has done enough, on the gradient scaled to unit length; by default
            `Worthwhile` with a preconditioner, else Martens' `RelativeProgress`.
        cg_backtracking: whether earlier iterates of CG are tried, too.
        warm_start: CG starts from this multiple of the last step's solution; by default 0.95, or
            0 with a preconditioner.
        damping_factor: λ grows or shrinks by it a step, by default 3/2, or 2 with a
            preconditioner; 1 keeps λ fixed.
        sufficient_decrease: Armijo's c.
        backtracking: what a rejected trial step is multiplied by.
        max_evaluations: trial steps before a step is rejected.
        grad_tolerance: at or below this norm of F's gradient the parameters stay, unless the
            point is a saddle.
        seed: of the preconditioner's random numbers.
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
        damping: float | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        *,
        curvature: Curvature = "ggn",
        preconditioner: Preconditioner | Literal["auto"] | None = "auto",
        max_cg_steps: int = 250,
        cg_stop: StoppingRule | None = None,
        cg_backtracking: bool = True,
        warm_start: float | None = None,
        damping_factor: float | None = None,
        sufficient_decrease: float = 1e-2,
        backtracking: float = 0.5,
        max_evaluations: int = 10,
        grad_tolerance: float = 0.0,
        seed: int = 0,
        engine: EngineName = "auto",
        max_consecutive_failures: int = 5,
    ) -> None:
        if cg_stop is not None and not callable(cg_stop):
            raise ValueError(
                f"cg_stop={cg_stop!r} is no stopping rule: expected one such as "
                "hvpopt.solvers.stopping.ResidualNorm(rtol=1e-3)."
            )
        self._given = (cg_stop, warm_start, damping_factor)
        plain = preconditioner is None or (preconditioner == "auto" and curvature != "ggn")
        self._max_cg_steps = check_count("max_cg_steps", max_cg_steps)
        self._cg_backtracking = cg_backtracking
        self._fit_defaults(plain=plain)
        self._sufficient_decrease = check_range(
            "sufficient_decrease", sufficient_decrease, 0.0, 1.0
        )
        self._backtracking = check_range("backtracking", backtracking, 0.01, 0.99)
        self._max_evaluations = check_count("max_evaluations", max_evaluations)
        super().__init__(
            params,
            {"lr": lr, "damping": damping, "weight_decay": weight_decay},
            curvature=curvature,
            preconditioner=preconditioner,
            grad_tolerance=grad_tolerance,
            seed=seed,
            engine=engine,
            max_consecutive_failures=max_consecutive_failures,
        )

    def _fit_defaults(self, *, plain: bool) -> None:
        """Sets what was not given to what suits CG without or with a preconditioner."""
        self._cg_stop = self._given[0] or (RelativeProgress() if plain else Worthwhile())
        pairs = zip((0.95, 1.5) if plain else (0.0, 2.0), self._given[1:], strict=True)
        start, factor = (usual if given is None else given for usual, given in pairs)
        self._warm_start = check_range("warm_start", start, 0.0, 1.0)
        self._damping_factor = check_range("damping_factor", factor, 1.0)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if isinstance(group["damping"], str) and group["damping"] != "auto":
            raise ValueError(f"damping={group['damping']!r}: expected a number or 'auto'.")
        if group["damping"] != "auto":
            check_range("damping", group["damping"], 0.0)

    def _descend(self, step: Step) -> NewtonCGReport:
        objective = step.objective
        slope_ratio = step.slope_ratio()
        dampings = [self._balanced(g["damping"], slope_ratio) for g in self.param_groups]
        if "auto" in dampings:
            dampings = self._calibrated(step, dampings)
        model = self._model(step, dampings)
        solution = self._minimized(step, model, keep_iterates=self._cg_backtracking)
        said: dict[str, Any] = {
            "slope_ratio": slope_ratio,
            "damping": float(dampings[0]),
            "cg_steps": solution.num_steps,
            "cg_status": solution.status,
            "min_curvature": solution.min_curvature,
        }
        if solution.status is Status.BREAKDOWN and solution.num_steps == 0:
            return step.report(Outcome.NONFINITE_PRODUCT, **said)
        best, first_value = best_trial(model, self._per_parameter("lr"), solution)
        search = self._search(objective, best)
        length = search.step
        ratio = ratio_of(objective, search, best, first_value)
        if math.isnan(slope_ratio) or length == 0:
            dampings = [self._adapted(damping, ratio) for damping in dampings]
        step.keep(direction=solution.value, update=trees.scale(best.update, length))
        step.expect(search.value - objective.tilt(best.update, length), length * best.slope)
        said.update(
            objective_after=search.value,
            reduction_ratio=ratio,
            cg_iterate=best.num_steps,
            step_length=length,
            update_norm=length * float(trees.norm(best.update)),
        )
        for group, damping in zip(self.param_groups, dampings, strict=True):
            group["damping"] = damping
        return step.report(Outcome.STEPPED if length else Outcome.REJECTED, **said)

    def _model(self, step: Step, dampings: Sequence[float]) -> DampedModel:
        each = [
            damping
            for damping, group in zip(dampings, self.param_groups, strict=True)
            for p in group["params"]
            if p.requires_grad
        ]
        return DampedModel(step.objective, each, step.precondition)

    def _minimized(
        self, step: Step, model: DampedModel, *, keep_iterates: bool = False
    ) -> Solution:
        """CG from a multiple of the last solution, where that helps."""
        last = tensors(step.kept("direction")) if self._warm_start > 0 else None
        return model.minimized(
            x0=None if last is None else trees.scale(last, self._warm_start),
            stop=self._cg_stop,
            max_steps=self._max_cg_steps,
            keep_iterates=keep_iterates,
        )

    def _calibrated(self, step: Step, dampings: Sequence[Any]) -> list[float]:
        """The dampings with a number for each "auto", found without moving the parameters."""
        given = [damping for damping in dampings if damping != "auto"]
        if given:  # groups that came later
            return [given[0] if damping == "auto" else damping for damping in dampings]
        objective, lr = step.objective, self._per_parameter("lr")

        def ratio(damping: float) -> float:
            model = self._model(step, [damping] * len(dampings))
            solution = self._minimized(step, model)
            if solution.num_steps == 0:
                return math.nan
            found = trial(model, lr, solution.value, solution.num_steps, solution.model_value)
            change = found.value - objective.value
            return reduction_ratio(change, found.predicted(), noise=objective.noise)

        g = objective.grad
        along = abs(float(trees.dot(g, objective.product(g)) / trees.dot(g, g)))
        damping = calibrated(ratio, along) if 0 < along < math.inf else 1.0
        objective.restore()
        return [damping] * len(dampings)

    def _balanced(self, damping: Any, slope_ratio: float) -> Any:
        if self._damping_factor == 1 or damping == "auto":
            return damping
        return slope_balanced(damping, slope_ratio, factor=self._damping_factor)

    def _adapted(self, damping: Any, ratio: float) -> Any:
        if self._damping_factor == 1 or damping == "auto" or math.isnan(ratio):
            return damping
        return levenberg_marquardt(damping, ratio, factor=self._damping_factor)

    def _search(self, objective: Objective, best: Trial) -> LineSearchResult:
        search = LineSearchResult(0.0, objective.value, math.inf, 0)
        if best.slope < 0:
            search = armijo(
                lambda t: objective.move(best.update, t),
                objective.value,
                best.slope,
                sufficient_decrease=self._sufficient_decrease,
                factor=self._backtracking,
                max_evaluations=self._max_evaluations,
                noise=objective.noise,
                first_value=best.value,
            )
        if search.step == 0:
            objective.restore()
        return search
