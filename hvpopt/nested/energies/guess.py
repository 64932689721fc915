"""A feed-forward network as an energy whose minimum is known."""

from __future__ import annotations

from torch import Tensor, nn

from hvpopt.nested.energies.base import EncodedEnergy

__all__ = ["Guess", "GuessDistance", "feedforward"]


class Guess(nn.Module):
    """The encoder `{"guess": net(x)}`.

    Args:
        net: inputs to outputs `[B, *shape]`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The encoding of inputs."""
        return {"guess": self.net(x)}

    def initial(self, encoding: dict[str, Tensor]) -> Tensor:
        """The network's output `[B, *shape]`."""
        return encoding["guess"]


class GuessDistance(nn.Module):
    """E(x, y) = ½ ‖y − guess(x)‖², without parameters."""

    def forward(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Energies `[B]` of outputs `[B, *shape]`."""
        return (y - encoding["guess"]).square().flatten(1).sum(1) / 2


def feedforward(net: nn.Module) -> EncodedEnergy:
    """A feed-forward network as an energy, ½ ‖y − net(x)‖², to compare others with: one module, its
    logs and scores serve both. It is trained by the loss `FirstGuess`, and predicts its first guess
    net(x), without inference.

    Args:
        net: inputs to outputs `[B, *shape]`.
    """
    return EncodedEnergy(Guess(net), GuessDistance())
