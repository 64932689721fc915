"""Where an inner minimisation looks for y, and the coordinates u in which it moves.

A domain knows the map u ↦ y, how a gradient by y becomes one by u, and how to come back to its set
after a step. In all but the logit domains (`hvpopt.nested.logits`) u is y itself. What the inner
problem minimises is F(u) = E(x, y(u)) − τ H(y(u)), with the entropy's weight τ zero by default.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.nested.rows import row_norms
from hvpopt.options import check_range

Projector = Callable[[Tensor], Tensor]
"""An orthogonal projection on the directions in which the coordinates are free to move."""


@dataclass(frozen=True)
class Domain:
    """What `minimize_energy` asks of a domain; this one is all of space, in its own coordinates."""

    @property
    def is_reparametrised(self) -> bool:
        """Whether the coordinates are others than y."""
        return False

    @property
    def entropy_weight(self) -> float:
        """τ."""
        return 0.0

    def check(self, y: Tensor) -> None:
        """Lets a start inside the domain pass, (batch, *shape).

        Raises:
            ValueError: If an entry lies outside.
        """

    def center(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The usual start, (batch, *shape): zeros, or the middle of a bounded domain."""
        return torch.full(tuple(shape), self._middle(shape), dtype=dtype, device=device)

    def _middle(self, shape: Sequence[int]) -> float:
        return 0.0

    def inside(self, y: Tensor) -> Tensor:
        """A start in the domain, moved by rounding's size to where it has coordinates."""
        return y

    def coordinates(self, y: Tensor) -> Tensor:
        """u of y, of the same shape; differentiable."""
        return y

    def point(self, u: Tensor) -> Tensor:
        """y of u; differentiable."""
        return u

    def pull(self, u: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """∂F/∂u, where g = ∂E/∂y; differentiable by all three."""
        return g

    def penalty(self, u: Tensor, y: Tensor) -> Tensor | None:
        """−τ H(y), (batch,); None where there is none."""
        return None

    def project(self, u: Tensor) -> Tensor:
        """The nearest coordinates whose point lies in the domain; differentiable."""
        return u

    def residuals(self, u: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """‖u − project(u − ∂F/∂u)‖ for each example, (batch,): zero at a stationary point."""
        return row_norms(u - self.project(u - self.pull(u, y, g)))

    def free(self, u: Tensor, y: Tensor, g: Tensor) -> Projector | None:
        """On the directions that no active bound forbids; None where there is no bound."""
        return None


@dataclass(frozen=True)
class Unconstrained(Domain):
    """All of space."""


@dataclass(frozen=True)
class Interval(Domain):
    """What the domains share whose entries lie between two bounds."""

    low: float = 0.0
    high: float = 1.0
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"{type(self).__name__} needs finite bounds low < high, got low={self.low}, "
                f"high={self.high}."
            )
        check_range("entropy", self.entropy, 0.0)

    @property
    def entropy_weight(self) -> float:
        """τ."""
        return self.entropy

    def _middle(self, shape: Sequence[int]) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Distributions(Domain):
    """What the domains share whose last axis sums to one."""

    entropy: float = 0.0

    def __post_init__(self) -> None:
        check_range("entropy", self.entropy, 0.0)

    @property
    def entropy_weight(self) -> float:
        """τ."""
        return self.entropy

    def check(self, y: Tensor) -> None:
        """Lets non-negative entries with sum one pass."""
        if y.dim() < 2:
            raise ValueError(f"y0 has shape {tuple(y.shape)}; {self} needs an axis of its own.")
        sums = y.sum(-1, dtype=torch.promote_types(y.dtype, torch.float32))
        slack = 10 * y.shape[-1] * torch.finfo(y.dtype).eps
        if bool((y < 0).any()) or bool(((sums - 1.0).abs() > slack).any()):
            raise ValueError(
                f"y0 lies outside of its domain {self}: along the last axis its entries sum to "
                f"{float(sums.min()):.6g} … {float(sums.max()):.6g} with a least one of "
                f"{float(y.min()):.6g}; expected non-negative entries with sum 1."
            )

    def _middle(self, shape: Sequence[int]) -> float:
        return 1.0 / shape[-1]


@dataclass(frozen=True)
class Box(Interval):
    """Every entry of y between two bounds; steps are clamped to them.

    Args:
        low: The lower bound.
        high: The upper bound.
        entropy: τ ≥ 0, the weight of Σ −t log t − (1 − t) log(1 − t), t = (y − low)/(high − low),
            which is subtracted from the energy; for `MirrorDescent` alone.

    Raises:
        ValueError: Unless low < high are finite, and for a negative entropy.
    """

    def check(self, y: Tensor) -> None:
        """Lets pass what lies between the bounds."""
        outside = int(((y < self.low) | (y > self.high)).sum())
        if outside:
            raise ValueError(
                f"y0 lies outside of its domain {self}: {outside} of {y.numel()} entries, which "
                f"range from {float(y.min()):.6g} to {float(y.max()):.6g}; clamp it first."
            )

    def project(self, u: Tensor) -> Tensor:
        """Clamped; the derivative is the mask of what is not."""
        return u.clamp(self.low, self.high)

    def free(self, u: Tensor, y: Tensor, g: Tensor) -> Projector:
        """Zeros the entries that lie on a bound which the gradient presses against."""
        fixed = ((u <= self.low) & (g > 0)) | ((u >= self.high) & (g < 0))
        return lambda v: v.masked_fill(fixed, 0.0)


@dataclass(frozen=True)
class Simplex(Distributions):
    """The last axis of y sums to one, with no negative entry; steps go to the nearest such point.

    Args:
        entropy: τ ≥ 0, the weight of −Σ y log y, which is subtracted from the energy; for
            `MirrorDescent` alone.

    Raises:
        ValueError: For a negative entropy.

    Source: the projection is that of Duchi et al. (ICML 2008), figure 1.
    """

    def project(self, u: Tensor) -> Tensor:
        """max(u − θ, 0) with the θ for which it sums to one."""
        falling, _ = u.sort(dim=-1, descending=True)
        excess = falling.cumsum(-1) - 1.0
        counts = torch.arange(1, u.shape[-1] + 1, dtype=u.dtype, device=u.device)
        last = (falling * counts > excess).sum(-1, keepdim=True) - 1
        threshold = (excess / counts).gather(-1, last)
        return (u - threshold).clamp(min=0.0)

    def free(self, u: Tensor, y: Tensor, g: Tensor) -> Projector:
        """On the directions that stay in the face: zero off the support, with sum zero on it."""
        support = (u > 0).to(u.dtype)
        size = support.sum(-1, keepdim=True)

        def projected(v: Tensor) -> Tensor:
            v = v * support
            return v - support * (v.sum(-1, keepdim=True) / size)

        return projected
