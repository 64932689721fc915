"""Parts that the energies share: activations by name, and a perceptron that encodes inputs."""

from __future__ import annotations

import difflib
import itertools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvpopt.options import check_count, check_range

__all__ = ["KINKED", "SMOOTH", "MLPEncoder", "activation", "inverse_softplus", "perceptron"]

SMOOTH: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
"""Activations with a continuous second derivative."""

KINKED: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
}
"""Activations whose second derivative jumps or is zero almost everywhere."""


def activation(name: str, *, in_y: bool = True) -> nn.Module:
    """The activation of a name in `SMOOTH` or `KINKED`.

    Args:
        name: of the activation.
        in_y: whether y passes through it. Then one with a kink is warned of: inference steps on
            the energy's slope, and gradients through inference on its curvature ∂²E/∂y², which a
            piecewise linear network lacks.

    Raises:
        ValueError: for an unknown name.
    """
    known = SMOOTH | KINKED
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"activation must be one of {', '.join(known)}; got {name!r}.{hint}")
    if in_y and name in KINKED:
        warnings.warn(
            f"activation={name!r} has no second derivative where it matters: gradients through "
            f"inference miss the energy's curvature in y. Use one of {', '.join(SMOOTH)}.",
            stacklevel=3,
        )
    return known[name]()


def perceptron(
    sizes: Sequence[int], name: str, *, dropout: float = 0.0, input_dropout: float = 0.0
) -> nn.Sequential:
    """Linear layers of the given sizes, the inputs first, each followed by an activation.

    Args:
        sizes: units of each layer.
        name: of the activation, in `SMOOTH` or `KINKED`.
        dropout: probability of dropping a unit after an activation.
        input_dropout: probability of dropping an input.

    Raises:
        ValueError: if a size is below one, a probability not in [0, 1), or the name unknown.
    """
    for size in sizes:
        check_count("a layer's size", size)
    layers: list[nn.Module] = []
    if _probability("input_dropout", input_dropout) > 0:
        layers.append(nn.Dropout(input_dropout))
    for num_in, num_out in itertools.pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), activation(name, in_y=False)]
        if _probability("dropout", dropout) > 0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


class MLPEncoder(nn.Module):
    """Scores s(x) of the labels by a perceptron, and where wanted its last hidden layer F(x):
    `{"scores": [B, L], "features": [B, H]}`.

    The scores are logits: −⟨y, s(x)⟩ is the local part of an energy, and σ(s(x)) the prediction of
    the same network trained as a classifier, label by label.

    Args:
        num_inputs: D of the inputs `[B, D]`.
        num_labels: L.
        widths: units of the hidden layers.
        activation: of the hidden layers, a name in `SMOOTH` or `KINKED`; y does not pass through.
        dropout: probability of dropping a hidden unit.
        input_dropout: probability of dropping an input.
        with_features: whether the encoding holds F(x), for a head that is conditional on it.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        num_inputs: int,
        num_labels: int,
        *,
        widths: Sequence[int] = (150, 150),
        activation: str = "softplus",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        with_features: bool = False,
    ) -> None:
        super().__init__()
        sizes = [num_inputs, *widths]
        self.hidden = perceptron(sizes, activation, dropout=dropout, input_dropout=input_dropout)
        self.scores = nn.Linear(sizes[-1], check_count("num_labels", num_labels))
        self.with_features = with_features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Scores `[B, L]` of inputs `[B, D]`, and features `[B, H]` where the head wants them."""
        features = self.hidden(x)
        encoding = {"scores": self.scores(features)}
        return encoding | {"features": features} if self.with_features else encoding

    def initial(self, encoding: dict[str, Tensor]) -> Tensor:
        """The classifier's prediction σ(s) `[B, L]`."""
        return torch.sigmoid(encoding["scores"])


def inverse_softplus(values: Tensor) -> Tensor:
    """The tensor whose softplus is `values`, all above zero."""
    return values + (-torch.expm1(-values)).log()


def _probability(name: str, value: float) -> float:
    if check_range(name, value, 0.0, 1.0) == 1:
        raise ValueError(f"{name}=1 drops everything; expected a probability below 1.")
    return value
