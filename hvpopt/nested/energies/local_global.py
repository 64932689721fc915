"""Structured prediction energy networks: a local and a global term, and deep value networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvpopt.nested.energies import layers
from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.options import check_count

__all__ = ["LocalGlobal", "deep_value_network", "spen"]


class LocalGlobal(nn.Module):
    """E(x, y) = −⟨y, s(x)⟩ + c₂ᵀ g(C₁ y + C₃ F(x) + b) + d, the head of a SPEN.

    The local term takes each label by itself, the global one measures, with few units, how labels
    go together (Belanger and McCallum 2016, "Structured prediction energy networks", ICML).
    Without `num_features` the term C₃ F(x) is absent; with it the energy is conditional, the
    measurements depend on x.

    Args:
        num_labels: L of y `[B, L]` and of `encoding["scores"]`.
        num_units: rows of C₁.
        activation: g, a smooth one; others are warned of.
        num_features: H of `encoding["features"]`, for the conditional energy.
        offset: whether d is there. It moves no minimum; a value network needs it.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        num_units: int = 16,
        activation: str = "softplus",
        num_features: int | None = None,
        offset: bool = False,
    ) -> None:
        super().__init__()
        self.measure = nn.Linear(
            check_count("num_labels", num_labels), check_count("num_units", num_units)
        )
        self.activation = layers.activation(activation)
        self.weigh = nn.Linear(num_units, 1, bias=offset)
        self.condition: nn.Linear | None = None
        if num_features is not None:
            size = check_count("num_features", num_features)
            self.condition = nn.Linear(size, num_units, bias=False)

    def forward(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Energies `[B]` of y `[B, L]`."""
        measured = self.measure(y)
        if self.condition is not None:
            measured = measured + self.condition(encoding["features"])
        interaction = self.weigh(self.activation(measured)).squeeze(-1)
        return interaction - torch.linalg.vecdot(y, encoding["scores"])


def spen(
    num_inputs: int,
    num_labels: int,
    *,
    widths: Sequence[int] = (150, 150),
    num_units: int = 16,
    activation: str = "softplus",
    conditional: bool = False,
    offset: bool = False,
    encoder_activation: str = "softplus",
    dropout: float = 0.0,
    input_dropout: float = 0.0,
) -> EncodedEnergy:
    """A structured prediction energy network of labels y ∈ [0, 1]ᴸ given inputs x `[B, D]`: an
    `MLPEncoder` with a `LocalGlobal` head.

    Args:
        num_inputs, num_labels: D and L.
        widths: units of the encoder's hidden layers.
        num_units: of the global term.
        activation: of the global term, a smooth one; others are warned of.
        conditional: whether the global term sees the last hidden layer F(x).
        offset: whether a constant is added, see `LocalGlobal`.
        encoder_activation: of the encoder's hidden layers; y does not pass through.
        dropout: probability of dropping a hidden unit of the encoder.
        input_dropout: probability of dropping an input.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> energy = spen(num_inputs=6, num_labels=4, widths=[5])
        >>> energy(torch.zeros(3, 6), torch.zeros(3, 4)).shape
        torch.Size([3])
    """
    encoder = layers.MLPEncoder(
        num_inputs,
        num_labels,
        widths=widths,
        activation=encoder_activation,
        dropout=dropout,
        input_dropout=input_dropout,
        with_features=conditional,
    )
    num_features = encoder.scores.in_features if conditional else None
    head = LocalGlobal(
        num_labels,
        num_units=num_units,
        activation=activation,
        num_features=num_features,
        offset=offset,
    )
    return EncodedEnergy(encoder, head)


def deep_value_network(
    num_inputs: int,
    num_labels: int,
    *,
    widths: Sequence[int] = (150,),
    num_units: int = 16,
    activation: str = "softplus",
    conditional: bool = False,
    encoder_activation: str = "softplus",
    dropout: float = 0.0,
    input_dropout: float = 0.0,
) -> EncodedEnergy:
    """A deep value network: v(x, y) = σ(−E(x, y)) predicts the quality of the output y for x, such
    as its F1 (Gygli, Norouzi and Angelova 2017, ICML). Minimising E finds the output of the
    highest predicted value.

    The network is a `spen` whose energy has an offset, because the value's level counts. Trained
    with `hvpopt.nested.losses.DeepValue`. Arguments and errors as of `spen`.
    """
    return spen(
        num_inputs,
        num_labels,
        widths=widths,
        num_units=num_units,
        activation=activation,
        conditional=conditional,
        offset=True,
        encoder_activation=encoder_activation,
        dropout=dropout,
        input_dropout=input_dropout,
    )
