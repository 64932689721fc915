"""An energy in two parts: what depends on the input alone, and what inference minimises."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["EncodedEnergy", "Encoder"]


class Encoder(Protocol):
    """What an `EncodedEnergy` needs of its first part."""

    def __call__(self, x: Any) -> dict[str, Tensor]:
        """The encoding of inputs: tensors `[B, ...]` by name."""

    def initial(self, encoding: dict[str, Tensor]) -> Tensor:
        """A first guess of y `[B, *shape]`, in the closed domain of the outputs."""


class EncodedEnergy(nn.Module):
    """E(x, y) = head(encoder(x), y), one number an example.

    Inference evaluates the energy at many y for the same x. What depends on x alone, mostly the
    larger part of the network, is computed once, in the encoder; inference and its adjoint see the
    head, whose input `encoding` carries gradients back into the encoder:

        encoding = energy.encoder(x)
        minimize_energy(energy.head, encoding, y0)

    Args:
        encoder: x to a dictionary of tensors `[B, ...]`, with a method `initial(encoding)` that
            gives a first guess of y.
        head: `(encoding, y[B, *shape])` to energies `[B]`; twice differentiable in y.
    """

    encoder: nn.Module
    head: nn.Module

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        if not callable(getattr(encoder, "initial", None)):
            raise TypeError(
                f"{type(encoder).__name__} has no method initial(encoding); an encoder gives a "
                "first guess of y there, whose shape is that of the outputs."
            )
        self.encoder = encoder
        self.head = head

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Energies `[B]` of inputs x and outputs `[B, *shape]`."""
        return self.head(self.encoder(x), y)

    def initial(self, encoding: dict[str, Tensor]) -> Tensor:
        """The encoder's first guess of y `[B, *shape]`."""
        return self.encoder.initial(encoding)  # type: ignore[operator]
