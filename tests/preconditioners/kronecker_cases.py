"""Refreshed Kronecker factors, and what they are held against."""

import torch
import torch.nn.functional as F
from problems import Problem, flat
from torch import nn

from hvpopt.closure import ClosureOracle
from hvpopt.closure.slopes import sampled_slopes
from hvpopt.preconditioners.base import CurvaturePoint


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point_of(oracle, params, seed=0):
    traced = oracle.trace("ggn")
    return CurvaturePoint(params, traced.grad, traced.product, oracle, seed)


def refreshed(task, kronecker, *, states=None, seed=0):
    """The states after one refresh."""
    states = [{} for _ in task.params] if states is None else states
    with ClosureOracle(task.closure(), task.params) as oracle:
        kronecker.refresh(point_of(oracle, task.params, seed), states)
    return states


def factors(state):
    """R and C of a weight, as matrices."""
    found = [state["kronecker"][side] for side in ("rows", "columns")]
    return [torch.diag_embed(f) if f.dim() == 2 else f for f in found]


def slopes_of(task, seed=0, num_samples=1):
    """The sampled slopes at the outputs, which a refresh with this seed uses."""
    found = []
    with ClosureOracle(task.closure(), task.params) as oracle:
        oracle.trace("ggn")
        sampled_slopes(
            oracle,
            "monte_carlo",
            seed=seed,
            then=lambda z, u: found.append(u[0]),
            num_samples=num_samples,
        )
    return found


def dense_inverse(kronecker, states, params, shift):
    """M⁻¹ as a matrix, from its products with unit vectors."""
    sizes = [p.numel() for p in params]
    columns = []
    for e in torch.eye(sum(sizes), dtype=params[0].dtype):
        parts = [x.view_as(p) for x, p in zip(e.split(sizes), params, strict=True)]
        columns.append(flat(kronecker.solve(parts, states, shift)))
    return torch.stack(columns, 1)


def conv_task(groups=1, bias=True):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 2, stride=2, groups=groups, bias=bias)
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    return Problem(net, randn(5, 2, 4, 4), lambda z: F.cross_entropy(z, torch.arange(5) % 3))


def run_with(task, forward):
    """The closure of a task with another forward pass."""

    def closure():
        task.net.zero_grad()
        loss = task.loss(forward(task.x))
        loss.backward()
        return loss

    return closure
