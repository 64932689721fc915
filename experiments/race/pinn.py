"""Physics-informed networks: convection, reaction and wave equation.

Equations, coefficients, domains, loss and sampling are those of Rathore, Lei, Frangella, Lu and
Udell, "Challenges in Training PINNs: A Loss Landscape Perspective" (ICML 2024, arXiv:2402.01868),
section 2 and appendix A. The loss is a sum of means of squares: of the equation's residual inside
the domain, of the initial and of the boundary conditions.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problem import Evaluation, Problem, Task, seeded

Field = Callable[[Tensor, Tensor], Tensor]
"""u(x, t), elementwise on columns ``[N, 1]`` of places and times."""


def derivative(u: Tensor, of: Tensor) -> Tensor:
    """∂u/∂x in each row, differentiable again."""
    if not u.requires_grad:  # no function of x
        return torch.zeros_like(of)
    (result,) = torch.autograd.grad(u.sum(), of, create_graph=True, allow_unused=True)
    return torch.zeros_like(of) if result is None else result


class Equation(ABC):
    """A differential equation in 0 < t < 1 with its conditions and its solution."""

    end: ClassVar[float]
    """x goes from 0 to here."""

    @abstractmethod
    def solution(self, x: Tensor, t: Tensor) -> Tensor:
        """The solution in closed form."""

    @abstractmethod
    def residual(self, u: Field, x: Tensor, t: Tensor) -> Tensor:
        """What the equation says is zero, at places and times that require gradients."""

    def conditions(self, u: Field, x: Tensor, t: Tensor) -> list[Tensor]:
        """What the conditions say is zero, at the places x for t = 0 and at the times t on the
        boundary. Here: the initial values, and periodicity in x."""
        start = torch.zeros_like(x)
        left, right = torch.zeros_like(t), torch.full_like(t, self.end)
        return [u(x, start) - self.solution(x, start), u(left, t) - u(right, t)]


class Convection(Equation):
    """u_t + β u_x = 0 with u(x, 0) = sin x, periodic, β = 40."""

    end = 2 * math.pi
    beta = 40.0

    def solution(self, x: Tensor, t: Tensor) -> Tensor:
        """The wave sin(x − βt)."""
        return torch.sin(x - self.beta * t)

    def residual(self, u: Field, x: Tensor, t: Tensor) -> Tensor:
        """u_t + β u_x."""
        value = u(x, t)
        return derivative(value, t) + self.beta * derivative(value, x)


class Reaction(Equation):
    """u_t = ρ u (1 − u), with a Gaussian of variance (π/4)² at t = 0, periodic, ρ = 5."""

    end = 2 * math.pi
    rho = 5.0

    def solution(self, x: Tensor, t: Tensor) -> Tensor:
        """The logistic curve through the initial value."""
        start = torch.exp(-0.5 * ((x - math.pi) / (math.pi / 4)) ** 2)
        grown = start * torch.exp(self.rho * t)
        return grown / (grown + 1 - start)

    def residual(self, u: Field, x: Tensor, t: Tensor) -> Tensor:
        """u_t − ρ u (1 − u)."""
        value = u(x, t)
        return derivative(value, t) - self.rho * value * (1 - value)


class Wave(Equation):
    """u_tt = 4 u_xx with u(x, 0) = sin πx + ½ sin βπx, at rest at t = 0, u = 0 on the boundary,
    β = 5."""

    end = 1.0
    beta = 5.0

    def solution(self, x: Tensor, t: Tensor) -> Tensor:
        """Two standing waves."""
        slow = torch.sin(math.pi * x) * torch.cos(2 * math.pi * t)
        fast = torch.sin(self.beta * math.pi * x) * torch.cos(2 * self.beta * math.pi * t)
        return slow + 0.5 * fast

    def residual(self, u: Field, x: Tensor, t: Tensor) -> Tensor:
        """u_tt − 4 u_xx."""
        value = u(x, t)
        u_xx = derivative(derivative(value, x), x)
        return derivative(derivative(value, t), t) - 4 * u_xx

    def conditions(self, u: Field, x: Tensor, t: Tensor) -> list[Tensor]:
        """The initial values, the initial velocity, and both ends."""
        start = torch.zeros_like(x).requires_grad_()
        value = u(x, start)
        left, right = torch.zeros_like(t), torch.full_like(t, self.end)
        return [
            value - self.solution(x, start.detach()),
            derivative(value, start),
            u(left, t),
            u(right, t),
        ]


EQUATIONS: dict[str, type[Equation]] = {
    "convection": Convection,
    "reaction": Reaction,
    "wave": Wave,
}


@dataclass(frozen=True, kw_only=True)
class Pinn(Task):
    """A tanh network of three hidden layers that solves an equation; metric: the relative L2 error
    against the solution in closed form, on a grid over the whole domain.

    Args:
        equation: which.
        paper_size: the paper's sizes (200 units a layer, 10,000 points, 257 and 101 on initial
            line and boundary) instead of those for a small processor (50, 1,000, 65 and 26).
        dtype: of weights and points; the paper's is "float32".
    """

    metric_name: ClassVar[str] = "relative L2 error"
    is_metric_logarithmic: ClassVar[bool] = True

    equation: Literal["convection", "reaction", "wave"] = "convection"
    paper_size: bool = False
    dtype: Literal["float32", "float64"] = "float32"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Units a layer, points inside, on the initial line, on the boundary."""
        return (200, 10_000, 257, 101) if self.paper_size else (50, 1_000, 65, 26)

    def build(self, seed: int, device: torch.device) -> "PinnProblem":
        """Points and initial weights (Glorot's normal, biases zero) of the seed."""
        return PinnProblem(EQUATIONS[self.equation](), self.sizes, seed, self.dtype, device)

    def describe(self) -> str:
        """The task in a sentence."""
        width, inside, initial, boundary = self.sizes
        return (
            f"{self.equation} equation, tanh network 2-{width}-{width}-{width}-1, {inside:,} "
            f"points inside, {initial} on the initial line, {boundary} on the boundary, "
            f"{self.dtype}"
        )


class PinnProblem(Problem):
    """An equation, a network and the points at which it is trained."""

    def __init__(
        self,
        equation: Equation,
        sizes: tuple[int, int, int, int],
        seed: int,
        dtype: str,
        device: torch.device,
    ) -> None:
        width, inside, initial, boundary = sizes
        kind = {"device": device, "dtype": getattr(torch, dtype)}
        self.equation = equation
        with seeded(seed):
            self.module = _network(width).to(**kind)
        # as in the paper: a random part of a grid's inner points
        xs, ts = torch.linspace(0, equation.end, 257)[1:-1], torch.linspace(0, 1, 101)[1:]
        grid = torch.cartesian_prod(xs, ts)
        generator = torch.Generator().manual_seed(seed)
        chosen = grid[torch.randperm(len(grid), generator=generator)[:inside]].to(**kind)
        self._x, self._t = chosen[:, :1], chosen[:, 1:]
        self._initial = torch.linspace(0, equation.end, initial)[:, None].to(**kind)
        self._boundary = torch.linspace(0, 1, boundary)[:, None].to(**kind)
        test = torch.cartesian_prod(torch.linspace(0, equation.end, 129), torch.linspace(0, 1, 51))
        self._test = test[:, :1].to(**kind), test[:, 1:].to(**kind)

    def u(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's solution."""
        return self.module(torch.cat((x, t), 1))

    def loss_of(self, u: Field) -> Tensor:
        """The loss of any function in the network's place."""
        x, t = self._x.clone().requires_grad_(), self._t.clone().requires_grad_()
        parts = [
            self.equation.residual(u, x, t),
            *self.equation.conditions(u, self._initial, self._boundary),
        ]
        losses = [F.mse_loss(part, torch.zeros_like(part)) for part in parts]
        return torch.stack(losses).sum()

    def loss(self) -> Tensor:
        """The sum of the means of squares."""
        return self.loss_of(self.u)

    @torch.no_grad()
    def error_of(self, u: Field) -> float:
        """‖u − solution‖ / ‖solution‖ over the test grid."""
        solution = self.equation.solution(*self._test)
        return float((u(*self._test) - solution).norm() / solution.norm())

    def evaluate(self) -> Evaluation:
        """Loss, and relative L2 error."""
        with torch.enable_grad():
            loss = self.loss()
        return Evaluation(loss.item(), self.error_of(self.u))


def _network(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise((2, width, width, width, 1)):
        linear = nn.Linear(num_in, num_out)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])
