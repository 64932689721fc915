"""Small networks with awkward parts, their closures, and dense oracles of their curvature."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class Attention(nn.Module):
    """A pre-norm transformer block over a sequence, then a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head((x + self.mlp(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """One weight for reading and writing, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(5, 4)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.read(x)) @ self.read.weight + self.bias


@dataclass
class Problem:
    net: nn.Module
    x: Tensor
    loss: Callable[[Tensor], Tensor]

    @property
    def params(self) -> list[Tensor]:
        return list(self.net.parameters())

    def closure(self) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.net.zero_grad()
            loss = self.loss(self.net(self.x))
            loss.backward()
            return loss

        return closure

    def tangent(self, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for p in self.params
        ]

    def _flat(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        named = dict(self.net.named_parameters())
        sizes = [p.numel() for p in named.values()]

        def output(flat: Tensor) -> Tensor:
            parts = flat.split(sizes)
            values = {n: q.view_as(p) for (n, p), q in zip(named.items(), parts, strict=True)}
            state: dict[str, Any] = dict(values)
            state.update({n: b.clone() for n, b in self.net.named_buffers()})
            # the closure draws its dropout masks from the same state
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return functional_call(self.net, state, (self.x,))

        return output, torch.cat([p.detach().reshape(-1) for p in named.values()])

    def dense_hessian(self) -> Tensor:
        """By torch.autograd.functional on one flat vector, math kernels, no fused recurrences."""
        output, flat = self._flat()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.autograd.functional.hessian(lambda w: self.loss(output(w)), flat)

    def dense_ggn(self) -> Tensor:
        """Jᵀ H_z J from the dense Jacobian of the outputs and the dense Hessian of the loss."""
        output, flat = self._flat()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            jacobian = torch.autograd.functional.jacobian(output, flat)
        z = output(flat).detach()
        inner = torch.autograd.functional.hessian(lambda u: self.loss(u.view_as(z)), z.reshape(-1))
        rows = jacobian.reshape(-1, flat.numel())
        return rows.T @ inner @ rows


def _classify(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])


def problem(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    """A problem by name, the same at every call."""
    torch.manual_seed(3)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "tied": lambda z: F.mse_loss(z, torch.ones_like(z))
    }
    make: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "mlp": (
            lambda: nn.Sequential(
                nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3)
            ),
            (6, 4),
        ),
        "batchnorm": (
            lambda: nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)
            ),
            (6, 1, 4, 4),
        ),
        "groupnorm": (
            lambda: nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.GroupNorm(2, 2), nn.Mish(), nn.Flatten(), nn.Linear(8, 3)
            ),
            (6, 1, 4, 4),
        ),
        "dropout": (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(8, 3)),
            (6, 4),
        ),
        "transformer": (Attention, (5, 4, 4)),
        "lstm": (Recurrent, (5, 4, 3)),
        "tied": (Tied, (6, 5)),
    }
    build, shape = make[name]
    net = build().to(dtype)
    x = torch.randn(shape, dtype=dtype) / math.sqrt(2)
    return Problem(net, x, losses.get(name, _classify))


EXACT = ["dual", "graph"]
"""The engines without differences."""
PROBLEMS = ["mlp", "batchnorm", "groupnorm", "dropout", "transformer", "lstm", "tied"]


def flat(vector: list[Tensor]) -> Tensor:
    return torch.cat([v.detach().reshape(-1) for v in vector])


def closure_of(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]
) -> Callable[[], Tensor]:
    """The usual closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def closure_for(loss: Callable[[], Tensor], params: Iterable[Tensor]) -> Callable[[], Tensor]:
    """A closure that clears the gradients of these parameters."""
    params = list(params)

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        value = loss()
        value.backward()
        return value

    return closure
