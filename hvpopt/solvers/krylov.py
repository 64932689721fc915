"""An orthonormal Krylov basis, kept as the rows of a few matrices."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.solvers.flat import Flat
from hvpopt.trees import TensorList

_BLOCK = 32  # vectors of a matrix: memory is taken as the basis grows
_UNSEEN = 8  # within this part of an eigenvalue others are thought of that have not yet shown


@dataclass(frozen=True)
class Ritz:
    """The eigenpairs of a symmetric A's restriction to a basis of m vectors."""

    values: Tensor
    """(m,) θ in ascending order, float64 on the CPU."""
    weights: Tensor
    """(m, m): the columns s of the Ritz vectors v = Q s."""
    bounds: Tensor
    """(m,) ‖A v − θ v‖: an eigenvalue of A lies within that of θ."""
    errors: Tensor
    """(m,) what θ is expected to be off by: the bound, or where that is less its square over the
    gap, the distance to the next Ritz value less that one's bound, at most |θ|/8."""

    @property
    def scale(self) -> float:
        """The largest |θ|, an estimate of ‖A‖ from below."""
        return float(self.values.abs().max())


class KrylovBasis:
    """Orthonormal vectors Q, grown by products with A, and the coefficients of A Q = Q H.

    A is symmetric, so that a product's components are those along the vectors whose products
    reached its own, and later ones. The product is orthogonalised against these first, and then
    against all, which removes what rounding has left along the others; once more where that
    shortened it, as that leaves new rounding behind (Parlett, The Symmetric Eigenvalue Problem,
    section 6.9).

    Args:
        apply: v ↦ A v on lists shaped like ``like``.
        like: Gives shapes, dtypes and devices.
        capacity: The most vectors that will be held.
    """

    def __init__(
        self, apply: Callable[[TensorList], TensorList], like: TensorList, capacity: int
    ) -> None:
        self._apply, self._space = apply, Flat(like)
        self._capacity = min(capacity, self._space.n)
        self._blocks: list[Tensor] = []
        self._columns: list[list[float]] = []
        self._scale = 0.0
        self.size = 0
        """How many vectors there are."""
        self.rounding: float = torch.finfo(self._space.dtype).eps
        """The machine's ε of the vectors."""

    @property
    def num_products(self) -> int:
        """How many vectors' products are known: the first ones; before a restart all products."""
        return len(self._columns)

    def append(self, direction: TensorList) -> bool:
        """Adds what ``direction`` has outside of the basis; False if that is nothing."""
        return self.append_flat(self._space.flat(direction))

    def append_flat(self, w: Tensor) -> bool:
        """The same for a vector (n,)."""
        length = float(torch.linalg.vector_norm(w))
        if not 0 < length < math.inf:
            return False
        _, rest, remainder = self._orthogonalised(w / length, near=0)
        return self._grow(rest, remainder, 1.0)

    def expand(self) -> bool:
        """Applies A to the next vector and adds the product's new direction, if it has one.

        False, and nothing is added, if the product is not finite.
        """
        return self.absorb(self._space.flat(self._apply(self.vector(self.num_products))))

    def absorb(self, product: Tensor) -> bool:
        """`expand` with A times the next vector, (n,), computed elsewhere; it is overwritten."""
        j = self.num_products
        near = next((i for i, column in enumerate(self._columns) if len(column) > j), j)
        inside, rest, remainder = self._orthogonalised(product, near=near)
        if not math.isfinite(remainder + sum(map(abs, inside))):
            return False
        self._scale = max(self._scale, math.hypot(remainder, *inside))
        grown = self._grow(rest, remainder, self._scale)
        self._columns.append([*inside, remainder] if grown else inside)
        return True

    def pending(self) -> Tensor:
        """The vectors that A has not been applied to, as rows."""
        rows = [self._row(i) for i in range(self.num_products, self.size)]
        return torch.stack(rows) if rows else torch.empty(0, self._space.n)

    def vector(self, i: int) -> TensorList:
        """The i-th basis vector as a list."""
        return self._space.listed(self._row(i))

    def combine(self, weights: Tensor) -> TensorList:
        """Σᵢ weightsᵢ qᵢ as a list."""
        return self._space.listed(self._combinations(weights[None])[0])

    def coefficients(self) -> Tensor:
        """H as a (size, num_products) float64 matrix on the CPU."""
        matrix = torch.zeros(self.size, self.num_products, dtype=torch.float64)
        for j, column in enumerate(self._columns):
            matrix[: len(column), j] = torch.tensor(column, dtype=torch.float64)
        return matrix

    def ritz(self) -> Ritz:
        """Rayleigh-Ritz on the vectors that A was applied to, of which there is at least one.

        With H = [T; R], T square and symmetric, T s = θ s: the vector v = Q s has the residual
        A v − θ v = Q [0; R s].
        """
        matrix, m = self.coefficients(), self.num_products
        square = matrix[:m]
        values, weights = torch.linalg.eigh((square + square.T) / 2)
        bounds = torch.linalg.vector_norm(matrix[m:] @ weights, dim=0)
        far = bounds.new_full((1,), math.inf)
        apart = values.diff()
        below = torch.cat((far, apart - bounds[:-1]))  # the neighbour's eigenvalue may be nearer
        above = torch.cat((apart - bounds[1:], far))
        gaps = torch.minimum(torch.minimum(below, above), values.abs() / _UNSEEN)
        errors = torch.where(gaps > bounds, bounds**2 / gaps, bounds)
        return Ritz(values, weights, bounds, errors)

    def needs_room(self, count: int) -> bool:
        """Whether ``count`` more vectors are more than may be held, and the space has them."""
        return self._capacity < self._space.n and self.size + count > self._capacity

    def restart(self, ritz: Ritz, keep: list[int]) -> None:
        """Puts some Ritz vectors in the place of all vectors that A was applied to.

        With the vectors P that wait for their product, A Q = Q T + P R: the Ritz vectors V = Q S
        have A V = V Θ + P R S, so that V and P go on as the basis did (thick restart, Wu and
        Simon, SIAM J. Matrix Anal. Appl. 22, 2000).
        """
        coupling = self.coefficients()[self.num_products :] @ ritz.weights[:, keep]
        vectors = self._combinations(ritz.weights[:, keep].T)
        rows = [*vectors, *self.pending()]
        self.size = len(rows)
        for i, row in enumerate(rows):
            self._row(i).copy_(row)
        self._columns = [
            [0.0] * i
            + [float(ritz.values[j])]
            + [0.0] * (len(keep) - 1 - i)
            + coupling[:, i].tolist()
            for i, j in enumerate(keep)
        ]

    def _combinations(self, weights: Tensor) -> Tensor:
        """The rows of ``weights`` (k, m) times the first m vectors, (k, n)."""
        weights = weights.to(self._space.device, self._space.dtype)
        parts = weights.split(_BLOCK, dim=1)
        sums = [w @ block[: w.shape[1]] for w, block in zip(parts, self._blocks, strict=False)]
        return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]

    def _row(self, i: int) -> Tensor:
        return self._blocks[i // _BLOCK][i % _BLOCK]

    def _orthogonalised(self, w: Tensor, *, near: int) -> tuple[list[float], Tensor, float]:
        """Coefficients of ``w`` in the basis, the rest of it, and the rest's norm.

        ``w`` lies along the vectors from ``near`` on, but for rounding.
        """
        inside = torch.zeros(self.size, dtype=torch.float64)
        if near > 0:
            self._remove(w, inside, near)
        length = float(torch.linalg.vector_norm(w))
        for _ in range(3):
            self._remove(w, inside, 0)
            before, length = length, float(torch.linalg.vector_norm(w))
            if not length < before / 2:
                break
        return inside.tolist(), w, length

    def _remove(self, w: Tensor, inside: Tensor, first: int) -> None:
        """Subtracts from ``w`` its components along the vectors from ``first`` on, in place."""
        for i, block in enumerate(self._blocks):
            low, high = max(first - i * _BLOCK, 0), min(self.size - i * _BLOCK, _BLOCK)
            if low < high:
                rows = block[low:high]
                components = rows @ w
                w.addmv_(rows.T, components, alpha=-1.0)
                inside[i * _BLOCK + low : i * _BLOCK + high] += components.cpu().double()

    def _grow(self, rest: Tensor, remainder: float, scale: float) -> bool:
        """Adds ``rest`` as a vector unless it is rounding next to ``scale``."""
        if self.size == self._capacity or remainder <= 10 * self.rounding * scale:
            return False
        if self.size == _BLOCK * len(self._blocks):
            rows = min(_BLOCK, self._capacity - self.size)
            space = self._space
            block = torch.empty(rows, space.n, dtype=space.dtype, device=space.device)
            self._blocks.append(block)
        torch.div(rest, remainder, out=self._row(self.size))
        self.size += 1
        return True
