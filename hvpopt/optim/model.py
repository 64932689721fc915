"""The quadratic model that a Newton step minimises, and its damped minimisation by CG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from hvpopt import trees
from hvpopt.optim.damping import reduction_ratio
from hvpopt.optim.line_search import LineSearchResult, armijo
from hvpopt.optim.objective import Objective
from hvpopt.solvers.cg import cg
from hvpopt.solvers.result import Iterate, Solution
from hvpopt.solvers.stopping import StoppingRule
from hvpopt.trees import TensorList

Precondition = Callable[[Sequence[float]], Callable[[TensorList], TensorList]]
"""λ of each parameter ↦ (r ↦ M⁻¹ r)."""


_WORTH = 1e-3


@dataclass(frozen=True)
class DampedModel:
    """m(d) = gᵀd + ½ dᵀB d + ½ λ ‖d − c‖² of an objective, with λ of each parameter, less m(0).

    Attributes:
        objective: gives g and B.
        damping: λ, one number a parameter.
        precondition: for CG; none where None.
        centre: c, zero where None.
    """

    objective: Objective
    damping: Sequence[float]
    precondition: Precondition | None = None
    centre: TensorList | None = None

    @cached_property
    def grad(self) -> TensorList:
        """The gradient of m at zero, g − λ c."""
        if self.centre is None:
            return self.objective.grad
        return trees.add(self.objective.grad, trees.scale_each(self.damping, self.centre), -1.0)

    def product(self, v: TensorList) -> TensorList:
        """(B + λ I) v."""
        product = self.objective.product(v)
        if len(set(self.damping)) == 1:
            return trees.add(product, v, self.damping[0])
        return trees.add(product, trees.scale_each(self.damping, v))

    def minimized(
        self,
        *,
        x0: TensorList | None,
        stop: StoppingRule,
        max_steps: int,
        keep_iterates: bool,
    ) -> Solution:
        """The solution of (B + λ I) d = λ c − g by CG, from ``x0``.

        CG sees the right-hand side at unit length, so that neither its squares overflow nor a
        stopping rule depends on the loss's scale.
        """
        size = float(trees.norm(self.grad)) or 1.0
        shift = [a + b for a, b in zip(self.damping, self.objective.decay, strict=True)]
        precondition = self.precondition
        unit = cg(
            self.product,
            trees.scale(self.grad, -1 / size),
            x0=None if x0 is None else trees.scale(x0, 1 / size),
            preconditioner=None if precondition is None else precondition(shift),
            stop=stop,
            max_steps=max_steps,
            keep_iterates=keep_iterates,
        )
        return replace(
            unit,
            value=trees.scale(unit.value, size),
            direction=None if unit.direction is None else trees.scale(unit.direction, size),
            residual_norm=unit.residual_norm * size,
            model_values=tuple(m * size**2 for m in unit.model_values),
            iterates=tuple(
                Iterate(i.num_steps, i.model_value * size**2, trees.scale(i.value, size))
                for i in unit.iterates
            ),
        )

    def undamped_curvature(self, d: TensorList, model_value: float) -> float:
        """dᵀB d, from the value m(d) that CG knows."""
        slope = float(trees.dot(self.grad, d))
        return 2 * (model_value - slope) - self.damped(d)

    def damped(self, d: TensorList) -> float:
        """dᵀΛ d."""
        return float(trees.dot(trees.scale_each(self.damping, d), d))


@dataclass(frozen=True)
class Trial:
    """A step p that may be taken, with the model's figures and the objective there.

    Attributes:
        update: p.
        slope: gᵀp.
        curved: pᵀB p, without damping.
        damped: pᵀΛ p, with Λ = diag(λ).
        value: F(θ + p); NaN where it was not evaluated.
        num_steps: the steps of CG that led to it.
    """

    update: TensorList
    slope: float
    curved: float
    damped: float
    value: float
    num_steps: int

    def predicted(self, length: float = 1.0) -> float:
        """The model's change of F along length·p, without damping."""
        return length * self.slope + 0.5 * length**2 * self.curved

    @property
    def share(self) -> float:
        """pᵀΛ p / pᵀB p, what the damping has to say beside the curvature; inf without any."""
        return self.damped / self.curved if self.curved > 0 else math.inf


def trial(
    model: DampedModel, lr: Sequence[float], d: TensorList, num_steps: int, value: float | None
) -> Trial:
    """The trial step p = lr·d; its curvature by what CG knows of m(d), ``value``, where it can."""
    objective = model.objective
    update = trees.scale_each(lr, d)
    slope = float(trees.dot(objective.grad, update))
    if value is None or len(set(lr)) > 1:
        curved = float(trees.dot(update, objective.product(update)))
    else:
        curved = lr[0] ** 2 * model.undamped_curvature(d, value)
    damped = model.damped(update)
    return Trial(update, slope, curved, damped, objective.move(update, 1.0), num_steps)


def best_trial(model: DampedModel, lr: Sequence[float], solution: Solution) -> tuple[Trial, float]:
    """The best of CG's iterates for F itself, with the parameters there; and F at the last one.

    CG minimises the model; its last steps go where the model is least trusted. The walk from the
    last iterate back ends where F stops falling, by a share of its decrease that rounding does not
    decide. A direction of negative curvature that CG met is
    taken where F is lower along it.

    Source: Martens (2010), section 4.6.
    """
    last = trial(model, lr, solution.value, solution.num_steps, solution.model_value)
    best = last
    for kept in reversed(solution.iterates[:-1]):
        earlier = trial(model, lr, kept.value, kept.num_steps, kept.model_value)
        enough = best.value - _WORTH * abs(model.objective.value - best.value)
        if math.isfinite(enough) and not earlier.value < enough:
            break
        best = earlier
    if solution.direction is not None:
        uphill = trees.dot(model.objective.grad, solution.direction) > 0
        length = _length_across(model.objective, solution, solution.direction)
        downhill = trees.scale(solution.direction, -length if uphill else length)
        across = trial(model, lr, downhill, 0, None)
        if solution.num_steps == 0 or across.value < best.value:
            return across, across.value
    model.objective.put(best.update, 1.0)
    return best, last.value


def _length_across(objective: Objective, solution: Solution, d: TensorList) -> float:
    """The multiple of a direction d of curvature κ ‖d‖² < 0 that is tried: |gᵀd| / |κ| ‖d‖².

    Whatever the scale of the loss, the model falls there by slope and by curvature in the ratio
    2 : 1; no longer than max(1, ‖θ‖).
    """
    size = float(trees.norm(d))
    slope = abs(float(trees.dot(objective.grad, d)))
    curved = abs(solution.min_curvature) * size**2
    longest = max(1.0, objective.start_norm) / size
    return min(slope / curved, longest) if curved > 0 else longest


def descended(
    objective: Objective,
    best: Trial,
    *,
    sufficient_decrease: float,
    factor: float,
    max_evaluations: int,
) -> LineSearchResult:
    """Backtracks from a trial step, where the parameters are, until F has decreased enough.

    Where it never does, or the step does not go downhill, the parameters are those at the start.

    Args:
        objective: F.
        best: the trial step.
        sufficient_decrease, factor, max_evaluations: as of `armijo`.
    """
    search = LineSearchResult(0.0, objective.value, math.inf, 0)
    if best.slope < 0:
        search = armijo(
            lambda t: objective.move(best.update, t),
            objective.value,
            best.slope,
            sufficient_decrease=sufficient_decrease,
            factor=factor,
            max_evaluations=max_evaluations,
            noise=objective.noise,
            first_value=best.value,
        )
    if search.step == 0:
        objective.restore()
    return search


def ratio_of(
    objective: Objective, search: LineSearchResult, best: Trial, first_value: float
) -> float:
    """ρ of the step taken; −∞ where there is none or CG's solution raised F.

    NaN for no slope, and where F is the same to the last bit, which tells no step from another.
    """
    if best.slope == 0 or (search.step > 0 and search.value == objective.value):
        return math.nan
    if search.step == 0 or not first_value - objective.value <= objective.noise:
        return -math.inf
    predicted = best.predicted(search.step)
    return reduction_ratio(search.value - objective.value, predicted, noise=objective.noise)


def tensors(values: Sequence[Tensor | None]) -> TensorList | None:
    """The values, if none is missing."""
    present = [v for v in values if v is not None]
    return present if len(present) == len(values) else None
