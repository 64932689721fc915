"""What Newton's methods on a training closure share: one step's objective, state and failures."""

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.closure.rows import Rows
from hvpopt.engines.blame import UnsupportedOperationError
from hvpopt.engines.choice import EngineName
from hvpopt.engines.split import Curvature
from hvpopt.likelihoods import NoLikelihoodError
from hvpopt.linearization import LinearizedClosure
from hvpopt.optim.base import ClosureOptimizer, logger
from hvpopt.optim.checks import check_flag, check_seed
from hvpopt.optim.debiasing import halves_of
from hvpopt.optim.model import Precondition
from hvpopt.optim.objective import Objective, clipping
from hvpopt.optim.probes import seed_of_step
from hvpopt.optim.report import NewtonCGReport, Outcome, StepReport
from hvpopt.optim.saddle import escaped
from hvpopt.optim.step import Step
from hvpopt.options import check_range
from hvpopt.preconditioners import Kronecker
from hvpopt.preconditioners.base import CurvaturePoint, Preconditioner, State, restored
from hvpopt.solvers.curvature import least_curvature
from hvpopt.trees import TensorList

CLIPPED = (
    "The gradient reached %s clipped (Trainer's gradient_clip_val?). Its step solves a system with "
    "the gradient on the right-hand side: scaling that down by %.2g makes the step as much "
    "shorter, whatever the curvature says. Leave the clipping out: the damping and the search "
    "along the direction bound the step."
)

# Where the closure takes derivatives itself, as in physics-informed networks. Factors of less age
# make CG's first steps better and its last ones worse there, also without noise of the labels.
_STEADY = Kronecker(every=3, decay=0.8)


class NewtonOptimizer(ClosureOptimizer):
    """A Newton method whose steps see an `Objective`, with a preconditioner where wanted.

    Args:
        params: parameters, named parameters, or groups.
        defaults: the groups' defaults, "lr" and "weight_decay" among them.
        curvature: "ggn" or "hessian".
        preconditioner: see `hvpopt.preconditioners`; "auto" is Kronecker for the GGN where it
            serves, else none.
        grad_tolerance: at or below this norm of the gradient a step ends as converged.
        decoupled_weight_decay: takes the decay out of the objective: after a step that moves,
            θ ← (1 − lr wd) θ, and one evaluation more.
        curvature_fraction: share of the batch's rows that the GGN is of.
        debiased: whether the step has its `Step.halves`.
        seed: of the preconditioner's random numbers, and of the choice of rows.
        engine, max_consecutive_failures: see `ClosureOptimizer`.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for a preconditioner that is none.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        curvature: Curvature,
        preconditioner: Preconditioner | Literal["auto"] | None,
        grad_tolerance: float,
        decoupled_weight_decay: bool,
        seed: int,
        engine: EngineName,
        max_consecutive_failures: int,
        curvature_fraction: float = 1.0,
        debiased: bool = False,
    ) -> None:
        if curvature not in ("ggn", "hessian"):
            raise ValueError(f"curvature={curvature!r} is unknown: choose 'ggn' or 'hessian'.")
        self._may_go_without = preconditioner == "auto"
        if preconditioner == "auto":
            preconditioner = Kronecker() if curvature == "ggn" else None
        if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
            is_class = isinstance(preconditioner, type)
            kind = preconditioner.__name__ if is_class else type(preconditioner).__name__
            raise TypeError(
                f"preconditioner is {'the class' if is_class else 'a'} {kind}: expected one of "
                'hvpopt.preconditioners, such as Kronecker(), or "auto", or None.'
            )
        self._curvature: Curvature = curvature
        self._preconditioner = preconditioner
        self._grad_tolerance = check_range("grad_tolerance", grad_tolerance, 0.0)
        self._is_decoupled = check_flag("decoupled_weight_decay", decoupled_weight_decay)
        self._fraction = check_range("curvature_fraction", curvature_fraction, 1e-6, 1.0)
        self._is_debiased = check_flag("debiased", debiased)
        if self._fraction < 1 and curvature != "ggn":
            raise ValueError(
                f"curvature_fraction={curvature_fraction} takes rows of the network's outputs, "
                "which the GGN has, and the Hessian has not: choose curvature='ggn'."
            )
        if debiased and self._fraction == 1:
            raise ValueError(
                "debiased=True takes the direction from one part of the batch and its length from "
                "the rest: choose curvature_fraction below 1, such as 0.5."
            )
        self._seed = check_seed(seed)
        self._said: set[str] = set()
        super().__init__(
            params, defaults, engine=engine, max_consecutive_failures=max_consecutive_failures
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_range("weight_decay", group["weight_decay"], 0.0)

    def _fit_defaults(self, *, plain: bool) -> None:
        """Options that were not given, once it is known that CG goes without a preconditioner."""

    @abstractmethod
    def _descend(self, step: Step) -> NewtonCGReport:
        """Moves the parameters from a point with a finite, non-zero gradient."""

    def _advance(self, oracle: ClosureOracle, params: TensorList, start: TensorList) -> StepReport:
        rows = None
        if self._fraction < 1:
            num_steps = self.state.get(params[0], {}).get("step", 0)
            rows = Rows(self._fraction, seed_of_step(self._seed, num_steps))
        point = oracle.trace(self._curvature, rows=rows)
        self._check_gradients(oracle, params)
        decay = self._decay_of_used(params)
        if rows is not None and not self._is_debiased:
            point = oracle.of_part(point, "part", gradient=False)
        in_loss = [0.0] * len(decay) if self._is_decoupled else decay
        objective = Objective(oracle, point, params, start, in_loss)
        grad_norm = float(trees.norm(objective.grad))
        self._warn_of_clipping(point, oracle.loss_scale)
        figures: dict[str, Any] = {
            "loss": float(point.loss), "objective": objective.value, "grad_norm": grad_norm,
        }  # fmt: skip

        def report(outcome: Outcome, **said: Any) -> NewtonCGReport:
            return NewtonCGReport(
                outcome=outcome,
                num_closure_runs=oracle.num_runs,
                num_products=oracle.num_products,
                **figures,
                **said,
            )

        if not math.isfinite(objective.value):
            return report(Outcome.NONFINITE_LOSS)
        if not math.isfinite(grad_norm):
            return report(Outcome.NONFINITE_GRADIENT)
        if grad_norm <= self._grad_tolerance:
            return self._leave_saddle(oracle, objective, params, report)
        drafts = [dict(self.state[p]) for p in params]
        precondition = self._prepared(oracle, objective, params, drafts, point.product)
        halves = halves_of(objective, oracle, point) if self._is_debiased else None
        step = Step(objective, drafts, precondition, report, halves)
        taken = self._descend(step)
        if taken.outcome is Outcome.STEPPED and self._is_decoupled and any(decay):
            pairs = zip(self._per_parameter("lr"), decay, strict=True)
            step.shrink([1 - lr * wd for lr, wd in pairs])
            taken = replace(taken, num_closure_runs=oracle.num_runs)
        if not taken.outcome.failed:
            for p, draft in zip(params, drafts, strict=True):
                self.state[p].update(draft, step=draft.get("step", 0) + 1)
        return taken

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned.

        torch casts all to the parameters' dtypes, but factors are in float32 or wider.
        """
        super().load_state_dict(state_dict)
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(places, params, strict=True):
            held = state_dict["state"].get(i, {})
            self.state[p].update(
                {k: restored(v, p) for k, v in held.items() if isinstance(v, dict)}
            )

    def _warn_of_clipping(self, point: LinearizedClosure, loss_scale: int) -> None:
        scale = clipping(point.grad, point.batch_grad)
        is_lone = abs(scale * loss_scale - 1) < 1e-3  # a micro-batch alone at an epoch's end
        if scale < 1 and not is_lone and CLIPPED not in self._said:
            self._said.add(CLIPPED)
            logger.warning(CLIPPED, type(self).__name__, scale)

    def _leave_saddle(
        self,
        oracle: ClosureOracle,
        objective: Objective,
        params: TensorList,
        report: Callable[..., NewtonCGReport],
    ) -> NewtonCGReport:
        """A step along the Hessian's negative curvature, or the report of convergence."""
        found = None
        with suppress(UnsupportedOperationError):  # then there is no telling
            point = oracle.trace("hessian")
            hessian = objective.at(point)
            found = least_curvature(
                hessian.product,
                params,
                tolerance=1e-3,
                generator=torch.Generator().manual_seed(self._seed),
                max_steps=40,
            )
        if found is None or not found.is_negative:
            return report(Outcome.CONVERGED, objective_after=objective.value)
        if not any(self._per_parameter("lr")):
            return report(Outcome.CONVERGED, objective_after=objective.value)
        search = escaped(objective, found.value, found.vector)
        self.state[params[0]].pop("objective", None)  # where the last step ended is left
        return report(
            Outcome.STEPPED if search.step else Outcome.REJECTED,
            objective_after=search.value,
            min_curvature=found.value,
            step_length=search.step,
            update_norm=abs(search.step),
        )

    def _prepared(
        self,
        oracle: ClosureOracle,
        objective: Objective,
        params: TensorList,
        drafts: list[State],
        product: Any,
    ) -> Precondition | None:
        """The preconditioner at this step; None where there is none, or it came to nothing."""
        chosen = self._preconditioner
        if chosen is None:
            return None
        if self._may_go_without and objective.takes_derivatives:
            chosen = _STEADY
        num_steps = int(drafts[0].get("step", 0))
        point = CurvaturePoint(
            params=params,
            grad=objective.grad,
            product=product,
            oracle=oracle,
            seed=self._seed + num_steps,
        )
        try:
            with torch.no_grad():
                chosen.prepare(point, drafts, num_steps)
        except (NoLikelihoodError, UnsupportedOperationError) as error:
            if not self._may_go_without:
                raise
            logger.info("%s goes without a preconditioner: %s", type(self).__name__, error)
            self._preconditioner = None
            self._fit_defaults(plain=True)
            return None
        if not chosen.is_ready(drafts):
            return None
        return partial(chosen.inverse, drafts)
