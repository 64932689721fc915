"""Energies that are convex in y: partially input-convex networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.energies.layers import inverse_softplus, perceptron
from hvpopt.options import check_count, check_range

__all__ = ["ConvexEncoder", "ConvexHead", "input_convex"]


class ConvexEncoder(nn.Module):
    """What a `ConvexHead` needs of x: `{"scores": [B, L]}` and for each of its layers i a gate of
    the labels `"label_gate_i": [B, L]`, a shift `"shift_i": [B, H_i]` and a positive gate of the
    layer's units `"unit_gate_i": [B, H_i]`.

    Layer i of a perceptron of x feeds layer i of the head, as in Amos, Xu and Kolter (2017, "Input
    convex neural networks", ICML).

    Args:
        num_inputs, num_labels: D of the inputs `[B, D]`, and L.
        widths: units of the perceptron's hidden layers, one for each of the head's.
        units: H_i of the head's layers.
        activation: of the perceptron; y does not pass through.
        dropout: probability of dropping a hidden unit.
        input_dropout: probability of dropping an input.

    Raises:
        ValueError: for an argument out of range, or `widths` of another length than `units`.
    """

    def __init__(
        self,
        num_inputs: int,
        num_labels: int,
        *,
        widths: Sequence[int] = (150, 150),
        units: Sequence[int] = (32, 32),
        activation: str = "softplus",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) != len(units):
            raise ValueError(
                f"widths={list(widths)} and units={list(units)} differ in length: each layer of "
                "the energy is fed by one of the encoder."
            )
        first, *rest = itertools.pairwise([num_inputs, *widths])
        self.layers = nn.ModuleList(
            [perceptron(first, activation, dropout=dropout, input_dropout=input_dropout)]
        )
        self.layers.extend(perceptron(sizes, activation, dropout=dropout) for sizes in rest)
        self.label_gates = nn.ModuleList(nn.Linear(width, num_labels) for width in widths)
        self.shifts = nn.ModuleList(map(nn.Linear, widths, units))
        self.unit_gates = nn.ModuleList(map(nn.Linear, widths, units))
        self.scores = nn.Linear(widths[-1], num_labels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The encoding of inputs `[B, D]`."""
        encoding = {}
        for i, layer in enumerate(self.layers):
            x = layer(x)
            encoding[f"label_gate_{i}"] = self.label_gates[i](x)
            encoding[f"shift_{i}"] = self.shifts[i](x)
            encoding[f"unit_gate_{i}"] = F.softplus(self.unit_gates[i](x))
        return encoding | {"scores": self.scores(x)}

    def initial(self, encoding: dict[str, Tensor]) -> Tensor:
        """The prediction σ(s) `[B, L]` of the linear term."""
        return torch.sigmoid(encoding["scores"])


class ConvexHead(nn.Module):
    """E(x, y) = wᵀ(z_k ∘ u_k) − ⟨y, s(x)⟩ + ε/2 ‖y − ½‖², convex in y, with

        z_1 = g(A_1 (y ∘ a_1) + b_1),
        z_{i+1} = g(W_i (z_i ∘ u_i) + A_{i+1} (y ∘ a_{i+1}) + b_{i+1}).

    The gates a_i (of the labels), u_i > 0 (of the units) and shifts b_i come from the encoder;
    g = softplus is convex and increasing, and w and W_i are positive, as the softplus of the free
    parameters, so that every z_i is convex in y.

    Args:
        num_labels: L.
        units: H_i of the layers.
        strength: ε; with ε > 0 the minimum is unique.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self, num_labels: int, *, units: Sequence[int] = (32, 32), strength: float = 0.0
    ) -> None:
        super().__init__()
        self.strength = check_range("strength", strength, 0.0)
        if not units:
            raise ValueError("units is empty; a convex energy needs at least one layer.")
        for size in (num_labels, *units):
            check_count("a layer's size", size)
        self.from_labels = nn.ModuleList(nn.Linear(num_labels, n, bias=False) for n in units)
        self.from_units = nn.ParameterList(
            _raw_positive(num_out, num_in) for num_in, num_out in itertools.pairwise([*units, 1])
        )

    def forward(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Energies `[B]` of y `[B, L]`."""
        gated = torch.zeros((), dtype=y.dtype, device=y.device)
        for i, linear in enumerate(self.from_labels):
            shifted = linear(y * encoding[f"label_gate_{i}"]) + encoding[f"shift_{i}"]
            z = F.softplus(shifted + gated)
            gated = F.linear(z * encoding[f"unit_gate_{i}"], F.softplus(self.from_units[i]))
        energy = gated.squeeze(-1) - torch.linalg.vecdot(y, encoding["scores"])
        if self.strength:
            energy = energy + 0.5 * self.strength * (y - 0.5).square().sum(-1)
        return energy


def input_convex(
    num_inputs: int,
    num_labels: int,
    *,
    widths: Sequence[int] = (150, 150),
    units: Sequence[int] = (32, 32),
    strength: float = 0.0,
    encoder_activation: str = "softplus",
    dropout: float = 0.0,
    input_dropout: float = 0.0,
) -> EncodedEnergy:
    """A partially input-convex network (PICNN) as energy of labels y ∈ [0, 1]ᴸ given x `[B, D]`:
    a `ConvexEncoder` with a `ConvexHead`. Its minima over a box are global.

    Args:
        num_inputs, num_labels: D and L.
        widths: units of the encoder's hidden layers, one for each of the head's.
        units: of the head's layers.
        strength: ε ≥ 0 of the quadratic term.
        encoder_activation: of the encoder's hidden layers; y does not pass through.
        dropout: probability of dropping a hidden unit of the encoder.
        input_dropout: probability of dropping an input.

    Raises:
        ValueError: for an argument out of range.
    """
    encoder = ConvexEncoder(
        num_inputs,
        num_labels,
        widths=widths,
        units=units,
        activation=encoder_activation,
        dropout=dropout,
        input_dropout=input_dropout,
    )
    return EncodedEnergy(encoder, ConvexHead(num_labels, units=units, strength=strength))


def _raw_positive(num_out: int, num_in: int) -> nn.Parameter:
    """Parameters whose softplus is log-normal about 1/num_in, so that a layer sums to about one."""
    weights = torch.empty(num_out, num_in).normal_(std=0.5).exp() / num_in
    return nn.Parameter(inverse_softplus(weights))
