"""Networks of the experiments: a perceptron, a convolutional network, an autoencoder.

Plain torch modules with plain initialisation. The default activations are smooth, because a
Hessian says little about a piecewise linear function.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Sequence

from torch import nn

__all__ = ["ACTIVATIONS", "autoencoder", "cnn", "mlp"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def mlp(
    image_shape: Sequence[int] = (1, 8, 8),
    num_classes: int = 10,
    *,
    widths: Sequence[int] = (128, 64),
    activation: str = "tanh",
    dropout: float = 0.0,
) -> nn.Sequential:
    """A perceptron from images `[B, *image_shape]` to logits `[B, num_classes]`.

    Args:
        image_shape: channels, height, width.
        num_classes: number of logits.
        widths: units of each hidden layer.
        activation: a name in `ACTIVATIONS`.
        dropout: probability of dropping a hidden unit.

    Raises:
        ValueError: if a size is below one, the activation unknown or the dropout not in [0, 1).
    """
    act, drop = _activation(activation), _dropout(dropout)
    sizes = [math.prod(_sizes("image_shape", image_shape)), *_sizes("widths", widths)]
    layers: list[nn.Module] = [nn.Flatten()]
    for num_in, num_out in itertools.pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), act(), nn.Dropout(drop)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], _size("num_classes", num_classes)))


def cnn(
    image_shape: Sequence[int] = (1, 8, 8),
    num_classes: int = 10,
    *,
    channels: Sequence[int] = (16, 32),
    activation: str = "gelu",
    dropout: float = 0.1,
) -> nn.Sequential:
    """A convolutional network from images `[B, *image_shape]` to logits `[B, num_classes]`.

    Each stage is a 3 x 3 convolution (from the second on with stride 2), BatchNorm and the
    activation; then dropout and one linear layer.

    Args:
        image_shape: channels, height, width.
        num_classes: number of logits.
        channels: output channels of each stage.
        activation: a name in `ACTIVATIONS`.
        dropout: probability of dropping a feature before the linear layer.

    Raises:
        ValueError: if a size is below one, the activation unknown or the dropout not in [0, 1).
    """
    act, drop = _activation(activation), _dropout(dropout)
    num_channels, height, width = _sizes("image_shape", image_shape)
    layers: list[nn.Module] = []
    for stage, num_out in enumerate(_sizes("channels", channels)):
        stride = 1 if stage == 0 else 2
        # BatchNorm subtracts the mean, and with it any bias of the convolution.
        layers.append(nn.Conv2d(num_channels, num_out, 3, stride=stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(num_out), act()]
        num_channels, height, width = num_out, -(-height // stride), -(-width // stride)
    num_features = num_channels * height * width
    head = nn.Linear(num_features, _size("num_classes", num_classes))
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(drop), head)


def autoencoder(
    image_shape: Sequence[int] = (1, 28, 28),
    *,
    widths: Sequence[int] = (256, 64, 16),
    activation: str = "tanh",
) -> nn.Sequential:
    """A deep autoencoder from images `[B, *image_shape]` to their logits, of the same shape.

    The encoder has the given widths, the decoder the mirrored ones; the code (the last width) is
    linear, as in Hinton and Salakhutdinov (2006, Science 313).

    Args:
        image_shape: channels, height, width.
        widths: units of the encoder's layers, the code last.
        activation: a name in `ACTIVATIONS`, between all layers but around the code.

    Raises:
        ValueError: if a size is below one or the activation unknown.
    """
    act = _activation(activation)
    image_shape = _sizes("image_shape", image_shape)
    encoder = [math.prod(image_shape), *_sizes("widths", widths)]
    layers: list[nn.Module] = [nn.Flatten()]
    for half in (encoder, encoder[::-1]):
        for num_in, num_out in itertools.pairwise(half):
            layers += [nn.Linear(num_in, num_out), act()]
        layers.pop()  # the code and the logits have no activation
    return nn.Sequential(*layers, nn.Unflatten(1, image_shape))


def _activation(name: str) -> type[nn.Module]:
    if name not in ACTIVATIONS:
        nearest = difflib.get_close_matches(str(name), ACTIVATIONS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}.{hint}")
    return ACTIVATIONS[name]


def _dropout(probability: float) -> float:
    if not 0 <= probability < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {probability}.")
    return probability


def _size(name: str, size: int) -> int:
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}.")
    return size


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"{name} must hold sizes of at least 1, got {list(sizes)}.")
    return tuple(sizes)
