"""Ways to a Jacobian, networks of which to take it, and how matrices are compared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import AttentionBlock, Sequences, normal, output_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

ROWS = ["vjp_loop", "vjp_vmap", "jacrev"]
COLUMNS = ["dual_loop", "jvp_loop", "jacfwd"]
SIX = [*ROWS, *COLUMNS]
HESSIANS = ["forward_over_reverse", "reverse_over_reverse", "hvp_loop"]

every_way = pytest.mark.parametrize("mode", [*SIX, "auto"])
every_hessian = pytest.mark.parametrize("mode", [*HESSIANS, "auto"])

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(3, 2, 2), nn.GroupNorm(1, 2), nn.SiLU(), nn.Flatten(), nn.Linear(6, 2)
    ),
    "batch norm": lambda: nn.Sequential(nn.Conv1d(3, 2, 2), nn.BatchNorm1d(2), nn.Softplus()),
    "attention": lambda: AttentionBlock(4),
    "lstm": lambda: Sequences(4),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network by name, the same at every call, and an input."""
    torch.manual_seed(0)
    return NETWORKS[name]().double(), normal(3, 3, 4, seed=5)


def output_at(net: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """The network's output as a function of its parameters."""
    output = output_of(net)
    return lambda params: output(params, x)


def matrix(blocks: Any, rows: int) -> Tensor:
    """A tree of blocks of one output as a matrix."""
    return torch.cat([b.reshape(rows, -1) for b in pytree.tree_leaves(blocks)], 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def close_trees(found: Any, expected: Any) -> None:
    """Lets pass what has the same structure, shapes and values."""
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert a.shape == b.shape
        close(a, b)
