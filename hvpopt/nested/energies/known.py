"""Energies of outputs about which something is known: conditioning at prediction, not in training.

Known entries of y are put in their places, and known measurements A y = b add a term to the
energy. Neither needs a part in training: one energy answers every such question, where a network
from x to y would have to be trained on each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvpopt.nested.energy import Energy
from hvpopt.options import check_range

__all__ = ["KnownEntries", "KnownMeasurements"]


class KnownEntries(nn.Module):
    """E(x, Π(y)), where Π puts the entries of y that are known in their places.

    The gradient by a known entry is exactly zero. An inference by `GradientDescent` or `HeavyBall`
    that starts at `complete(encoding, y0)`, in a `Box` or without bounds, leaves it as given, to
    the bit; after one on logits, where rounding or an entropy moves it, `complete` puts it back.

    The encoding holds `"known": [B, *shape]`, boolean, and `"values": [B, *shape]`, of which what
    is not known is not used (for gradients by the values it must be finite); besides, what the head
    needs.

    Args:
        head: `(encoding, y[B, *shape])` to energies `[B]`; it is given the whole encoding.

    Example:
        >>> head = KnownEntries(lambda encoding, y: (y[:, 0] - y[:, 1]) ** 2)
        >>> known = torch.tensor([[True, False]])
        >>> head({"known": known, "values": torch.tensor([[3.0, 0.0]])}, torch.tensor([[0.0, 5.0]]))
        tensor([4.])
    """

    def __init__(self, head: Energy) -> None:
        super().__init__()
        self.head = head

    def forward(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Energies `[B]` of outputs `[B, *shape]`."""
        return self.head(encoding, self.complete(encoding, y))

    def complete(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Π(y) `[B, *shape]`.

        Raises:
            TypeError: for entries known by anything but booleans.
            ValueError: for shapes that are not that of y.
        """
        known, values = encoding["known"], encoding["values"]
        if known.dtype != torch.bool:
            raise TypeError(f"encoding['known'] is {known.dtype}; expected torch.bool.")
        for name, given in (("known", known), ("values", values)):
            if given.shape != y.shape:
                raise ValueError(
                    f"encoding[{name!r}] has shape {tuple(given.shape)} for outputs of shape "
                    f"{tuple(y.shape)}; expected the same."
                )
        return torch.where(known, values.to(y.dtype), y)


class KnownMeasurements(nn.Module):
    """E(x, y) + w/2 ‖A⁺(A y − b)‖²: half the squared distance from y to the outputs with A y = b,
    with the pseudo-inverse A⁺, is added to an energy, w times.

    The larger w, the better the measurements are met: at a minimum without bounds the distance is
    ‖∂E/∂y‖ / w or less. The term's curvature is w along the rows of A and 0 elsewhere, whatever
    their scale, so that step sizes are to be below 2 / (w + L), with the curvature L of E. The
    measurements may depend on each other (A of any rank); those that contradict each other are met
    in the least-squares sense.

    The encoding holds `"measured": [B, M]`, b; besides, what the head needs.

    Args:
        head: `(encoding, y[B, *shape])` to energies `[B]`; it is given the whole encoding.
        matrix: A, `[M, N]`, the same for all examples, where N is the number of y's entries.
        weight: w.

    Raises:
        ValueError: for a matrix that is none, or a weight that is not above zero.

    Example:
        >>> head = KnownMeasurements(lambda encoding, y: y[:, 0] ** 2, torch.ones(1, 2), weight=4.0)
        >>> head({"measured": torch.tensor([[3.0]])}, torch.tensor([[0.0, 1.0]])).round(decimals=3)
        tensor([4.])
    """

    matrix: Tensor
    inverse: Tensor

    def __init__(self, head: Energy, matrix: Tensor, *, weight: float = 10.0) -> None:
        super().__init__()
        if matrix.dim() != 2 or not matrix.is_floating_point():
            raise ValueError(
                f"matrix has shape {tuple(matrix.shape)} and {matrix.dtype}; expected floating "
                "point (measurements, entries of y)."
            )
        self.head = head
        self.weight = check_range("weight", weight, 1e-12)
        self.register_buffer("matrix", matrix, persistent=False)
        inverse = torch.linalg.pinv(matrix.double()).to(matrix.dtype)
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """Energies `[B]` of outputs `[B, *shape]`."""
        distances = self.excess(encoding, y).square().flatten(1).sum(1)
        return self.head(encoding, y) + 0.5 * self.weight * distances

    def excess(self, encoding: dict[str, Tensor], y: Tensor) -> Tensor:
        """A⁺(A y − b) `[B, *shape]`; y less this is the nearest output with the measurements.

        Raises:
            ValueError: for another number of measurements or entries than the matrix has.
        """
        measured, flat = encoding["measured"], y.flatten(1)
        if self.matrix.shape != (measured.shape[1], flat.shape[1]):
            raise ValueError(
                f"The matrix takes {self.matrix.shape[1]} entries to {self.matrix.shape[0]} "
                f"measurements; encoding['measured'] has shape {tuple(measured.shape)} and y "
                f"{tuple(y.shape)}."
            )
        return ((flat @ self.matrix.T - measured) @ self.inverse.T).view_as(y)
