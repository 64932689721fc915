"""The gradient of the minimiser itself, by the implicit function theorem.

At a stationary point G(u; x, θ) = ∂F/∂u = 0, so that du = −H⁻¹ ∂G/∂(x, θ), and the pullback of ū is

    H v = ū,   x̄, θ̄ = −(∂G/∂(x, θ))ᵀ v,

on the free directions, where bounds are active. It does not see how the point was found, and so it
is another gradient than that of the steps wherever these have not arrived.
"""

import logging
import warnings
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hvpopt.nested.adjoints.base import Adjoint, AdjointReport, Gradients, Sums, attached
from hvpopt.nested.book import Descent
from hvpopt.nested.descent import Run
from hvpopt.nested.energy import Once
from hvpopt.nested.hessian import InnerHessian
from hvpopt.nested.joint import Products, check_products
from hvpopt.nested.status import InferenceStatus
from hvpopt.options import check_count, check_range
from hvpopt.solvers import Status
from hvpopt.solvers.batched import batched_cg, batched_minres

logger = logging.getLogger("hvpopt")

_warned_of_residuals, _noted_curvature = Once(), Once()


@dataclass(frozen=True)
class System:
    """H v = b, for the examples that have a solution."""

    run: Run
    """What was minimised."""
    hessian: InnerHessian
    """H, on rows (k, n)."""
    b: Tensor
    """(k, n)."""
    rows: Tensor | None
    """Which examples, (k,); None for all."""
    report: AdjointReport
    """Where to note what the solution took."""

    def report_on(self, residual_norms: Tensor, steps: Tensor, status: Tensor) -> Tensor:
        """Notes (k,) each; returns the residuals relative to b, those of which are noted."""
        where = slice(None) if self.rows is None else self.rows
        size, b, report = len(self.run.y0), self.b, self.report
        report.residuals = b.new_zeros(size)
        report.steps = torch.zeros(size, dtype=torch.int64, device=b.device)
        report.status = torch.zeros_like(report.steps)
        relative = residual_norms / b.norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)
        report.residuals[where] = relative.to(b.dtype)
        report.steps[where], report.status[where] = steps, status
        return report.residuals[where]


@dataclass(frozen=True)
class AtSolution(Adjoint):
    """What the adjoints share that look at the last iterate alone.

    Args:
        residual_warning: Warns, once for each energy, where an example's residual is above this
            part of what it was at y0; ∞ never warns.
        products: How (Hv, Cv) are computed (`hvpopt.nested.joint`).
    """

    differentiates_steps: ClassVar[bool] = False

    _: KW_ONLY
    residual_warning: float = 1e-3
    products: Products = "reverse_over_reverse"

    def __post_init__(self) -> None:
        if not self.residual_warning > 0:
            raise ValueError(f"residual_warning={self.residual_warning!r}; expected above 0.")
        check_products(self.products)

    def solve(self, run: Run, report: AdjointReport) -> Descent:
        """The descent; its end is all that is kept."""
        descent = run.descend(lambda number: "values")
        self._warn(run, descent)
        lost = descent.status == InferenceStatus.DIVERGED.code
        rows = (~lost).nonzero()[:, 0] if bool(lost.any()) else None

        def pullback(ybar: Tensor, path: Tensor | None) -> Gradients:
            sums = Sums(run)
            with run.problem.again():
                u = descent.state[0] if rows is None else descent.state[0][rows]
                ybar = ybar if rows is None else ybar[rows]
                if len(u):
                    hessian = InnerHessian(run.problem, run.domain, u, rows, products=self.products)
                    if run.domain.is_reparametrised:
                        leaf = u.clone().requires_grad_()
                        (ybar,) = torch.autograd.grad(run.domain.point(leaf), leaf, ybar)
                    b = hessian.project(ybar.flatten(1))
                    v = self.inverse(system := System(run, hessian, b, rows, report))
                    joint = hessian.joint(v)
                    sums.add(joint.Cv, rows, sign=-1.0)
                    report.num_products += hessian.num_products
                    self.look_at(system, v, joint.Hv)
            return sums.gradients(None)

        return attached(run, descent, self.name, pullback)

    @abstractmethod
    def inverse(self, system: System) -> Tensor:
        """v with H v ≈ b, both (k, n)."""

    def look_at(self, system: System, v: Tensor, product: Tensor) -> None:
        """Notes how well v, with H v = ``product``, solves the system."""

    def _warn(self, run: Run, descent: Descent) -> None:
        fine = descent.status != InferenceStatus.DIVERGED.code
        part = (descent.residuals / descent.start_residuals.clamp(min=1e-300))[fine]
        far = part > self.residual_warning
        if bool(far.any()) and _warned_of_residuals(run.problem.energy):
            warnings.warn(
                f"adjoint={self.name!r} differentiates a stationary point, and for "
                f"{int(far.sum())} of {len(far)} examples the inference is not at one (the "
                f"residual is up to {float(part.max()):.2g} of that at y0; see "
                "Inference.residuals): the gradient is not that of the iterates. Take more or "
                "longer steps, NewtonDescent, or adjoint='back_optimization'.",
                UserWarning,
                stacklevel=5,
            )


@dataclass(frozen=True)
class Implicit(AtSolution):
    """The implicit gradient, by conjugate gradients or MINRES for each example.

    Args:
        solver: "cg" where H is positive definite, as at a minimum; "minres" takes any H.
        damping: λ ≥ 0, in the units of the energy's second derivatives: solves (H + λ) v = ū.
        max_steps: The most products for an example.
        rtol: The relative residual of a solution.
        residual_warning: As of `AtSolution`, like ``products``.

    Raises:
        ValueError: For options out of range.
    """

    name: ClassVar[str] = "implicit"

    solver: Literal["cg", "minres"] = "cg"
    damping: float = 0.0
    max_steps: int = 100
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver not in ("cg", "minres"):
            raise ValueError(f"solver={self.solver!r} is unknown: choose 'cg' or 'minres'.")
        check_range("damping", self.damping, 0.0)
        check_count("max_steps", self.max_steps)
        check_range("rtol", self.rtol, 0.0)

    def inverse(self, system: System) -> Tensor:
        """(H + λ)⁻¹ b."""
        hessian, b = system.hessian, system.b
        solve = batched_cg if self.solver == "cg" else batched_minres
        found = solve(
            lambda v, places: hessian(v, places) + self.damping * v if self.damping
            else hessian(v, places),
            b, max_steps=self.max_steps, rtol=self.rtol,
        )  # fmt: skip
        system.report_on(found.residual_norms, found.num_steps, found.status)
        bent = found.count(Status.NEGATIVE_CURVATURE)
        if bent and _noted_curvature(system.run.problem.energy):
            logger.warning(
                "The energy's Hessian is not positive definite for %d of %d examples, whose "
                "implicit gradient is what CG had found until then: choose solver='minres', a "
                "larger damping, or more steps of the inference.",
                bent,
                len(b),
            )
        return found.value
