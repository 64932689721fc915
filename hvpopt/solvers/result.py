"""What an iterative solver returns: a solution, how it ended, and what it cost."""

from dataclasses import dataclass
from enum import Enum

from hvpopt.trees import TensorList


class Status(Enum):
    """How an iterative algorithm ended; the value is the sentence to show to a reader."""

    CONVERGED = "converged: the residual is as small as was asked for"
    SMALL_PROGRESS = "converged: the last steps hardly improved the quadratic model"
    NEGATIVE_CURVATURE = (
        "stopped at a direction of zero or negative curvature: the operator is not positive "
        "definite; raise the damping, or use the direction"
    )
    BOUNDARY = "stopped at the boundary of the trust region: the model falls further outside of it"
    STEP_LIMIT = "stopped at the step limit before the tolerance was met; allow more steps"
    BREAKDOWN = (
        "broke down: a product with the operator, or the right-hand side, is NaN or infinite; "
        "the last finite iterate is returned"
    )
    INDEFINITE_PRECONDITIONER = (
        "broke down: the preconditioner is not positive definite, or returned NaN; "
        "the last finite iterate is returned"
    )

    @property
    def converged(self) -> bool:
        """Whether the algorithm stopped because its own criterion was met."""
        return self in (Status.CONVERGED, Status.SMALL_PROGRESS)


@dataclass(frozen=True)
class Iterate:
    """An intermediate solution that was kept."""

    num_steps: int
    """After how many steps it was reached."""
    model_value: float
    """½ xᵀAx − bᵀx there."""
    value: TensorList
    """The iterate x, in the shapes of b."""


@dataclass(frozen=True)
class Solution:
    """The approximate solution of A x = b."""

    value: TensorList
    """x, in the shapes and dtypes of b; always finite if b and x0 were."""
    status: Status
    """Why the solver stopped."""
    num_steps: int
    """Steps that changed x."""
    num_products: int
    """Products with A, the one for a starting point included."""
    residual_norm: float
    """‖b − A x‖ as the recurrence carries it."""
    model_values: tuple[float, ...]
    """The quadratic model m(x) = ½ xᵀAx − bᵀx at x₀ and after each step (num_steps + 1)."""
    min_curvature: float
    """The least pᵀAp / ‖p‖² over the directions tried; ∞ where none was."""
    direction: TensorList | None = None
    """Where the status is NEGATIVE_CURVATURE, the direction p with pᵀAp ≤ 0 (not normalised)."""
    iterates: tuple[Iterate, ...] = ()
    """The iterates kept on the way, in order, the last step's included; empty unless asked for."""

    @property
    def model_value(self) -> float:
        """The quadratic model m(x) = ½ xᵀAx − bᵀx at the returned x."""
        return self.model_values[-1]


@dataclass(frozen=True)
class TrustRegionStep(Solution):
    """The approximate minimiser of the quadratic model within a trust region."""

    norm: float = 0.0
    """‖x‖ in the norm of the trust region."""
    is_on_boundary: bool = False
    """Whether that is the radius."""

    @property
    def predicted_decrease(self) -> float:
        """−m(x) ≥ 0, by how much the model falls."""
        return -self.model_value
