"""The networks whose products are measured, each with an ordinary training closure."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

Params = dict[str, Tensor]


class CrossEntropy(nn.CrossEntropyLoss):
    """The mean cross-entropy of classes in the last dimension, over all others."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Of the logits and the classes' numbers."""
        return F.cross_entropy(input.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Problem:
    """A network, a batch, and the closure that an optimizer would be given."""

    name: str
    """How tables call it."""
    module: nn.Module
    """The network, in training mode."""
    inputs: Tensor
    """The batch."""
    targets: Tensor
    """Its classes."""
    criterion: nn.Module
    """The mean loss of outputs and targets."""
    _directions: dict[tuple[int, torch.dtype], Params] = field(default_factory=dict, repr=False)
    """Those that were asked for."""

    def loss(self, output: Tensor) -> Tensor:
        """The mean loss of the network's output on the batch."""
        value: Tensor = self.criterion(output, self.targets)
        return value

    def closure(self) -> Tensor:
        """Clears the gradients, computes the loss, calls backward, returns the loss."""
        self.module.zero_grad()
        loss = self.loss(self.module(self.inputs))
        loss.backward()
        return loss

    def params(self) -> Params:
        """The parameters' values by name, for the functional products."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def direction(self, index: int = 0) -> Params:
        """A direction by parameters' names; the same one for the same index, for all engines."""
        key = index, next(self.module.parameters()).dtype
        if key not in self._directions:
            generator = torch.Generator().manual_seed(index)
            self._directions[key] = {
                name: torch.randn(p.shape, generator=generator).to(p.detach())
                for name, p in self.module.named_parameters()
            }
        return self._directions[key]

    def directions(self, count: int) -> Params:
        """The first ``count`` directions, one a row."""
        each = [self.direction(i) for i in range(count)]
        return {name: torch.stack([v[name] for v in each]) for name in each[0]}

    def copy(self) -> "Problem":
        """The same problem with parameters of its own.

        What keeps a graph needs them: the dual engine writes its parameters, to the same values,
        and a graph through them is then invalid.
        """
        return replace(self, module=copy.deepcopy(self.module))

    def without_statistics(self) -> "Problem":
        """A copy whose BatchNorm keeps no running statistics: in training mode the same function.

        What differentiates a function of the module cannot update its buffers.
        """
        problem = self.copy()
        for module in problem.module.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return problem

    def output(self, params: Params) -> Any:
        """The network's output as a function of its parameters; buffers stay as they are."""
        buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        return functional_call(self.module, (params, buffers), (self.inputs,))

    def value(self, params: Params) -> Tensor:
        """The loss as a function of the parameters."""
        return self.loss(self.output(params))


def mlp(device: torch.device, *, batch: int = 512, width: int = 512) -> Problem:
    """A perceptron 784-width-width-10 with ReLU under cross-entropy."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    return _classifier(f"MLP 784-{width}-{width}-10, batch {batch}", net, (batch, 784), device)


def tiny(device: torch.device) -> Problem:
    """A perceptron 4-8-2 on 8 points, whose arithmetic costs nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return _classifier("MLP 4-8-2, batch 8", net, (8, 4), device, classes=2)


def cnn(device: torch.device, *, batch: int = 64, width: int = 32) -> Problem:
    """Three convolutions with BatchNorm and ReLU on 3×32×32 images, under cross-entropy."""
    torch.manual_seed(0)

    def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
        return [*_conv_norm(channels_in, channels, stride), nn.ReLU()]

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


def resnet(
    device: torch.device, *, batch: int = 8, width: int = 16, size: int = 32, stages: int = 4
) -> Problem:
    """ResNet-18's blocks on small images (He et al. 2016), under cross-entropy.

    A 3×3 stem without pooling; ``width`` is 64 in the original.
    """
    torch.manual_seed(0)
    channels, blocks = width, []
    for stage in range(stages):
        for stride in (1 if stage == 0 else 2, 1):
            blocks.append(_Residual(channels, width * 2**stage, stride))
            channels = width * 2**stage
    net = nn.Sequential(
        *_conv_norm(3, width, 1),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )
    name = f"ResNet-{4 * stages + 2} of width {width}, {batch}×3×{size}×{size}"
    return _classifier(name, net, (batch, 3, size, size), device)


def gpt(
    device: torch.device, *, batch: int = 8, length: int = 64, layers: int = 4, width: int = 128
) -> Problem:
    """A causal transformer on ``batch`` × ``length`` tokens of 256 kinds, predicting the next."""
    torch.manual_seed(0)
    net = _GPT(tokens=256, length=length, layers=layers, width=width)
    name = f"GPT {layers} layers d={width}, {batch}×{length} tokens"
    return _language_model(name, net, batch, length, device)


def lstm(
    device: torch.device, *, batch: int = 32, length: int = 32, layers: int = 2, width: int = 128
) -> Problem:
    """A recurrent network on ``batch`` × ``length`` tokens of 256 kinds, predicting the next."""
    torch.manual_seed(0)
    net = _LSTM(tokens=256, layers=layers, width=width)
    name = f"LSTM {layers} layers d={width}, {batch}×{length} tokens"
    return _language_model(name, net, batch, length, device)


FULL: dict[str, Callable[[torch.device], Problem]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "gpt": gpt,
    "lstm": lstm,
}
"""The networks by their names on the command line."""
QUICK: dict[str, Callable[[torch.device], Problem]] = {
    "mlp": partial(mlp, batch=64, width=64),
    "cnn": partial(cnn, batch=8, width=8),
    "resnet": partial(resnet, batch=4, width=4, size=8, stages=2),
    "gpt": partial(gpt, batch=2, length=16, layers=1, width=32),
    "lstm": partial(lstm, batch=4, length=3, width=16),
}
"""The same, so small that only their form counts."""


def _classifier(
    name: str, net: nn.Module, shape: tuple[int, ...], device: torch.device, classes: int = 10
) -> Problem:
    """The network with a random batch and random labels."""
    inputs, labels = torch.randn(shape), torch.randint(classes, shape[:1])
    return Problem(name, net.to(device), inputs.to(device), labels.to(device), CrossEntropy())


def _language_model(
    name: str, net: nn.Module, batch: int, length: int, device: torch.device
) -> Problem:
    """The network with random text, each token to be predicted from those before."""
    text = torch.randint(256, (batch, length + 1)).to(device)
    return Problem(name, net.to(device), text[:, :-1], text[:, 1:], CrossEntropy())


def _conv_norm(channels_in: int, channels: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class _Residual(nn.Module):
    """Two convolutions beside the identity, or beside a 1×1 convolution where shapes change."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        first, second = (
            _conv_norm(channels_in, channels, stride),
            _conv_norm(channels, channels, 1),
        )
        self.inner = nn.Sequential(*first, nn.ReLU(), *second)
        same = stride == 1 and channels_in == channels
        self.outer = nn.Sequential(*([] if same else _conv_norm(channels_in, channels, stride, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.outer(x))


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


class _LSTM(nn.Module):
    def __init__(self, *, tokens: int, layers: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.recurrent = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.recurrent(self.token(text))[0])
