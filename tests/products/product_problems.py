"""Networks as functions of their parameters, and what the tests of several products share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import (
    AttentionBlock,
    Sequences,
    Tree,
    combined,
    dense_hessian,
    joined,
    normal,
    normal_like,
    output_of,
    params_of,
)
from torch import Tensor, nn

from hvpopt.products import hvp, linearize

EXACT = ["auto", "forward_over_reverse", "reverse_over_forward", "reverse_over_reverse"]
MODES = [*EXACT, "finite_difference"]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
    "silu": lambda: nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3)),
    "mish": lambda: nn.Sequential(nn.Linear(6, 4), nn.Mish(), nn.Linear(4, 3)),
    "layer norm": lambda: nn.LayerNorm(6),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "group norm": lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4), nn.Softplus()),
    "batch norm": lambda: nn.Sequential(
        nn.Conv1d(4, 2, 3), nn.BatchNorm1d(2), nn.Tanh(), nn.Conv1d(2, 2, 2)
    ),
    "attention": lambda: AttentionBlock(6),
    "lstm": lambda: Sequences(6),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network by name, the same at every call, and an input."""
    torch.manual_seed(0)
    return NETWORKS[name]().double(), normal(3, 4, 6, seed=5)


def problem(name: str) -> tuple[Callable[[Tree, Tensor], Tensor], dict[str, Tensor], Tensor]:
    """(f, params, x): a network's mean squared output as a function of its parameters."""
    net, x = network(name)
    output = output_of(net)

    def f(p: Tree, x: Tensor) -> Tensor:
        return (output(p, x) + 1).square().mean()

    return f, params_of(net), x


def exact_hvp(name: str, v: Tree) -> Tensor:
    """The dense Hessian of a problem times v."""
    f, params, x = problem(name)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return dense_hessian(lambda p: f(p, x), params) @ joined(v)


def linearized_hvp(f: Callable[..., Tensor], params: Tree, v: Tree, *args: Any) -> Tree:
    return linearize(f, params, *args).hvp(v)


both_hvps = pytest.mark.parametrize("product", [hvp, linearized_hvp])


def stacked(params: Tree, k: int = 3) -> Tree:
    """So many directions."""
    return combined(lambda p: torch.stack([normal_like(p, seed=s) for s in range(k)]), params)


def each(tree: Tree, i: int) -> Tree:
    return combined(lambda t: t[i], tree)
