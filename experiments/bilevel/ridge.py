"""A ridge penalty for each feature, learned on validation data, beside closed forms.

    w*(λ) = argmin_w ½‖X w − y‖² + ½ Σⱼ exp(λⱼ) wⱼ²,   ℓ(λ) = ½‖X_v w* − y_v‖² / n_v.

Only some features matter. A single penalty shrinks them all alike; penalties of their own remove
those that do not matter. w* and dℓ/dλ have closed forms, which judge what hvpopt finds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.minimization import minimize
from hvpopt.nested.adjoints import Implicit
from hvpopt.nested.hypergradients import hypergradient


@dataclass(frozen=True)
class Regression:
    """Linear data with noise of variance one, in float64."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    weights: Tensor
    """Of the features, zero for those that do not matter."""

    @classmethod
    def drawn(
        cls, seed: int, *, features: int = 60, relevant: int = 10, rows: int = 80
    ) -> "Regression":
        """``rows`` for training and as many for validation."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weights = torch.cat([normal(relevant), torch.zeros(features - relevant).double()])

        def part() -> tuple[Tensor, Tensor]:
            x = normal(rows, features)
            return x, x @ weights + normal(rows)

        return cls(train=part(), validation=part(), weights=weights)

    def inner_loss(self, w: Tensor, penalties: Tensor) -> Tensor:
        """½‖X w − y‖² + ½ Σⱼ exp(λⱼ) wⱼ²."""
        x, y = self.train
        return 0.5 * ((x @ w - y) ** 2).sum() + 0.5 * (penalties.exp() * w**2).sum()

    def outer_loss(self, w: Tensor, penalties: Tensor) -> Tensor:
        """½‖X_v w − y_v‖² / n_v."""
        x, y = self.validation
        return 0.5 * ((x @ w - y) ** 2).mean()

    def solution(self, penalties: Tensor) -> Tensor:
        """w*(λ) in closed form."""
        x, y = self.train
        return torch.linalg.solve(x.T @ x + torch.diag(penalties.exp()), x.T @ y)

    def closed_form(self, penalties: Tensor) -> Tensor:
        """dℓ/dλⱼ = −exp(λⱼ) wⱼ vⱼ with (XᵀX + diag exp λ) v = ∂ℓ/∂w."""
        (x, _), (xv, yv) = self.train, self.validation
        w = self.solution(penalties)
        slope = xv.T @ (xv @ w - yv) / len(yv)
        return (
            -penalties.exp() * w * torch.linalg.solve(x.T @ x + torch.diag(penalties.exp()), slope)
        )

    def excess(self, w: Tensor) -> float:
        """The expected squared error of a prediction beyond the noise's, ‖w − weights‖²."""
        return float(((w - self.weights) ** 2).sum())


@dataclass(frozen=True)
class Outcome:
    """Excess errors of one draw, and what the hypergradients were like."""

    least_squares: float
    """Without penalties."""
    shared: float
    """With one penalty for all, the best on the validation data of a fine grid, in closed form."""
    learned: float
    """With a penalty for each feature, learned."""
    oracle: float
    """Least squares on the features that matter."""
    error: float
    """Largest ‖hypergradient − closed form‖ / ‖closed form‖ on the way."""


def learn(problem: Regression, *, num_steps: int = 60, lr: float = 0.3) -> tuple[Tensor, Outcome]:
    """The penalties that Adam finds in so many steps from 1 = exp 0, and how they do."""
    penalties = torch.zeros_like(problem.weights)
    optimizer = torch.optim.Adam([penalties], lr=lr)
    w, start = torch.zeros_like(problem.weights), None
    errors = []
    for _ in range(num_steps):
        w = minimize(problem.inner_loss, w, args=(penalties,), method="newton-cg", gtol=1e-9).x
        found = hypergradient(
            problem.inner_loss,
            problem.outer_loss,
            w,
            penalties,
            adjoint=Implicit(rtol=1e-8),
            start=start,
        )
        exact = problem.closed_form(penalties)
        errors.append(float((found.value - exact).norm() / exact.norm()))
        start = found.adjoint
        penalties.grad = found.value
        optimizer.step()
    x, y = problem.train
    matters = problem.weights != 0
    alone = torch.zeros_like(w)
    alone[matters] = torch.linalg.lstsq(x[:, matters], y).solution
    return penalties, Outcome(
        least_squares=problem.excess(torch.linalg.lstsq(x, y).solution),
        shared=problem.excess(_shared(problem)),
        learned=problem.excess(problem.solution(penalties)),
        oracle=problem.excess(alone),
        error=max(errors),
    )


def _shared(problem: Regression) -> Tensor:
    """The solution with the single penalty that is best on the validation data."""
    grid = torch.linspace(-6, 6, 121, dtype=torch.float64)
    solutions = [problem.solution(p.expand_as(problem.weights)) for p in grid]
    return min(solutions, key=lambda w: float(problem.outer_loss(w, grid)))
