"""When an iterative solver may stop: small rules over what it knows after each step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvpopt.solvers.result import Status


@dataclass(frozen=True)
class Progress:
    """What the solver of A x = b knows after a step."""

    num_steps: int
    """Steps taken, i."""
    residual_norm: float
    """‖b − A xᵢ‖."""
    rhs_norm: float
    """‖b‖."""
    model_values: Sequence[float]
    """m₀ … mᵢ with m(x) = ½ xᵀAx − bᵀx."""


StoppingRule = Callable[[Progress], Status | None]
"""Returns the status to stop with, or None to go on."""


@dataclass(frozen=True)
class RelativeProgress:
    """Martens' rule: stops when the last k steps hardly improved the quadratic model.

    With k = max(min_steps, ⌈fraction · i⌉), stops after step i when

        i > k,   mᵢ < 0   and   (mᵢ − mᵢ₋ₖ) / mᵢ < rtol · k.

    The factor k makes ``rtol`` the progress expected *of one step*.

    Args:
        rtol: Least relative improvement of the model per step.
        min_steps: The shortest window, in steps.
        fraction: The window as a fraction of the steps so far.

    Raises:
        ValueError: For ``rtol`` ≤ 0, ``min_steps`` < 1 or ``fraction`` < 0.

    Source: Martens, Deep learning via Hessian-free optimization (ICML 2010), section 4.4.
    """

    rtol: float = 5e-4
    min_steps: int = 10
    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not self.rtol > 0:
            raise ValueError(f"RelativeProgress needs rtol > 0, got {self.rtol}.")
        if self.min_steps < 1:
            raise ValueError(f"RelativeProgress needs min_steps ≥ 1, got {self.min_steps}.")
        if not self.fraction >= 0:
            raise ValueError(f"RelativeProgress needs fraction ≥ 0, got {self.fraction}.")

    def __call__(self, progress: Progress) -> Status | None:
        """SMALL_PROGRESS when the inequality above holds."""
        step, values = progress.num_steps, progress.model_values
        window = max(self.min_steps, math.ceil(self.fraction * step))
        if step <= window or not values[step] < 0:
            return None
        gained = (values[step] - values[step - window]) / values[step]
        return Status.SMALL_PROGRESS if gained < self.rtol * window else None


@dataclass(frozen=True)
class Worthwhile:
    """Stops when a step gains less than the average step so far: mᵢ₋₁ − mᵢ < −mᵢ / (i + c).

    A Newton method that stops there gains most in the time that it has: what is left is got faster
    by a new model (the marginal value theorem of Charnov, 1976).

    Args:
        overhead: c, what the rest of the optimizer's step costs, in steps of CG.

    Raises:
        ValueError: For a negative overhead.
    """

    overhead: float = 1.0

    def __post_init__(self) -> None:
        if not self.overhead >= 0:
            raise ValueError(f"Worthwhile needs overhead ≥ 0, got {self.overhead}.")

    def __call__(self, progress: Progress) -> Status | None:
        """SMALL_PROGRESS when the inequality above holds."""
        i, m = progress.num_steps, progress.model_values
        if i < 1:
            return None
        gain = m[i - 1] - m[i]
        return Status.SMALL_PROGRESS if gain * (i + self.overhead) < -m[i] else None


@dataclass(frozen=True)
class ResidualNorm:
    """Stops when ‖b − A x‖ ≤ max(rtol · ‖b‖, atol): a forcing term for inexact Newton steps.

    Args:
        rtol: Tolerance relative to ‖b‖, e.g. min(½, √‖g‖) for superlinear convergence.
        atol: Absolute tolerance, in the units of b.

    Raises:
        ValueError: For a negative tolerance.

    Source: Nocedal and Wright, Numerical Optimization (2006), section 7.1.
    """

    rtol: float = 1e-5
    atol: float = 0.0

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0):
            raise ValueError(
                f"ResidualNorm needs tolerances ≥ 0, got rtol={self.rtol}, atol={self.atol}."
            )

    def __call__(self, progress: Progress) -> Status | None:
        """CONVERGED when the residual is within the tolerance."""
        tolerance = max(self.rtol * progress.rhs_norm, self.atol)
        return Status.CONVERGED if progress.residual_norm <= tolerance else None


_LEAST = 1e-12  # residuals below it are rounding


class ForcingTerm(ABC):
    """Says how accurately each of a sequence of Newton systems B d = −g is solved.

    The residual is to be ‖B d + g‖ ≤ η ‖g‖, with η from the gradients so far: loose far from a
    minimum, where the model is wrong anyway, and tight near one, so that Newton's method keeps its
    fast convergence. For deterministic problems: the gradients of mini-batches say little of each
    other.
    """

    @abstractmethod
    def rtol(
        self, grad_norm: float, last_norm: float | None = None, last_rtol: float | None = None
    ) -> float:
        """η.

        Args:
            grad_norm: ‖g‖ at this step.
            last_norm: at the last one; None at the first.
            last_rtol: η at the last one.
        """


@dataclass(frozen=True)
class SquareRoot(ForcingTerm):
    """η = min(cap, √‖g‖), which makes Newton's method superlinear; not free of the loss's scale.

    Args:
        cap: The largest η.

    Raises:
        ValueError: For a cap outside (0, 1).

    Source: Nocedal and Wright, Numerical Optimization (2006), algorithm 7.1.

    Examples:
        >>> SquareRoot().rtol(100.0), SquareRoot().rtol(0.01)
        (0.5, 0.1)
    """

    cap: float = 0.5

    def __post_init__(self) -> None:
        _check_cap(self)

    def rtol(
        self, grad_norm: float, last_norm: float | None = None, last_rtol: float | None = None
    ) -> float:
        """min(cap, √‖g‖)."""
        return max(min(self.cap, math.sqrt(grad_norm)), _LEAST)


@dataclass(frozen=True)
class EisenstatWalker(ForcingTerm):
    """η = γ (‖g‖ / ‖g₋‖)^α, their second choice: as much tighter as the last step was good.

    At most the cap, which is also the first one, and at least γ η₋^α where that is above 0.1, so
    that one lucky step does not make the next expensive.

    Args:
        gamma: γ.
        power: α, the order of convergence where γ < 1.
        cap: The largest η.

    Raises:
        ValueError: For an argument out of range.

    Source: Eisenstat and Walker, "Choosing the forcing terms in an inexact Newton method" (SIAM
    J. Sci. Comput. 17, 1996), equation 2.6 and the safeguard below it.

    Examples:
        >>> EisenstatWalker().rtol(1.0)
        0.5
        >>> EisenstatWalker().rtol(0.5, last_norm=1.0, last_rtol=0.1)
        0.225
    """

    gamma: float = 0.9
    power: float = 2.0
    cap: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"EisenstatWalker needs 0 < gamma ≤ 1, got {self.gamma}.")
        if not 1 < self.power <= 2:
            raise ValueError(f"EisenstatWalker needs 1 < power ≤ 2, got {self.power}.")
        _check_cap(self)

    def rtol(
        self, grad_norm: float, last_norm: float | None = None, last_rtol: float | None = None
    ) -> float:
        """γ (‖g‖ / ‖g₋‖)^α, safeguarded."""
        if not last_norm or last_rtol is None:
            return self.cap
        term = self.gamma * (grad_norm / last_norm) ** self.power
        safeguard = self.gamma * last_rtol**self.power
        if safeguard > 0.1:
            term = max(term, safeguard)
        return max(min(self.cap, term), _LEAST)


def _check_cap(term: SquareRoot | EisenstatWalker) -> None:
    if not 0 < term.cap < 1:
        raise ValueError(f"{type(term).__name__} needs 0 < cap < 1, got {term.cap}.")


@dataclass(frozen=True)
class FirstOf:
    """Stops when the first of several rules says so.

    Examples:
        >>> rule = FirstOf((ResidualNorm(rtol=0.1), RelativeProgress()))
        >>> rule(Progress(1, residual_norm=0.01, rhs_norm=1.0, model_values=(0.0, -1.0))).name
        'CONVERGED'
    """

    rules: tuple[StoppingRule, ...]

    def __call__(self, progress: Progress) -> Status | None:
        """The first rule's status that is not None."""
        return next((s for rule in self.rules if (s := rule(progress)) is not None), None)
