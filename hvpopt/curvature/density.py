"""The spectral density of an operator, by stochastic Lanczos quadrature."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.curvature.bands import ScalarEstimate, mean_estimate, standard_error
from hvpopt.curvature.quadrature import quadratures
from hvpopt.operators import LinearOperator
from hvpopt.options import check_count
from hvpopt.solvers.checks import Operator
from hvpopt.solvers.rows import Rows


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of an operator's n eigenvalues, as nodes and weights from p probes.

    Each probe's nodes and weights are a distribution by themselves; their mean is the estimate,
    and how much they differ says how far it can be trusted. NaN throughout where a product was
    not finite.
    """

    nodes: Tensor
    """(p, m) float64 on the CPU, in the operator's units, ascending in each row."""
    weights: Tensor
    """(p, m) float64; each row sums to 1. Where m was more than needed, zeros fill up."""
    dimension: int
    """n."""
    num_products: int
    """Products with A, p m."""

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest node, which lie within the spectrum's ends."""
        return float(self.nodes.min()), float(self.nodes.max())

    @property
    def default_sigma(self) -> float:
        """A hundredth of the range; of the largest node where all are one, or 1 for zero."""
        low, high = self.range
        return (high - low) / 100 or abs(high) / 100 or 1.0

    def evaluate(self, grid: Tensor, sigma: float | None = None) -> Tensor:
        """The density at the points of a grid, (g,) float64, smoothed by a normal kernel.

        It integrates to 1; times n it is the number of eigenvalues in a unit.

        Args:
            grid: (g,), in the operator's units.
            sigma: the kernel's standard deviation, `default_sigma` by default.

        Raises:
            ValueError: For a sigma that is not positive.
        """
        return self._smoothed(grid, sigma).mean(0)

    def spread(self, grid: Tensor, sigma: float | None = None) -> Tensor:
        """The standard error of `evaluate` over the probes, (g,); ∞ for a single probe."""
        return standard_error(self._smoothed(grid, sigma))

    def _smoothed(self, grid: Tensor, sigma: float | None) -> Tensor:
        """Each probe's smoothed density, (p, g)."""
        if sigma is None:
            sigma = self.default_sigma
        elif not sigma > 0:
            raise ValueError(f"A density is smoothed with sigma > 0, got {sigma}.")
        apart = (grid.cpu().double()[None, :, None] - self.nodes[:, None, :]) / sigma
        kernel = torch.exp(-(apart**2) / 2) / (sigma * math.sqrt(2 * math.pi))
        return (kernel @ self.weights[:, :, None]).squeeze(2)

    def histogram(self, bins: int | Tensor = 64) -> tuple[Tensor, Tensor]:
        """The share of eigenvalues in each of b bins (b,), and the bins' edges (b + 1,), float64.

        Args:
            bins: how many, of one width over the range; or ascending edges, beyond which what
                lies outside is left out. A node on an edge counts above it, on the last below.

        Raises:
            ValueError: For no bin, or edges that do not ascend.
        """
        if isinstance(bins, Tensor):
            edges = bins.cpu().double()
            if edges.dim() != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
                raise ValueError(f"The edges of bins must ascend, got {edges.tolist()}.")
        else:
            low, high = self.range
            pad = 0.0 if high > low else self.default_sigma
            edges = torch.linspace(low - pad, high + pad, check_count("bins", bins) + 1).double()
            edges[0], edges[-1] = low - pad, high + pad
        count = len(edges) - 1
        where = torch.searchsorted(edges, self.nodes.flatten(), right=True) - 1
        where[self.nodes.flatten() == edges[-1]] = count - 1
        inside = (where >= 0) & (where < count)
        mass = torch.zeros(count, dtype=torch.float64)
        mass.index_add_(0, where[inside], self.weights.flatten()[inside] / len(self.weights))
        return mass, edges

    def expectation(self, f: Callable[[Tensor], Tensor]) -> ScalarEstimate:
        """tr f(A) / n, the mean of f over the eigenvalues, with its spread over the probes.

        Args:
            f: an elementwise function on float64 tensors.
        """
        terms = torch.where(self.weights == 0, 0.0, self.weights * f(self.nodes)).sum(1)
        return mean_estimate(terms, self.num_products, ScalarEstimate)

    def share_below(self, x: float) -> ScalarEstimate:
        """The share of the eigenvalues that are ≤ x, with its spread over the probes."""
        return self.expectation(lambda nodes: (nodes <= x).double())


def spectral_density(
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    num_probes: int = 4,
    num_steps: int = 40,
    reorthogonalize: bool = True,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The distribution of a symmetric A's eigenvalues, by stochastic Lanczos quadrature.

    For a probe z of signs, zᵀ f(A) z / n averages to tr f(A) / n, the mean of f over the
    eigenvalues. m steps of Lanczos from z give nodes θ and weights w with

        Σⱼ wⱼ f(θⱼ) = zᵀ f(A) z / n   for polynomials f up to degree 2m − 1.

    So details narrower than some 1/m of the range are not resolved, except at its ends; and the
    probes' spread falls with the root of n times their number.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices.
        num_probes: p; their Lanczos runs go in step, so that over a dataset one pass makes p
            products.
        num_steps: m, for each probe. The cost is p m products and, with reorthogonalisation,
            p m vectors of memory.
        reorthogonalize: False holds only 3 p vectors. Outer nodes then come in copies that share
            their weight, which no smoothed density or histogram shows.
        generator: For the probes (a CPU generator).

    Raises:
        ValueError: For ``num_probes`` or ``num_steps`` < 1, an empty ``like``, an operator that is
            not symmetric, or products of other shapes.
        TypeError: If ``like`` is missing or holds tensors that are not real floating point.

    Source: Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"
    (SIAM J. Matrix Anal. Appl. 38, 2017); of networks' Hessians Ghorbani, Krishnan and Xiao, "An
    investigation into neural net optimization via Hessian eigenvalue density" (ICML 2019).

    Examples:
        >>> d = torch.tensor([1.0, 1.0, 1.0, 5.0])
        >>> density = spectral_density(lambda v: [d * v[0]], [d])
        >>> round(density.share_below(2.0).value, 4)
        0.75
    """
    check_count("num_probes", num_probes)
    check_count("num_steps", num_steps)
    rows = Rows(operator, like)
    steps = min(num_steps, rows.n)
    starts = rows.signs(num_probes, generator)
    try:
        nodes, weights = quadratures(rows, starts, steps, reorthogonalize=reorthogonalize)
    except FloatingPointError:
        nodes = torch.full((num_probes, steps), math.nan, dtype=torch.float64)
        weights = nodes.clone()
    return SpectralDensity(nodes, weights, rows.n, rows.num_products)


def effective_dimension(
    operator: LinearOperator | Operator,
    like: Sequence[Tensor] | None = None,
    *,
    damping: float,
    num_probes: int = 10,
    num_steps: int = 40,
    generator: torch.Generator | None = None,
) -> ScalarEstimate:
    """Σᵢ λᵢ / (λᵢ + damping) over the eigenvalues of a positive semi-definite A.

    How many directions the data determine against a prior, or a penalty, of that strength; by
    stochastic Lanczos quadrature (`spectral_density`), ``num_probes · num_steps`` products. For a
    Hessian, which has negative eigenvalues, take the GGN or Fisher matrix.

    Args:
        operator: A `LinearOperator`, or v ↦ A v on lists shaped like ``like``.
        like: For the latter: gives shapes, dtypes and devices.
        damping: λ > 0, in the units of A.
        num_probes: of signs.
        num_steps: of Lanczos for each; more for a small damping.
        generator: For the probes (a CPU generator).

    Returns:
        The estimate with its spread over the probes; NaN if a product is not finite.

    Raises:
        ValueError: For a damping that is not positive, for an eigenvalue below −damping / 2, and
            as `spectral_density`.
        TypeError: As `spectral_density`.

    Source: MacKay, "Bayesian interpolation" (Neural Computation 4, 1992), where it is γ.

    Examples:
        >>> d = torch.tensor([3.0, 1.0, 0.0])
        >>> round(effective_dimension(lambda v: [d * v[0]], [d], damping=1.0).value, 4)
        1.25
    """
    if not 0 < damping < math.inf:
        raise ValueError(f"damping={damping!r} is out of range: expected a positive number.")
    density = spectral_density(
        operator, like, num_probes=num_probes, num_steps=num_steps, generator=generator
    )
    least = density.range[0]
    if least <= -damping / 2:
        raise ValueError(
            f"The operator has an eigenvalue of {least:.3g} or less, but an effective dimension "
            f"needs a positive semi-definite one, up to half the damping, {damping:.3g}: take the "
            "GGN or Fisher matrix in place of the Hessian, or a larger damping."
        )
    mean = density.expectation(lambda nodes: nodes / (nodes + damping))
    n = density.dimension
    return ScalarEstimate(
        n * mean.value, n * mean.standard_error, mean.num_products, mean.degrees_of_freedom
    )
