"""Newton's method on y, its systems solved by conjugate gradients."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hvpopt.nested.domains import Domain, Simplex
from hvpopt.nested.hessian import InnerHessian
from hvpopt.nested.joint import Tape
from hvpopt.nested.line_search import Backtracking
from hvpopt.nested.methods import Method, State
from hvpopt.nested.problem import InnerProblem
from hvpopt.nested.rows import less
from hvpopt.options import check_count, check_range
from hvpopt.solvers.batched import batched_cg


@dataclass(frozen=True)
class NewtonDescent(Method):
    """Newton-CG: u ← P(u − α d) with (P ∂²F/∂u² P + λ) d ≈ P ∂F/∂u, P on the free directions.

    Each example has its own conjugate gradients, which stop at a relative residual of
    min(cg_rtol, √‖P ∂F/∂u‖), or with what they have where they meet negative curvature (the
    gradient, where that is at once).

    Args:
        num_steps: The most steps.
        damping: λ ≥ 0, in the units of the energy's second derivatives.
        rtol: An example stops where ‖y⁺ − y‖ ≤ rtol ‖y⁺‖; 0 never.
        gtol: An example stops where its residual is at most this; 0 never.
        cg_steps: The most products for one step.
        cg_rtol: The loosest relative residual.
        line_search: Shortens each example's step, from α = 1.

    Raises:
        ValueError: For options out of range.

    Source: Nocedal and Wright, Numerical Optimization (2006), algorithm 7.1; with bounds,
    Bertsekas (SIAM J. Control Optim. 20, 1982).
    """

    step_size: ClassVar[float] = 1.0  # type: ignore[misc]
    num_steps: int = 20
    _: KW_ONLY
    damping: float = 0.0
    cg_steps: int = 50
    cg_rtol: float = 0.1
    line_search: Backtracking | None = Backtracking()  # noqa: RUF009 (frozen)

    is_second_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("damping", self.damping, 0.0)
        check_count("cg_steps", self.cg_steps)
        check_range("cg_rtol", self.cg_rtol, 0.0)

    def check(self, domain: Domain, batch_size: int) -> None:
        """Lets all domains but the simplex pass, from whose faces this method would not return."""
        super().check(domain, batch_size)
        if isinstance(domain, Simplex):
            raise ValueError("NewtonDescent does not go with Simplex(): choose SoftmaxLogits().")

    def direction(
        self, problem: InnerProblem, domain: Domain, u: Tensor, rows: Tensor | None, tape: Tape
    ) -> Tensor:
        """d, (k, *shape)."""
        hessian = InnerHessian(
            problem, domain, u, rows, tape=tape, drops_curved_map=domain.is_reparametrised
        )
        norms = hessian.grad.norm(dim=1)
        solution = batched_cg(
            lambda v, places: hessian(v, places) + self.damping * v,
            hessian.grad,
            max_steps=self.cg_steps,
            rtol=norms.sqrt().clamp(max=self.cg_rtol),
        )
        went = (solution.num_steps > 0).unsqueeze(1)
        return torch.where(went, solution.value, hessian.grad).view_as(u)

    def advance(
        self, domain: Domain, state: State, y: Tensor, g: Tensor, alpha: float | Tensor
    ) -> State:
        """P(u − α d), where d stands in the place of the gradient by y."""
        (u,) = state
        return (domain.project(less(u, alpha, g)),)
