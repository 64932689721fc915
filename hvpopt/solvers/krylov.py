"""An orthonormal Krylov basis, kept as the rows of one matrix."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hvpopt.trees import TensorList


class KrylovBasis:
    """Orthonormal vectors Q, grown by products with A, and the coefficients of A Q = Q H.

    Vectors are flat rows here, float32 or wider on the first tensor's device, because
    orthogonalising against all earlier ones is then two matrix-vector products instead of
    dozens of small ones for each of them.

    Args:
        apply: v ↦ A v on lists shaped like ``like``.
        like: Gives shapes, dtypes and devices.
        capacity: The most vectors that will be held.
    """

    def __init__(
        self, apply: Callable[[TensorList], TensorList], like: TensorList, capacity: int
    ) -> None:
        self._apply, self._like = apply, like
        wide = any(x.dtype == torch.float64 for x in like)
        n = sum(x.numel() for x in like)
        self._rows = torch.empty(
            min(capacity, n),
            n,
            dtype=torch.float64 if wide else torch.float32,
            device=like[0].device,
        )
        self._columns: list[list[float]] = []
        self._scale = 0.0
        self.size = 0
        """How many vectors there are."""
        self.rounding: float = torch.finfo(self._rows.dtype).eps
        """The machine's ε of the vectors."""

    @property
    def num_products(self) -> int:
        """How many vectors A has been applied to: the first ones."""
        return len(self._columns)

    def append(self, direction: TensorList) -> bool:
        """Adds what ``direction`` has outside of the basis; False if that is nothing."""
        w = self._flat(direction)
        length = float(torch.linalg.vector_norm(w))
        if not 0 < length < math.inf:
            return False
        _, rest, remainder = self._orthogonalised(w / length)
        return self._grow(rest, remainder, 1.0)

    def expand(self) -> bool:
        """Applies A to the next vector and adds the product's new direction, if it has one.

        False, and nothing is added, if the product is not finite.
        """
        j = self.num_products
        w = self._flat(self._apply(self.vector(j)))
        inside, rest, remainder = self._orthogonalised(w)
        if not math.isfinite(remainder + sum(map(abs, inside))):
            return False
        self._scale = max(self._scale, math.hypot(remainder, *inside))
        grown = self._grow(rest, remainder, self._scale)
        self._columns.append([*inside, remainder] if grown else inside)
        return True

    def vector(self, i: int) -> TensorList:
        """The i-th basis vector as a list."""
        return self._listed(self._rows[i])

    def combine(self, weights: Tensor) -> TensorList:
        """Σᵢ weightsᵢ qᵢ as a list."""
        weights = weights.to(self._rows.device, self._rows.dtype)
        return self._listed(weights @ self._rows[: len(weights)])

    def coefficients(self) -> Tensor:
        """H as a (size, num_products) float64 matrix on the CPU."""
        matrix = torch.zeros(self.size, self.num_products, dtype=torch.float64)
        for j, column in enumerate(self._columns):
            matrix[: len(column), j] = torch.tensor(column, dtype=torch.float64)
        return matrix

    def ritz_pairs(
        self, k: int
    ) -> tuple[tuple[float, ...], tuple[Tensor, ...], tuple[float, ...], float]:
        """The k largest Ritz values, their weights, residual norms, and an estimate of ‖A‖.

        With H = [T; R], T square and symmetric, T s = θ s: the vector v = Q s has the residual
        A v − θ v = Q [0; R s].
        """
        matrix, m = self.coefficients(), self.num_products
        square = matrix[:m]
        values, weights = torch.linalg.eigh((square + square.T) / 2)
        top = range(m - 1, m - 1 - k, -1)
        outside = torch.linalg.vector_norm(matrix[m:] @ weights, dim=0)
        return (
            tuple(float(values[i]) for i in top),
            tuple(weights[:, i] for i in top),
            tuple(float(outside[i]) for i in top),
            float(values.abs().max()),
        )

    def _orthogonalised(self, w: Tensor) -> tuple[list[float], Tensor, float]:
        """Coefficients of ``w`` in the basis, the rest of it, and the rest's norm."""
        rows = self._rows[: self.size]
        inside = rows @ w
        w = w - inside @ rows
        again = rows @ w  # once leaves rounding behind, twice is enough (Parlett, section 6.9)
        w = w - again @ rows
        *numbers, remainder = torch.cat(
            (inside + again, torch.linalg.vector_norm(w).reshape(1))
        ).tolist()
        return numbers, w, remainder

    def _grow(self, rest: Tensor, remainder: float, scale: float) -> bool:
        """Adds ``rest`` as a vector unless it is rounding next to ``scale``."""
        if self.size == len(self._rows) or remainder <= 10 * self.rounding * scale:
            return False
        self._rows[self.size] = rest / remainder
        self.size += 1
        return True

    def _flat(self, xs: TensorList) -> Tensor:
        """A list as one wide vector."""
        rows = self._rows
        return torch.cat([x.reshape(-1).to(rows.device, rows.dtype) for x in xs])

    def _listed(self, flat: Tensor) -> TensorList:
        """A flat vector as a new list of the shapes, dtypes and devices of ``like``."""
        parts = flat.split([x.numel() for x in self._like])
        return [
            part.reshape(x.shape).to(x.device, x.dtype, copy=True)
            for part, x in zip(parts, self._like, strict=True)
        ]
