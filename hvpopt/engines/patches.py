"""Images as the patches that a convolution takes its inner products with."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Size, Tensor

Pair = tuple[Tensor, Tensor]
Pairs = Callable[[Tensor], Iterator[Pair]]

_CHUNK = 2**24  # entries of patches at a time


def patches(
    x: Tensor, size: Sequence[int], *, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> Tensor:
    """The patches of a batch of images under a kernel of some size.

    Args:
        x: [examples, channels, *image], with one, two or more dimensions of the image.
        size: of the kernel, one number for each of these.
        stride: as of ``torch.conv2d``; so ``padding``, with "same" and "valid", and ``dilation``.

    Returns:
        [examples, channels, *positions, *size].
    """
    num_dims = len(size)
    stride, dilation = _numbers(stride, num_dims), _numbers(dilation, num_dims)
    widths = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
    if padding == "same":  # what is odd goes behind
        sides = [((w - 1) // 2, w // 2) for w in widths]
    else:
        numbers = _numbers(0 if padding == "valid" else padding, num_dims)
        sides = [(p, p) for p in numbers]
    if any(map(any, sides)):
        x = F.pad(x, [n for side in reversed(sides) for n in side])
    for i in range(num_dims):
        x = x.unfold(2 + i, widths[i], stride[i])[..., :: dilation[i]]
    return x


def convolution_pairs(x: Tensor, weight: Size, groups: int, **geometry: Any) -> Pairs:
    """Slopes by the output of a convolution and patches of its input, position by position.

    Args:
        x: the input, with or without a batch.
        weight: the shape of the weight, [outputs, inputs / groups, *size].
        groups: of channels.
        geometry: see `patches`.

    Returns:
        slope ↦ chunks of (r[groups, positions, outputs / groups], c[groups, positions, columns])
        with Σ r cᵀ the gradient by the weight.
    """
    x = x if x.dim() == len(weight) else x[None]

    def pairs(slope: Tensor) -> Iterator[Pair]:
        slope = slope.reshape(len(x), weight[0], -1)
        for part in _chunks(len(x), math.prod(weight[1:]) * groups * slope.shape[-1]):
            c = patches(x[part], weight[2:], **geometry)
            yield _by_group(slope[part], groups), _by_group(c, groups, len(weight) - 2)

    return pairs


def transposed_convolution_pairs(x: Tensor, weight: Size, groups: int, **geometry: Any) -> Pairs:
    """The same for a transposed convolution, whose slopes are what patches are taken of.

    Args:
        x: the input, with or without a batch.
        weight: the shape of the weight, [inputs, outputs / groups, *size].
        groups: of channels.
        geometry: see `patches`.
    """
    x = x if x.dim() == len(weight) else x[None]

    def pairs(slope: Tensor) -> Iterator[Pair]:
        slope = slope.reshape(len(x), -1, *slope.shape[2 - len(weight) :])
        image = x.shape[2:]
        for part in _chunks(len(x), math.prod(weight[1:]) * groups * math.prod(image)):
            c = patches(slope[part], weight[2:], **geometry)
            for i, length in enumerate(image):  # output_padding may add positions
                c = c.narrow(2 + i, 0, length)
            yield _by_group(x[part].flatten(2), groups), _by_group(c, groups, len(image))

    return pairs


def _chunks(num_examples: int, size: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, size))
    return (slice(i, i + step) for i in range(0, num_examples, step))


def _by_group(x: Tensor, groups: int, num_dims: int = 0) -> Tensor:
    """[examples, channels, *positions, *size] as [groups, positions, channels and size]."""
    kernel = x.shape[x.dim() - num_dims :]
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1, math.prod(kernel))
    return x.permute(1, 0, 3, 2, 4).reshape(groups, -1, x.shape[2] * x.shape[4])


def _numbers(given: int | Sequence[int], num_dims: int) -> list[int]:
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * num_dims if len(numbers) == 1 else numbers
