"""What an optimizer says about its last step."""

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from hvpopt.solvers.result import Status


class Outcome(Enum):
    """How a step ended. The values are the sentences that a user reads."""

    STEPPED = "The parameters moved."
    CONVERGED = "The gradient is zero to within its tolerance: the parameters stay."
    REJECTED = "No step along the direction decreased the loss: the parameters stay."
    SKIPPED = (
        "The closure left its backward pass out: the parameters stay. So it is meant where a "
        "training_step returns None; else let the closure call backward() and return the loss."
    )
    INTERRUPTED = (
        "The step ended in an exception: parameters, state and options are those before it."
    )
    NONFINITE_LOSS = (
        "The loss is not finite: the parameters stay. Look for a division by zero, a logarithm of "
        "zero or inputs that are not finite, or lower the learning rate."
    )
    NONFINITE_GRADIENT = (
        "The gradient is not finite though the loss is: the parameters stay. Look for a square "
        "root or a norm at zero."
    )
    NONFINITE_PRODUCT = (
        "The curvature product is not finite though loss and gradient are: the parameters stay. "
        "Look for an operation whose second derivative is unbounded, such as a norm near zero."
    )
    BROKEN_PRECONDITIONER = (
        "The preconditioner is not positive definite, or not finite: the parameters stay. Raise "
        "the damping, choose another of hvpopt.preconditioners, or preconditioner=None."
    )

    @property
    def failed(self) -> bool:
        """Whether the step counts towards the optimizer's ``max_consecutive_failures``."""
        return self not in (Outcome.STEPPED, Outcome.CONVERGED, Outcome.REJECTED)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What every optimizer reports of a step.

    Attributes:
        outcome: how the step ended.
        loss: the closure's loss before the step.
        num_closure_runs: how often the closure ran, evaluations included.
        num_products: how many curvature products were computed.
    """

    progress_fields: ClassVar[tuple[str, ...]] = ()
    """The figures that belong in a progress bar."""

    outcome: Outcome
    loss: float
    num_closure_runs: int = 0
    num_products: int = 0

    def metrics(self) -> dict[str, float]:
        """The finite numbers of the report by name, for a logger."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {
            name: float(value)
            for name, value in pairs
            if isinstance(value, (int, float)) and math.isfinite(value)
        }


@dataclass(frozen=True, kw_only=True)
class NewtonCGReport(StepReport):
    """What Newton-CG did in a step. The objective is the loss plus the weight decay's ½ wd ‖θ‖².

    Attributes:
        objective, objective_after: its values before and after the step, on the same batch.
        damping: λ that was used, of the first group; NaN in a trust region.
        radius: of the trust region; NaN without one.
        reduction_ratio: ρ, the decrease over the one predicted; NaN where not measurable.
        slope_ratio: the slope of this batch's objective at the end of the last step, along that
            step, over the slope at its start on its own batch (without a trust region, over the
            average of these slopes); negative where it went too far, NaN where the batch is the
            same.
        step_scale: α, by which the slope ratios have shortened steps, and the cut of an unusually
            long one; NaN in a trust region.
        cg_steps: steps of CG.
        cg_status: why CG ended.
        cg_iterate: the step of CG whose iterate was taken; 0 for a direction of negative curvature.
        min_curvature: the least pᵀA p / ‖p‖² that CG met, damping included.
        step_length: multiple of the direction that was taken; 0 for none.
        grad_norm: of the objective's gradient.
        update_norm: ‖θ_new − θ‖.
    """

    progress_fields: ClassVar[tuple[str, ...]] = ("damping", "cg_steps")

    objective: float = math.nan
    objective_after: float = math.nan
    damping: float = math.nan
    radius: float = math.nan
    reduction_ratio: float = math.nan
    slope_ratio: float = math.nan
    step_scale: float = math.nan
    cg_steps: int = 0
    cg_status: Status | None = None
    cg_iterate: int = 0
    min_curvature: float = math.nan
    step_length: float = 0.0
    grad_norm: float = math.nan
    update_norm: float = 0.0
