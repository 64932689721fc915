"""The ways to the gradient through an inner minimisation that `adjoints` measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpopt import nested

STEP_SIZE = 0.1
PLAIN = "plain create_graph unroll"
UNROLLED = "hvpopt Unrolled"
BACK = "hvpopt BackOptimization"
BACK_8 = "hvpopt BackOptimization, 8 tapes"
FORWARD = "hvpopt ForwardMode, 2 parameters"
ADJOINTS: dict[str, Any] = {
    UNROLLED: nested.Unrolled(),
    "hvpopt Checkpointed": nested.Checkpointed(),
    BACK: nested.BackOptimization(),
    BACK_8: nested.BackOptimization(num_tapes=8),
    "hvpopt Truncated, 5 steps": nested.Truncated(num_steps=5),
    "hvpopt Implicit, CG": nested.Implicit(max_steps=20, residual_warning=float("inf")),
    "hvpopt Implicit, MINRES": nested.Implicit(
        solver="minres", max_steps=20, residual_warning=float("inf")
    ),
    "hvpopt Neumann, 20 terms": nested.Neumann(num_terms=20, residual_warning=float("inf")),
    FORWARD: nested.ForwardMode(),
}
EXACT = (UNROLLED, "hvpopt Checkpointed", BACK, BACK_8, "torchopt unroll")
"""Those that compute what the plain unroll does."""


class Network(nn.Module):
    """E(x, y) = s₁ cᵀ g(W₂ g(W₁ [x; y])) + ½ s₂ ‖y‖², one number a row."""

    def __init__(self, labels: int, features: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(labels + features, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 1, bias=False)
        self.scales = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Energies (batch,)."""
        hidden = F.softplus(self.first(torch.cat([x, y], dim=1)))
        network = self.last(F.softplus(self.second(hidden))).squeeze(1)
        return self.scales[0] * network + 0.5 * self.scales[1] * (y**2).sum(1)


@dataclass(frozen=True)
class Problem:
    """An energy, a batch, and the loss of the y that minimises the one on the other."""

    width: int
    energy: Network
    x: Tensor
    start: Tensor
    target: Tensor

    @classmethod
    def drawn(cls, width: int, device: torch.device, *, batch: int, labels: int) -> "Problem":
        """Random weights and data of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            energy = Network(labels, labels, width)
            x, target = torch.randn(batch, labels), torch.rand(batch, labels)
        return cls(
            width,
            energy.to(device),
            x.to(device),
            torch.zeros_like(target, device=device),
            target.to(device),
        )

    def loss(self, y: Tensor) -> Tensor:
        """Mean squared distance to the targets."""
        return F.mse_loss(y, self.target)

    def gradient(self, y: Tensor, *, by: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The loss's gradient by the energy's parameters, through y."""
        by = list(self.energy.parameters()) if by is None else by
        grads = torch.autograd.grad(self.loss(y), by, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, by, strict=True)]


Way = Callable[[], list[Tensor]]


def plain(problem: Problem, num_steps: int) -> list[Tensor]:
    """By one graph through all steps, written out."""
    y = problem.start.clone().requires_grad_()
    for _ in range(num_steps):
        energy = problem.energy(problem.x, y).sum()
        y = y - STEP_SIZE * torch.autograd.grad(energy, y, create_graph=True)[0]
    return problem.gradient(y)


def ours(problem: Problem, num_steps: int, adjoint: Any) -> list[Tensor]:
    """By `minimize_energy`."""
    method = nested.GradientDescent(STEP_SIZE, num_steps)
    by = list(problem.energy.parameters())
    if isinstance(adjoint, nested.ForwardMode):
        by = [problem.energy.scales]
    frozen = [p for p in problem.energy.parameters() if all(p is not q for q in by)]
    for p in frozen:
        p.requires_grad_(False)
    try:
        found = nested.minimize_energy(
            problem.energy, problem.x, problem.start, method=method, adjoint=adjoint
        )
        return problem.gradient(found.y, by=by)
    finally:
        for p in frozen:
            p.requires_grad_()


def torchopts_unroll(problem: Problem, num_steps: int) -> list[Tensor]:
    """By torchopt's differentiable SGD."""
    import torchopt

    optimizer = torchopt.sgd(lr=STEP_SIZE)
    y: tuple[Tensor, ...] = (problem.start.clone().requires_grad_(),)
    state = optimizer.init(y)
    for _ in range(num_steps):
        energy = problem.energy(problem.x, *y).sum()
        grads = torch.autograd.grad(energy, y, create_graph=True)
        updates, state = optimizer.update(grads, state, params=y, inplace=False)
        y = torchopt.apply_updates(y, updates, inplace=False)
    return problem.gradient(y[0])


def torchopts_implicit(problem: Problem, num_steps: int) -> list[Tensor]:
    """By torchopt's implicit function with conjugate gradients, 20 steps as ours."""
    import torchopt

    names = [name for name, _ in problem.energy.named_parameters()]

    def total(y: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
        weights = dict(zip(names, theta, strict=True))
        return torch.func.functional_call(problem.energy, weights, (problem.x, y)).sum()

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(total), argnums=1, solve=torchopt.linear_solve.solve_cg(maxiter=20)
    )
    def solve(y: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
        for _ in range(num_steps):
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                (g,) = torch.autograd.grad(total(y, theta), y)
            y = y - STEP_SIZE * g
        return y.detach()

    return problem.gradient(solve(problem.start, tuple(problem.energy.parameters())))


PEERS: dict[str, Callable[[Problem, int], list[Tensor]]] = {
    "torchopt unroll": torchopts_unroll,
    "torchopt implicit, CG": torchopts_implicit,
}


def ways(problem: Problem, num_steps: int, *, peers: bool) -> dict[str, Way]:
    """Every way, by name; the plain one first."""
    found: dict[str, Way] = {PLAIN: partial(plain, problem, num_steps)}
    for name, adjoint in ADJOINTS.items():
        found[name] = partial(ours, problem, num_steps, adjoint)
    if peers:
        for name, peer in PEERS.items():
            found[name] = partial(peer, problem, num_steps)
    return found
