"""The energy of whole images, and the feed-forward network that it is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.energies.guess import GuessDistance
from hvpopt.nested.energies.known import KnownEntries
from hvpopt.nested.energies.layers import perceptron

from .questions import SIDE

NUM_PIXELS = SIDE**2


class View(nn.Module):
    """The encoder of a view `[B, 2, 8, 8]`: `{"values": [B, 1, 8, 8], "known": [B, 1, 8, 8]}`."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The pixels' values, and which of them are known."""
        return {"values": x[:, :1], "known": x[:, 1:] == 1}

    def initial(self, encoding: dict[str, Tensor]) -> Tensor:
        """Where inference starts: grey, but for what is known."""
        return torch.where(encoding["known"], encoding["values"], 0.5)


class AutoencodingEnergy(nn.Module):
    """E(y) = ½ ‖y − D(y)‖² of images y `[B, 1, 8, 8]`, with a perceptron D.

    D is an autoencoder: images that it leaves as they are lie lowest. What is known of an image is
    not among its inputs.

    Args:
        widths: units of D's hidden layers.
        activation: of them, a smooth one.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(self, widths: Sequence[int] = (200,), *, activation: str = "silu") -> None:
        super().__init__()
        sizes = [NUM_PIXELS, *widths]
        self.net = nn.Sequential(perceptron(sizes, activation), nn.Linear(sizes[-1], NUM_PIXELS))

    def forward(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Energies `[B]`; the encoding is not used."""
        y = y.flatten(1)
        return (y - self.net(y)).square().sum(1) / 2


class Completion(nn.Module):
    """A perceptron from a view `[B, 2, 8, 8]` to the image, whose known pixels stay as they are.

    Args:
        widths: units of the hidden layers.
        activation: of them.
        dropout: probability of dropping a hidden unit.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        widths: Sequence[int] = (200, 200),
        *,
        activation: str = "silu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [2 * NUM_PIXELS, *widths]
        hidden = perceptron(sizes, activation, dropout=dropout)
        self.net = nn.Sequential(hidden, nn.Linear(sizes[-1], NUM_PIXELS))
        self.view = View()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """What is known, and the `guess` `[B, 1, 8, 8]` of the rest."""
        guess = self.net(x.flatten(1)).sigmoid().unflatten(1, (1, SIDE, SIDE))
        return self.view(x) | {"guess": guess}

    def initial(self, encoding: dict[str, Tensor]) -> Tensor:
        """The guess, with the known pixels in their places."""
        return torch.where(encoding["known"], encoding["values"], encoding["guess"])


def energy(widths: Sequence[int] = (200,), *, activation: str = "silu") -> EncodedEnergy:
    """An `AutoencodingEnergy` of images, of which the pixels in a view `[B, 2, 8, 8]` are known.

    Arguments and errors as of `AutoencodingEnergy`.
    """
    return EncodedEnergy(View(), KnownEntries(AutoencodingEnergy(widths, activation=activation)))


def feedforward(
    widths: Sequence[int] = (200, 200), *, activation: str = "silu", dropout: float = 0.0
) -> EncodedEnergy:
    """A `Completion` network; its energy's minimum is its guess, with the known pixels in place.

    Arguments and errors as of `Completion`.
    """
    network = Completion(widths, activation=activation, dropout=dropout)
    return EncodedEnergy(network, KnownEntries(GuessDistance()))
