"""The gradient of the minimiser itself, its linear system solved by a Neumann series."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hvpopt.nested.adjoints.implicit import AtSolution, System
from hvpopt.nested.energy import Once
from hvpopt.nested.methods import Method
from hvpopt.nested.rows import per_row
from hvpopt.options import check_count, check_range
from hvpopt.solvers import Status
from hvpopt.solvers.batched import STATUSES

_warned_of_series = Once()


@dataclass(frozen=True)
class Neumann(AtSolution):
    """The implicit gradient with H⁻¹ ≈ α Σ_{k<K} (I − α H)ᵏ, which is right for a contraction.

    At a fixed point of gradient descent with step α it is its K last steps backwards. What K terms
    leave of ū, ‖ū − H v‖ / ‖ū‖, is in the report's residuals; where it is above
    ``residual_warning``, the backward pass warns, once for each energy.

    Args:
        num_terms: K.
        step_size: α > 0; None for the method's. The series converges where α times the largest
            eigenvalue of H is below 2.
        residual_warning: As of `AtSolution`, like ``products``.

    Raises:
        ValueError: For options out of range.

    Source: Lorraine, Vicol and Duvenaud (AISTATS 2020).
    """

    name: ClassVar[str] = "neumann"

    num_terms: int = 20
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_terms", self.num_terms)
        if self.step_size is not None and not check_range("step_size", self.step_size, 0.0) > 0:
            raise ValueError("step_size=0 sums to nothing; expected a number above 0.")

    def check(self, method: Method, *, keep_iterates: bool) -> None:
        """Asks for a step size of one's own where the method's is none or changes."""
        super().check(method, keep_iterates=keep_iterates)
        size = method.step_size
        if self.step_size is None and (
            method.is_second_order or (isinstance(size, Tensor) and size.dim() == 2)
        ):
            raise ValueError(
                f"Neumann finds no step size in {type(method).__name__} that holds for all steps: "
                "give it one, below 2 over the largest eigenvalue of the energy's Hessian."
            )

    def inverse(self, system: System) -> Tensor:
        """α Σ_{k<K} (I − α H)ᵏ b."""
        alpha: float | Tensor
        if self.step_size is not None:
            alpha = self.step_size
        else:
            lengths = system.run.lengths(0, system.rows, None)
            lengths = lengths.detach() if isinstance(lengths, Tensor) else lengths
            alpha = per_row(lengths, system.b)
        term, total = system.b, system.b
        for _ in range(self.num_terms - 1):
            term = term - alpha * system.hessian(term)
            total = total + term
        return alpha * total

    def look_at(self, system: System, v: Tensor, product: Tensor) -> None:
        """Notes what the series leaves of b, and warns where that is much."""
        rest = (system.b - product).norm(dim=1)
        terms = torch.full_like(rest, self.num_terms, dtype=torch.int64)
        limit = torch.full_like(terms, STATUSES.index(Status.STEP_LIMIT))
        fine = torch.isfinite(rest)
        left = system.report_on(rest, terms, limit.where(fine, STATUSES.index(Status.BREAKDOWN)))
        far = ~(left <= self.residual_warning)  # NaN, too
        if not bool(far.any()) or not _warned_of_series(system.run.problem.energy):
            return
        largest = float(left.nan_to_num(nan=torch.inf).max())
        if largest > 1:
            todo = "the series grows: give Neumann a step_size below 2 / λ_max of the energy's H"
        else:
            todo = "take more num_terms, a longer step_size, or adjoint='implicit'"
        warnings.warn(
            f"adjoint='neumann' stops after {self.num_terms} terms with up to {largest:.2g} of the "
            f"cotangent left, above residual_warning={self.residual_warning:g} for "
            f"{int(far.sum())} of {len(far)} examples (Inference.report.residuals): the gradient "
            f"is not yet that of the minimiser; {todo}.",
            UserWarning,
            stacklevel=2,
        )
