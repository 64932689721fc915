"""Diagonal preconditioners: a curvature for each parameter entry by itself."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hvpopt import trees
from hvpopt.closure.slopes import sampled_slopes
from hvpopt.engines.base import fill, vjp
from hvpopt.options import check_count, check_range
from hvpopt.preconditioners.base import CurvaturePoint, Preconditioner, State
from hvpopt.trees import TensorList


@dataclass(frozen=True, kw_only=True)
class Diagonal(Preconditioner):
    """M = (diag(d) + D)^exponent, d a running average of positive estimates, one a refresh.

    The average gives the newest of k estimates the weight (1 − decay)/(1 − decayᵏ), so that it is
    not biased towards where it started. An estimate with an entry that is not finite is left out.

    In the states: "diagonal", d in the parameter's shape and dtype, in the units of the curvature;
    "num_diagonals", k.

    Args:
        num_probes: random vectors an estimate.
        exponent: below 1 it draws the entries together, which forgives errors of d and what a
            diagonal does not see; Martens' choice for the Fisher is ¾.
        every: steps from one refresh to the next.
        decay: what the average keeps of itself at a refresh; 0 for the newest estimate alone.

    Raises:
        ValueError: for an option out of range.
    """

    num_probes: int = 10
    exponent: float = 0.75
    every: int = 10
    decay: float = 0.5

    def __post_init__(self) -> None:
        check_count("num_probes", self.num_probes)
        check_range("exponent", self.exponent, 0.0, 1.0)
        check_count("every", self.every)
        check_range("decay", self.decay, 0.0, 0.99)

    @abstractmethod
    def estimate(self, point: CurvaturePoint) -> TensorList:
        """Entries ≥ 0, in float32 or wider; the same on all ranks."""

    def is_ready(self, states: Sequence[State]) -> bool:
        """Whether every parameter has a diagonal."""
        return all("diagonal" in state for state in states)

    def refresh(self, point: CurvaturePoint, states: Sequence[State]) -> None:
        """Averages a new estimate into d, where it is finite."""
        estimate = self.estimate(point)
        if not trees.all_finite(estimate):
            return
        for d, p, state in zip(_positive(estimate), point.params, states, strict=True):
            count = state.get("num_diagonals", 0) + 1
            weight = (1 - self.decay) / (1 - self.decay**count)
            new = d.to(p.dtype)
            state["diagonal"] = torch.lerp(state["diagonal"], new, weight) if count > 1 else new
            state["num_diagonals"] = count

    def solve(self, r: TensorList, states: Sequence[State], shift: Sequence[float]) -> TensorList:
        """(d + shift)^−exponent r, entry by entry."""
        return self.inverse(states, shift)(r)

    def inverse(
        self, states: Sequence[State], shift: Sequence[float]
    ) -> Callable[[TensorList], TensorList]:
        """r ↦ M⁻¹ r, for many r."""
        scales = torch._foreach_add([state["diagonal"] for state in states], list(shift))
        if self.exponent != 1:
            torch._foreach_pow_(scales, self.exponent)
        return lambda r: list(torch._foreach_div(r, scales))


@dataclass(frozen=True, kw_only=True)
class Jacobi(Diagonal):
    """The diagonal of the curvature B itself, estimated by its products.

    The mean of z⊙Bz over Rademacher probes z is diag(B) and noise from the other entries of each
    row, exact where B is diagonal. With the mean m and its standard error s over the probes, the
    estimate is √(m² + s²): the absolute value where m is known well, the size of the noise where
    it is not, where m alone could be small by chance and negative. A single probe does not know
    s, and |m| stands alone. One product a probe.

    It helps where inputs or parameters differ much in scale. On networks that are scaled well it
    hardly does, whatever the number of probes: there `Nystrom` and `Kronecker` see more.

    Source: Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007);
    Chapelle and Erhan, "Improved preconditioner for Hessian free optimization" (2011).

    Examples:
        >>> Jacobi(num_probes=20)
        Jacobi(num_probes=20, exponent=0.75, every=10, decay=0.5)
    """

    def estimate(self, point: CurvaturePoint) -> TensorList:
        """√(m² + s²)."""
        generator = torch.Generator().manual_seed(point.seed)
        count = self.num_probes
        total, squares = _wide_zeros(point.params), _wide_zeros(point.params)
        for _ in range(count):
            z = trees.rademacher_like(point.params, generator)
            for i, (zi, bzi) in enumerate(zip(z, point.product(z), strict=True)):
                sample = (zi * bzi).to(total[i].dtype)
                total[i] += sample
                squares[i].addcmul_(sample, sample)
        means = trees.scale(total, 1 / count)
        if count == 1:
            return [m.abs() for m in means]
        errors = [
            ((s / count - m * m).clamp_(min=0) / (count - 1)).sqrt_()
            for s, m in zip(squares, means, strict=True)
        ]
        return [torch.hypot(m, s) for m, s in zip(means, errors, strict=True)]


@dataclass(frozen=True, kw_only=True)
class EmpiricalFisherDiagonal(Diagonal):
    """Martens' M = (Σ_n c_n (∇ℓ_n)² + D)^¾, from the squared gradients of the examples.

    The loss is Σ_n c_n ℓ_n of negative log-likelihoods ℓ_n, where c_n is 1/N for a mean over N
    terms (`hvpopt.likelihoods` says what a term is): so the sum has the units of the GGN. It is
    the second moment of Σ_n ε_n √c_n ∇ℓ_n over independent signs ε_n, which is one backward pass
    a probe, over one further run of the closure. No product is needed.

    The squares fall with the loss where the curvature does not: near a perfect fit M tends to a
    multiple of the identity.

    Source: Martens, "Deep learning via Hessian-free optimization" (2010), section 4.7.

    Examples:
        >>> EmpiricalFisherDiagonal(every=5)
        EmpiricalFisherDiagonal(num_probes=10, exponent=0.75, every=5, decay=0.5)
    """

    def estimate(self, point: CurvaturePoint) -> TensorList:
        """The mean of the squares over the probes and the ranks.

        Raises:
            NoLikelihoodError: if the loss is no sum of negative log-likelihoods that are known.
        """
        squares = _wide_zeros(point.params)

        def add(outputs: TensorList, slopes: TensorList) -> None:
            grads = fill(vjp(outputs, point.params, slopes), point.params)
            for square, g in zip(squares, grads, strict=True):
                wide = g.to(square.dtype)
                square.addcmul_(wide, wide, value=1 / self.num_probes)

        sampled_slopes(
            point.oracle,
            "empirical",
            seed=point.seed,
            then=add,
            num_samples=self.num_probes,
            random_signs=True,
        )
        return point.oracle.average(squares)


def _wide_zeros(params: TensorList) -> TensorList:
    """Zeros of the parameters' shapes in float32 or wider."""
    narrow = (torch.float16, torch.bfloat16)
    return [
        torch.zeros_like(p, dtype=torch.float32 if p.dtype in narrow else p.dtype) for p in params
    ]


def _positive(diagonal: TensorList) -> TensorList:
    """Raised to the rounding error of the largest entry; ones where all entries are zero."""
    top = max((float(d.max()) for d in diagonal if d.numel()), default=0.0)
    if top == 0:
        return [torch.ones_like(d) for d in diagonal]
    return [d.clamp(min=top * torch.finfo(d.dtype).eps) for d in diagonal]
