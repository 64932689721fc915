"""Functions of pytrees of parameters: small networks with awkward parts, and dense derivatives."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

Tree = Any


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def normal_like(tree: Tree, seed: int = 1) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), tree)


def inner(a: Tree, b: Tree) -> float:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return float(sum((x * y).sum() for x, y in pairs))


def combined(f: Callable[..., Tensor], *trees: Tree) -> Tree:
    return pytree.tree_map(f, *trees)


def joined(tree: Tree) -> Tensor:
    """The tree's entries as one vector."""
    return torch.cat([x.reshape(-1) for x in pytree.tree_leaves(tree)])


def on_joined(f: Callable[[Tree], Tensor], tree: Tree) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f as a function of one vector, and the vector."""
    leaves, spec = pytree.tree_flatten(tree)
    sizes = [x.numel() for x in leaves]

    def g(v: Tensor) -> Tensor:
        parts = [p.reshape(x.shape) for p, x in zip(v.split(sizes), leaves, strict=True)]
        return f(pytree.tree_unflatten(parts, spec))

    return g, joined(leaves)


def dense_hessian(f: Callable[[Tree], Tensor], params: Tree) -> Tensor:
    """By reverse mode over reverse mode, on one vector."""
    return torch.autograd.functional.hessian(*on_joined(f, params))


class AttentionBlock(nn.Module):
    """One causal transformer block with its usual fast attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (2, -1))
        q, k, v = heads.transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Sequences(nn.Module):
    """The outputs of a recurrent layer at all steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.LSTM(width, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


def params_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def output_of(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The network's output as a function of its parameters and input; buffers stay as they are."""
    buffers = dict(net.named_buffers())

    def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}
        return functional_call(net, (params, copies), (x,))

    return output
