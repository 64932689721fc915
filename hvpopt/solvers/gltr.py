"""The trust-region subproblem on a Krylov space, solved again for any radius."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.solvers.checks import Operator, checked_map, checked_vector
from hvpopt.solvers.krylov import KrylovBasis
from hvpopt.solvers.result import Status, TrustRegionStep
from hvpopt.solvers.steihaug import checked_scaling
from hvpopt.trees import TensorList

_NOTHING = torch.zeros(0, dtype=torch.float64)


class KrylovTrustRegion:
    """The quadratic model m(x) = ½ xᵀAx − bᵀx on the Krylov space of b, for any radius.

    On an orthonormal basis Q of b, A b, A² b, … the model is that of a tridiagonal T = QᵀAQ,
    whose minimiser h within ‖h‖ ≤ radius comes from T's eigenvalues. Unlike truncated conjugate
    gradients, x = Q h goes on improving along the boundary, and a second, smaller radius costs no
    product. The basis is kept: memory for as many vectors as there were products. It holds no
    eigenvector that is orthogonal to b, so at a saddle point this is not the way out.

    Args:
        matvec: v ↦ A v, A symmetric, on lists shaped like ``b``.
        b: The right-hand side, minus the gradient of f.
        scaling: Positive entries d, shaped like ``b``: the region is ‖d ⊙ x‖ ≤ radius.
        max_steps: The most products, over all radii.

    Raises:
        TypeError: If ``b`` holds tensors that are not real floating point.
        ValueError: For an empty ``b``, ``max_steps`` < 1, a scaling that is not positive, or
            shapes that differ from those of ``b``.

    Source: Gould, Lucidi, Roma and Toint, "Solving the trust-region subproblem using the Lanczos
    method" (SIAM J. Optim. 9, 1999); Conn, Gould and Toint (2000), section 7.5.4. Here the basis
    is orthogonalised in full, and T diagonalised.

    Examples:
        >>> A = torch.tensor([2.0, -1.0])
        >>> region = KrylovTrustRegion(lambda v: [A * v[0]], [torch.tensor([1.0, 1.0])])
        >>> step = region.step(radius=2.0)
        >>> round(step.norm, 4), step.is_on_boundary, step.num_products
        (2.0, True, 2)
    """

    def __init__(
        self,
        matvec: Operator,
        b: Sequence[Tensor],
        *,
        scaling: Sequence[Tensor] | None = None,
        max_steps: int = 250,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"KrylovTrustRegion needs max_steps ≥ 1, got {max_steps}.")
        b = checked_vector(b, "the right-hand side")
        apply = checked_map(matvec, b, "matvec")
        self._scaling = None if scaling is None else checked_scaling(scaling, b)
        self._max_steps = max_steps
        self._zero = trees.zeros_like(b)
        scaled = lambda v: self._unscaled(apply(self._unscaled(v)))  # noqa: E731
        self._basis = KrylovBasis(scaled, b, max_steps + 1)
        rhs = self._unscaled(b)
        self._rhs_norm = float(trees.norm(rhs))
        if math.isfinite(self._rhs_norm):
            self._basis.append(rhs)
        self._has_broken_down = not math.isfinite(self._rhs_norm)
        self._eigen = (_NOTHING, _NOTHING)
        self._outside = 0.0

    @property
    def num_products(self) -> int:
        """Products with A so far."""
        return self._basis.num_products

    @property
    def eigenvalue_bounds(self) -> tuple[float, float]:
        """The least and the largest eigenvalue of T, which lie within those of A; NaN before."""
        values = self._eigen[0]
        return (float(values[0]), float(values[-1])) if len(values) else (math.nan, math.nan)

    def step(self, radius: float, *, rtol: float = 1e-3, min_steps: int = 1) -> TrustRegionStep:
        """The minimiser within the radius, on a Krylov space grown until

            ‖(A + λ I) x − b‖ ≤ rtol ‖b‖,

        λ ≥ 0 the multiplier of the constraint; all in the variables d ⊙ x where there is a
        scaling.

        Args:
            radius: Positive; infinite for the minimiser itself, where T is positive definite.
            rtol: As above.
            min_steps: The fewest products, unless the space is exhausted before.

        Returns:
            The step; its status is CONVERGED inside, BOUNDARY or, where T is not positive
            definite, NEGATIVE_CURVATURE on the boundary; STEP_LIMIT or BREAKDOWN where the
            tolerance was not met, with the minimiser on what there is.

        Raises:
            ValueError: For a radius or an ``rtol`` that is not positive.
        """
        if not radius > 0:
            raise ValueError(f"A trust region needs a positive radius, got {radius}.")
        if not rtol > 0:
            raise ValueError(f"The tolerance rtol must be positive, got {rtol}.")
        if self._rhs_norm == 0.0:
            return self._result(_NOTHING, 0.0, Status.CONVERGED, radius)
        if self._has_broken_down and not self.num_products:
            return self._result(_NOTHING, 0.0, Status.BREAKDOWN, radius)
        while True:
            m = self.num_products
            if m:
                h, multiplier = _minimiser(*self._eigen, self._rhs_norm, radius)
                residual = self._outside * abs(float(self._eigen[1][-1] @ h))
                is_exhausted = self._outside == 0.0
                enough = m >= min_steps and residual <= rtol * self._rhs_norm
                if is_exhausted or enough:
                    return self._result(h, residual, self._inside_or_not(multiplier), radius)
                if m >= self._max_steps or self._has_broken_down:
                    limit = Status.BREAKDOWN if self._has_broken_down else Status.STEP_LIMIT
                    return self._result(h, residual, limit, radius)
            if not self._grow(1 + m // 8) and not self.num_products:
                return self._result(_NOTHING, 0.0, Status.BREAKDOWN, radius)

    def _inside_or_not(self, multiplier: float) -> Status:
        if multiplier <= 0:
            return Status.CONVERGED
        return Status.NEGATIVE_CURVATURE if self._eigen[0][0] <= 0 else Status.BOUNDARY

    def _grow(self, num_steps: int) -> bool:
        """Adds products; whether there was one."""
        before = self.num_products
        for _ in range(min(num_steps, self._max_steps - before)):
            if self.num_products == self._basis.size:
                break
            if not self._basis.expand():
                self._has_broken_down = True
                break
        m = self.num_products
        if m == before:
            return False
        coefficients = self._basis.coefficients()
        square = coefficients[:m]
        values, vectors = torch.linalg.eigh((square + square.T) / 2)
        self._eigen = (values, vectors)
        self._outside = float(coefficients[m, m - 1]) if self._basis.size > m else 0.0
        return True

    def _result(self, h: Tensor, residual: float, status: Status, radius: float) -> TrustRegionStep:
        values, vectors = self._eigen
        m = len(h)
        norm, model = 0.0, 0.0
        if m:
            norm = float(torch.linalg.vector_norm(h))
            model = float((0.5 * values * h - self._rhs_norm * vectors[0]) @ h)
        return TrustRegionStep(
            value=self._unscaled(self._basis.combine(vectors @ h))
            if m
            else trees.clone(self._zero),
            status=status,
            num_steps=m,
            num_products=self.num_products,
            residual_norm=residual if m else self._rhs_norm,
            model_values=(0.0, model) if m else (0.0,),
            min_curvature=float(values[0]) if m else math.inf,
            norm=norm,
            is_on_boundary=m > 0 and norm >= radius * (1 - 1e-9),
        )

    def _unscaled(self, xs: TensorList) -> TensorList:
        """D⁻¹ x."""
        if self._scaling is None:
            return xs
        return [x / d for x, d in zip(xs, self._scaling, strict=True)]


def _minimiser(
    values: Tensor, vectors: Tensor, rhs_norm: float, radius: float
) -> tuple[Tensor, float]:
    """The minimiser of ½ hᵀTh − ‖b‖ h₁ within ‖h‖ ≤ radius, and its multiplier λ.

    It is given in T's eigenvectors, ĥ, where (θ + λ) ĥ = c. With the gaps θ − θ₁ and
    μ = λ + θ₁, ‖ĥ(μ)‖ falls from at least the radius at μ = |c₁|/radius, and Newton's method on
    1/‖ĥ‖ = 1/radius rises to the root from the left.

    Source: Moré and Sorensen (SIAM J. Sci. Stat. Comput. 4, 1983).
    """
    c = rhs_norm * vectors[0]
    least = float(values[0])
    scale = max(abs(least), abs(float(values[-1])))
    if least > 0:
        h = c / values
        if float(torch.linalg.vector_norm(h)) <= radius:
            return h, 0.0
    if not math.isfinite(radius):
        raise ValueError(
            "The quadratic model is unbounded below: give a finite radius where the matrix may "
            "have eigenvalues that are not positive."
        )
    gaps = values - least
    tiny = 0.0 if least > 0 else 1e-14 * max(scale, rhs_norm / radius)
    mu = max(least, abs(float(c[0])) / radius, tiny)
    for _ in range(100):
        h = c / (gaps + mu)
        length = float(torch.linalg.vector_norm(h))
        if length <= radius * (1 + 1e-12):
            break
        slope = float((h * h / (gaps + mu)).sum())
        mu += length**2 / slope * (length - radius) / radius
    missing = radius**2 - float(h @ h)
    if (
        least <= 0 and missing > 1e-10 * radius**2
    ):  # b has next to nothing along the first eigenvector
        first = float(h[0])
        h = h.clone()
        h[0] = math.copysign(math.sqrt(first**2 + missing), first)
    return h * (radius / float(torch.linalg.vector_norm(h))), mu - least
