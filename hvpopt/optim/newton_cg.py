"""Newton-CG, also known as Hessian-free optimization."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from hvpopt import trees
from hvpopt.engines.choice import EngineName
from hvpopt.engines.split import Curvature
from hvpopt.optim.calibration import first_damping
from hvpopt.optim.cg_options import CGOptions
from hvpopt.optim.checks import failure_of
from hvpopt.optim.debiasing import relengthened
from hvpopt.optim.model import DampedModel, best_trial, descended, ratio_of, tensors
from hvpopt.optim.newton import NewtonOptimizer
from hvpopt.optim.report import NewtonCGReport, Outcome
from hvpopt.optim.step import Step
from hvpopt.options import check_count, check_range
from hvpopt.preconditioners.base import Preconditioner
from hvpopt.solvers.result import Solution
from hvpopt.solvers.stopping import ForcingTerm, StoppingRule


class NewtonCG(NewtonOptimizer):
    """Newton's method with conjugate gradients on curvature products (Martens 2010).

    Each step minimises, by CG, the model of the objective F(θ) = loss + ½ wd ‖θ‖² on one batch

        m(d) = gᵀd + ½ dᵀB d + ½ λ ‖d − μ p₋‖²,     B the GGN (or Hessian) of F,

    with p₋ the last step; takes the best of CG's iterates for F, goes along p = lr·d by
    backtracking until F decreases sufficiently, and adapts λ to how well the model without λ
    predicts decreases. A step that no length makes a decrease is rejected: the parameters stay
    exactly as they were, λ grows, and the next p₋ is zero. The momentum μ keeps what λ would take
    from p where the curvature is small, along a valley: there p is μ p₋ − g / λ.

    Where B + λ I has a direction of negative curvature, CG stops at it, and it is taken in place of
    CG's iterate if F is lower there, at |gᵀd| over its curvature. It is not the capped CG of
    `hvpopt.minimize`, whose bound on the number of steps holds for one F and a fixed λ.

    On mini-batches a model's agreement with the batch that it was made from says little of the
    rest of the data. Where a step finds another loss than the last one left, the batch has
    changed, and p = α lr·d with an α that follows the slope of the new batch's loss along the last
    step, at its end: it shrinks where that step went too far and grows, up to 1, where it stopped
    short, on the average over batches (`hvpopt.optim.damping.balanced_scale`). A direction that is
    more than twice as long as the last ones were is cut to that. λ is then only to keep the model
    true: it grows faster, and falls slower, to a small part of the first at the least
    (`hvpopt.optim.damping.damping_after`).

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
            none otherwise. Where the closure takes derivatives itself its factors are steadier.
        max_cg_steps: at most so many products a step.
        cg_stop: when CG has done enough, on the gradient scaled to unit length, or a forcing term;
            by default `Worthwhile` with a preconditioner and on mini-batches, whose noise is not
            worth an accurate solution, else Martens' `RelativeProgress`. Where the closure takes
            derivatives by ``torch.autograd.grad``, as of a physics-informed network, its runs
            cost as much as products, and the solutions are more accurate (``overhead=10``).
        cg_backtracking: whether earlier iterates of CG are tried, too.
        warm_start: CG starts from this multiple of the last step's solution; by default 0.95, or
            0 with a preconditioner.
        momentum: μ; 0 is as in Martens' method, and while gradients accumulate over micro-batches:
            λ alone bounds p where the last one has no curvature.
        damping_factor: λ falls by it after a good step that it had a part in, by default 3/2, or 3
            with a preconditioner, and grows by its square after a bad one; 1 keeps λ fixed.
        scale_gain: how fast α follows a late batch; 0 keeps it at 1.
        sufficient_decrease: Armijo's c.
        backtracking: what a rejected trial step is multiplied by.
        max_evaluations: trial steps before a step is rejected.
        grad_tolerance: at or below this norm of F's gradient the parameters stay, unless the
            point is a saddle.
        decoupled_weight_decay: F is without wd; after a step θ ← (1 − lr wd) θ, as in AdamW.
        curvature_fraction: share of the batch's rows, drawn anew each step, that B is of.
        debiased: takes the direction from that part, and its length from the other rows; see
            `hvpopt.optim.debiasing`.
        seed: of the preconditioner's random numbers, and of the choice of rows.
        engine: see `hvpopt.closure.ClosureOracle`.
        max_consecutive_failures: so many failed steps in a row raise FloatingPointError.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for complex, integer or sparse parameters.

    Source: Martens, "Deep learning via Hessian-free optimization" (2010), section 4; the GGN is
    Schraudolph's (2002); the momentum is that of Goldshlager, Abrahamsen and Lin, "A
    Kaczmarz-inspired approach to accelerate the optimization of neural network wavefunctions" (J.
    Comput. Phys. 516, 2024), which Guzmán-Cordero et al. (2025) took to physics-informed networks.

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
        cg_stop: StoppingRule | ForcingTerm | None = None,
        cg_backtracking: bool = True,
        warm_start: float | None = None,
        momentum: float = 0.9,
        damping_factor: float | None = None,
        scale_gain: float = 0.1,
        sufficient_decrease: float = 1e-2,
        backtracking: float = 0.5,
        max_evaluations: int = 10,
        grad_tolerance: float = 0.0,
        decoupled_weight_decay: bool = False,
        curvature_fraction: float = 1.0,
        debiased: bool = False,
        seed: int = 0,
        engine: EngineName = "auto",
        max_consecutive_failures: int = 5,
    ) -> None:
        plain = preconditioner is None or (preconditioner == "auto" and curvature != "ggn")
        self._max_cg_steps = check_count("max_cg_steps", max_cg_steps)
        self._cg_backtracking = cg_backtracking
        self._options = CGOptions(cg_stop, warm_start, damping_factor, plain=plain)
        self._momentum = check_range("momentum", momentum, 0.0, 1.0)
        self._scale_gain = check_range("scale_gain", scale_gain, 0.0, 1.0)
        self._decrease = check_range("sufficient_decrease", sufficient_decrease, 0.0, 1.0)
        self._backtracking = check_range("backtracking", backtracking, 0.01, 0.99)
        self._max_evaluations = check_count("max_evaluations", max_evaluations)
        super().__init__(
            params,
            {"lr": lr, "damping": damping, "weight_decay": weight_decay},
            curvature=curvature,
            preconditioner=preconditioner,
            grad_tolerance=grad_tolerance,
            decoupled_weight_decay=decoupled_weight_decay,
            curvature_fraction=curvature_fraction,
            debiased=debiased,
            seed=seed,
            engine=engine,
            max_consecutive_failures=max_consecutive_failures,
        )

    def _fit_defaults(self, *, plain: bool) -> None:
        """Sets what was not given to what suits CG without or with a preconditioner."""
        self._options = replace(self._options, plain=plain)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if isinstance(group["damping"], str) and group["damping"] != "auto":
            raise ValueError(f"damping={group['damping']!r}: expected a number or 'auto'.")
        if group["damping"] != "auto":
            check_range("damping", group["damping"], 0.0)

    def _descend(self, step: Step) -> NewtonCGReport:
        objective = step.objective
        slope_ratio = step.mean_slope_ratio()
        scale = step.scale(slope_ratio, self._scale_gain)
        dampings, factor = self._calibrated(step), self._options.damping_factor
        pairs = zip(self.param_groups, dampings, strict=True)
        firsts = [group.get("first_damping", damping) for group, damping in pairs]
        leasts = [self._options.least_share * first for first in firsts]
        if objective.is_partial and math.isnan(slope_ratio):
            dampings = step.dampings(dampings, step.late_ratio(), 0.0, factor, leasts)
        model = self._model(step, dampings)
        solution = self._solved(step, model)
        said: dict[str, Any] = {
            "slope_ratio": slope_ratio,
            "damping": float(dampings[0]),
            "cg_steps": solution.num_steps,
            "cg_status": solution.status,
            "min_curvature": solution.min_curvature,
        }
        if failure := failure_of(solution):
            return step.report(failure, **said)
        scale *= step.cut(float(trees.norm(solution.value)))
        lr = [scale * each for each in self._per_parameter("lr")]
        best, first_value = best_trial(model, lr, solution)
        search = descended(
            objective,
            best,
            sufficient_decrease=self._decrease,
            factor=self._backtracking,
            max_evaluations=self._max_evaluations,
        )
        length = search.step
        ratio = ratio_of(objective, search, best, first_value)
        step.keep(direction=solution.value, update=trees.scale(best.update, length))
        step.expect(search.value - objective.tilt(best.update, length), length * best.slope)
        step.remember(predicted=best.predicted(length))
        said.update(
            step_scale=scale,
            objective_after=search.value,
            reduction_ratio=ratio,
            cg_iterate=best.num_steps,
            step_length=length,
            update_norm=length * float(trees.norm(best.update)),
        )
        if length == 0 or not objective.is_partial:
            dampings = step.dampings(dampings, ratio, slope_ratio, factor, leasts, best.share)
        for group, damping, first in zip(self.param_groups, dampings, firsts, strict=True):
            group.update(damping=damping, first_damping=first)
        return step.report(Outcome.STEPPED if length else Outcome.REJECTED, **said)

    def _model(self, step: Step, dampings: Sequence[float]) -> DampedModel:
        each = [
            damping
            for damping, group in zip(dampings, self.param_groups, strict=True)
            for p in group["params"]
            if p.requires_grad
        ]
        momentum = 0.0 if step.objective.is_partial else self._momentum
        last = tensors(step.kept("update")) if momentum > 0 else None
        centre = None if last is None else trees.scale(last, momentum)
        return DampedModel(step.objective, each, step.precondition, centre)

    def _solved(self, step: Step, model: DampedModel) -> Solution:
        if step.halves is None:
            return self._minimized(step, model, keep_iterates=self._cg_backtracking)
        part, rest = (replace(model, objective=half) for half in step.halves)
        return relengthened(model, rest, self._minimized(step, part))

    def _minimized(
        self, step: Step, model: DampedModel, *, keep_iterates: bool = False
    ) -> Solution:
        """CG from a multiple of the last solution, where that helps."""
        last = tensors(step.kept("direction")) if self._options.warm_start > 0 else None
        return model.minimized(
            x0=None if last is None else trees.scale(last, self._options.warm_start),
            stop=step.stopping(self._options.stop(step)),
            max_steps=self._max_cg_steps,
            keep_iterates=keep_iterates,
        )

    def _calibrated(self, step: Step) -> list[float]:
        """Each group's damping, with a number for "auto"."""
        given = [group["damping"] for group in self.param_groups]
        numbers = [damping for damping in given if damping != "auto"]
        if not numbers:
            numbers.append(
                first_damping(
                    step.objective,
                    self._per_parameter("lr"),
                    lambda damping: self._model(step, [damping] * len(given)),
                    lambda model: self._minimized(step, model),
                )
            )
        return [numbers[0] if damping == "auto" else damping for damping in given]
