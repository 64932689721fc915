"""Dense Fisher matrices as sums of outer products over enumerated labels."""

import itertools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from problems import Problem
from torch import Tensor

Block = tuple[float, Tensor, Iterable[tuple[float, Tensor]]]


def outputs(task: Problem) -> tuple[Tensor, Tensor]:
    """The network's output and its dense Jacobian, one row an entry of z."""
    output, theta = task._flat()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(output, theta)
    return output(theta).detach(), jacobian.reshape(-1, theta.numel())


def dense(jacobian: Tensor, blocks: Iterable[Block]) -> Tensor:
    """Σ weight Σ chance (Jᵀu)(Jᵀu)ᵀ over blocks (weight, entries of z, [(chance, u)])."""
    total = jacobian.new_zeros(jacobian.shape[1], jacobian.shape[1])
    for weight, rows, labels in blocks:
        for chance, u in labels:
            g = jacobian[rows].T @ u
            total += weight * chance * torch.outer(g, g)
    return total


def slope(nll: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.func.grad(nll)(z)


def classes(z: Tensor) -> list[tuple[float, Tensor]]:
    """Every class of one row of logits with its probability and the gradient of its loss."""
    p = z.softmax(0)
    labels = range(len(z))
    return [(float(p[k]), slope(lambda s, k=k: -F.log_softmax(s, 0)[k], z)) for k in labels]


def bits(z: Tensor) -> list[tuple[float, Tensor]]:
    """Every binary vector with its probability and the gradient of its loss."""
    pairs = []
    for label in itertools.product((0.0, 1.0), repeat=len(z)):
        y = z.new_tensor(label)

        def nll(s: Tensor, y: Tensor = y) -> Tensor:
            return F.binary_cross_entropy_with_logits(s, y, reduction="sum")

        pairs.append((math.exp(-float(nll(z))), slope(nll, z)))
    return pairs


def rows(z: Tensor) -> Tensor:
    """The positions of z's entries in a row of the Jacobian, one row an example."""
    return torch.arange(z.numel()).reshape(len(z), -1)
