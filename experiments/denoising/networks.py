"""The feed-forward network that the energy is compared with."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from hvpopt.nested.energies.layers import activation as activation_of
from hvpopt.options import check_count


class NoiseSubtraction(nn.Module):
    """Images x `[B, C, H, W]` less the noise that convolutions find in them (Zhang et al. 2017,
    "Beyond a Gaussian denoiser", IEEE Trans. Image Process. 26).

    With `last_kernel_size=1` it is the network of `hvpopt.nested.energies.denoising` of the same
    widths and kernel size: that one sums its output over the pixels, this one subtracts it. For one
    channel both have as many parameters, the last convolution's bias in the fidelity's place.

    Args:
        num_channels: C.
        widths: channels of the hidden convolutions, with an activation after each.
        kernel_size: of the hidden convolutions, odd.
        last_kernel_size: of the last one, to C channels; odd.
        activation: a name in `hvpopt.nested.energies.layers`.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        num_channels: int = 1,
        *,
        widths: Sequence[int] = (16, 16),
        kernel_size: int = 5,
        last_kernel_size: int = 1,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        sizes = [check_count("num_channels", num_channels), *widths]
        for name, size in (("kernel_size", kernel_size), ("last_kernel_size", last_kernel_size)):
            if check_count(name, size) % 2 == 0:
                raise ValueError(f"{name}={size} is even; expected an odd one.")
        layers: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise(sizes):
            check_count("a layer's channels", num_out)
            convolution = nn.Conv2d(num_in, num_out, kernel_size, padding=kernel_size // 2)
            layers += [convolution, activation_of(activation, in_y=False)]
        last = nn.Conv2d(sizes[-1], num_channels, last_kernel_size, padding=last_kernel_size // 2)
        self.noise = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """Denoised images `[B, C, H, W]`."""
        return x - self.noise(x)
