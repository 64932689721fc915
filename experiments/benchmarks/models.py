"""The networks whose products are measured, each with an ordinary training closure."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Problem:
    """A network, a batch, and the closure that an optimizer would be given."""

    name: str
    """How tables call it."""
    module: nn.Module
    """The network, in training mode."""
    inputs: Tensor
    """The batch."""
    loss: Callable[[Tensor], Tensor]
    """The mean loss of the network's output on the batch."""

    def closure(self) -> Tensor:
        """Clears the gradients, computes the loss, calls backward, returns the loss."""
        self.module.zero_grad()
        loss = self.loss(self.module(self.inputs))
        loss.backward()
        return loss

    def params(self) -> dict[str, Tensor]:
        """Copies of the parameters by name, for the functional products."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def copy(self) -> "Problem":
        """The same problem with parameters of its own.

        What keeps a graph needs them: the dual engine writes its parameters, to the same values,
        and a graph through them is then invalid.
        """
        return replace(self, module=copy.deepcopy(self.module))

    def output(self, params: dict[str, Tensor]) -> Any:
        """The network's output as a function of its parameters; buffers stay as they are."""
        buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        return functional_call(self.module, (params, buffers), (self.inputs,))

    def value(self, params: dict[str, Tensor]) -> Tensor:
        """The loss as a function of the parameters."""
        return self.loss(self.output(params))


def mlp(device: torch.device, *, batch: int = 512, width: int = 512) -> Problem:
    """A perceptron 784-width-width-10 with ReLU under cross-entropy."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    return _classifier(f"MLP 784-{width}-{width}-10, batch {batch}", net, (batch, 784), device)


def cnn(device: torch.device, *, batch: int = 64, width: int = 32) -> Problem:
    """Three convolutions with BatchNorm and ReLU on 3×32×32 images, under cross-entropy."""
    torch.manual_seed(0)

    def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels), nn.ReLU()]

    net = nn.Sequential(
        *block(3, width, 1),
        *block(width, 2 * width, 2),
        *block(2 * width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )
    name = f"CNN with BatchNorm, {batch}×3×32×32"
    return _classifier(name, net, (batch, 3, 32, 32), device)


def gpt(
    device: torch.device, *, batch: int = 8, length: int = 64, layers: int = 4, width: int = 128
) -> Problem:
    """A causal transformer on ``batch`` × ``length`` tokens of 256 kinds, predicting the next."""
    torch.manual_seed(0)
    net = _GPT(tokens=256, length=length, layers=layers, width=width).to(device)
    text = torch.randint(256, (batch, length + 1), device=device)
    targets = text[:, 1:].reshape(-1)
    return Problem(
        name=f"GPT {layers} layers d={width}, {batch}×{length} tokens",
        module=net,
        inputs=text[:, :-1],
        loss=lambda z: F.cross_entropy(z.reshape(-1, 256), targets),
    )


def _classifier(name: str, net: nn.Module, shape: tuple[int, ...], device: torch.device) -> Problem:
    """The network with a random batch and random labels of ten kinds."""
    inputs, labels = torch.randn(shape).to(device), torch.randint(10, shape[:1]).to(device)
    return Problem(name, net.to(device), inputs, lambda z: F.cross_entropy(z, labels))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _GPT(nn.Module):
    def __init__(self, *, tokens: int, length: int, layers: int, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
