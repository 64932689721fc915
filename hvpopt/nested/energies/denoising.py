"""The energy of denoising: nearness to the noisy image, and a convolutional prior."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpopt.nested.energies import layers
from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.options import check_count, check_range

__all__ = ["ConvolutionalPrior", "DenoisingHead", "NoisyImage", "denoising"]


class NoisyImage(nn.Module):
    """The encoder of denoising, `{"image": x}`: the noisy image x as it is."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The encoding of images `[B, C, H, W]`."""
        return {"image": x}

    def initial(self, encoding: dict[str, Tensor]) -> Tensor:
        """The noisy image `[B, C, H, W]`."""
        return encoding["image"]


class ConvolutionalPrior(nn.Module):
    """How unlikely images are, `[B]`: convolutions with an activation between them, and a 1 × 1
    convolution to one channel, summed over the pixels.

    Args:
        num_channels: C of images `[B, C, H, W]`.
        widths: channels of the hidden convolutions.
        kernel_size: of the hidden convolutions, odd.
        activation: a smooth one; others are warned of.
        gain: factor on the first convolution's weights at the start of training. What the prior is
            to see must reach where the activation bends: a linear prior tells nothing apart.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        num_channels: int = 1,
        *,
        widths: Sequence[int] = (25, 25),
        kernel_size: int = 5,
        activation: str = "softplus",
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if check_count("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size} is even; expected an odd one, with a pixel in the "
                "middle."
            )
        sizes = [check_count("num_channels", num_channels), *widths]
        parts: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise(sizes):
            check_count("a layer's channels", num_out)
            convolution = nn.Conv2d(num_in, num_out, kernel_size, padding=kernel_size // 2)
            parts += [convolution, layers.activation(activation)]
        self.net = nn.Sequential(*parts, nn.Conv2d(sizes[-1], 1, 1, bias=False))
        with torch.no_grad():
            next(self.net.parameters()).mul_(check_range("gain", gain, 1e-6))

    def forward(self, y: Tensor) -> Tensor:
        """Numbers `[B]` of images `[B, C, H, W]`."""
        return self.net(y).sum((1, 2, 3))


class DenoisingHead(nn.Module):
    """E(x, y) = s ‖y − x‖² + prior(y), with a learned s > 0, the softplus of a parameter.

    Args:
        prior: images `[B, C, H, W]` to numbers `[B]`.
        fidelity: s at the start, above zero.

    Raises:
        ValueError: if the fidelity is not above zero.
    """

    def __init__(self, prior: nn.Module, *, fidelity: float = 1.0) -> None:
        super().__init__()
        start = torch.tensor(float(check_range("fidelity", fidelity, 1e-6)))
        self.raw_fidelity = nn.Parameter(layers.inverse_softplus(start))
        self.prior = prior

    def forward(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Energies `[B]` of images `[B, C, H, W]`."""
        distances = (y - encoding["image"]).square().sum((1, 2, 3))
        return F.softplus(self.raw_fidelity) * distances + self.prior(y)


def denoising(
    num_channels: int = 1,
    *,
    widths: Sequence[int] = (25, 25),
    kernel_size: int = 5,
    activation: str = "softplus",
    gain: float = 1.0,
    fidelity: float = 1.0,
) -> EncodedEnergy:
    """The energy of clean images y given noisy ones x, both `[B, C, H, W]`: nearness to x and a
    learned `ConvolutionalPrior` (Belanger, Yang and McCallum 2017, "End-to-end learning for
    structured prediction energy networks", ICML). Inference starts at the noisy image.

    Args:
        num_channels: C.
        widths: channels of the prior's hidden convolutions.
        kernel_size: of them, odd.
        activation: of the prior, a smooth one; others are warned of.
        gain: factor on the first convolution's weights at the start of training; about the inverse
            of the noise's deviation.
        fidelity: weight of the nearness at the start of training.

    Raises:
        ValueError: for an argument out of range.
    """
    prior = ConvolutionalPrior(
        num_channels, widths=widths, kernel_size=kernel_size, activation=activation, gain=gain
    )
    return EncodedEnergy(NoisyImage(), DenoisingHead(prior, fidelity=fidelity))
