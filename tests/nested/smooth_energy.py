"""A small smooth energy, and dense oracles of its minimiser's derivatives."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

NUM_LABELS, NUM_FEATURES = 5, 4


class SmoothEnergy(nn.Module):
    """A local term, softplus units on y, and a quadratic, which makes it strictly convex."""

    def __init__(self, curvature: float = 1.0) -> None:
        super().__init__()
        self.local = nn.Linear(NUM_FEATURES, NUM_LABELS, dtype=torch.float64)
        self.units = nn.Linear(NUM_LABELS, 3, dtype=torch.float64)
        self.weight = nn.Parameter(torch.tensor([0.7, 0.3, 0.9], dtype=torch.float64))
        self.curvature = curvature

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        units = F.softplus(self.units(y)) @ self.weight
        return (y * self.local(x)).sum(1) + units + 0.5 * self.curvature * (y * y).sum(1)


def problem(batch: int = 6, seed: int = 0) -> tuple[SmoothEnergy, Tensor, Tensor]:
    """An energy, x that requires a gradient, and targets for y."""
    torch.manual_seed(seed)
    energy = SmoothEnergy()
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, NUM_FEATURES, generator=generator, dtype=torch.float64)
    target = torch.rand(batch, NUM_LABELS, generator=generator, dtype=torch.float64)
    return energy, x.requires_grad_(), target


def few_parameters(energy: SmoothEnergy) -> SmoothEnergy:
    """The energy with its matrices frozen, for forward mode."""
    energy.local.requires_grad_(False)
    energy.units.weight.requires_grad_(False)
    return energy


def gradients(energy: nn.Module, *tensors: Tensor) -> list[Tensor]:
    """What backward has left, zeros where nothing; and clears it."""
    of = [*energy.parameters(), *tensors]
    found = [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in of]
    for t in of:
        t.grad = None
    return found


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a tensor, relative to its largest entry."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip(found, expected, strict=True)
    )


def flat_energy(energy: nn.Module):
    """E as a function of one example's y, x and one flat vector of parameters, and that vector."""
    named = dict(energy.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def value(y: Tensor, x: Tensor, theta: Tensor) -> Tensor:
        parts = theta.split(sizes)
        values = {n: q.view_as(p) for (n, p), q in zip(named.items(), parts, strict=True)}
        return functional_call(energy, values, (x[None], y[None]))[0]

    return value, torch.cat([p.detach().reshape(-1) for p in named.values()])


def dense_derivatives(energy: nn.Module, x: Tensor, y: Tensor):
    """For each example ∂²E/∂y², ∂²E/∂y∂x and ∂²E/∂y∂θ, by torch.func on single examples."""
    value, theta = flat_energy(energy)
    rows = []
    for xi, yi in zip(x.detach(), y.detach(), strict=True):
        slope = torch.func.grad(value)
        rows.append([torch.func.jacrev(slope, argnums=i)(yi, xi, theta) for i in range(3)])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def flattened(energy: nn.Module, grads: list[Tensor]) -> Tensor:
    """The parameters' part of `gradients`, flat."""
    count = len(list(energy.parameters()))
    return torch.cat([g.reshape(-1) for g in grads[:count]])
