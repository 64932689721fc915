"""Domains that are entered through logits: what moves is u, and y = σ(u) or softmax(u).

Steps need no projection. A linear energy has no minimiser in u, whose logits grow without end: the
entropy keeps them finite, and belongs to the energy (E = −bᵀy − H(y) has the minimiser σ(b)).
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.nested.domains import Box, Distributions, Domain, Interval, Simplex
from hvpopt.nested.rows import row_norms


@dataclass(frozen=True)
class LogitDomain(Domain):
    """What the two share."""

    @property
    def is_reparametrised(self) -> bool:
        """They are logits."""
        return True

    @property
    def width(self) -> float:
        """dy/dt."""
        return 1.0

    def natural(self, u: Tensor, g: Tensor) -> Tensor:
        """The gradient of F by t, up to what the map u ↦ t does not see: dy/dt g + τ u."""
        g = g if self.width == 1.0 else self.width * g
        return g + self.entropy_weight * u if self.entropy_weight else g

    @abstractmethod
    def spread(self, y: Tensor, v: Tensor) -> Tensor:
        """∂t/∂u v, a symmetric map."""

    def pull(self, u: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """∂t/∂u applied to the gradient by t."""
        return self.spread(y, self.natural(u, g))

    def residuals(self, u: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """‖∂F/∂u‖."""
        return row_norms(self.pull(u, y, g))


@dataclass(frozen=True)
class Logits(Interval, LogitDomain):
    """Entries between two bounds, moved by their logits: y = low + (high − low) σ(u).

    Args:
        low: The lower bound.
        high: The upper bound.
        entropy: τ ≥ 0, the weight of H = Σ −t log t − (1 − t) log(1 − t) with t = σ(u), which is
            subtracted from the energy.

    Raises:
        ValueError: Unless low < high are finite, and for a negative entropy.
    """

    def check(self, y: Tensor) -> None:
        """Lets pass what lies strictly between the bounds: on them the logits are infinite."""
        outside = int(((y <= self.low) | (y >= self.high)).sum())
        if outside:
            raise ValueError(
                f"y0 lies outside of its domain, strictly between {self.low} and {self.high}: "
                f"{outside} of {y.numel()} entries, which range from {float(y.min()):.6g} to "
                f"{float(y.max()):.6g}, and on the bounds logits are infinite; start from "
                "domain.center(...), or clamp it to a margin."
            )

    def inside(self, y: Tensor) -> Tensor:
        """Away from the bounds, where a sigmoid's output ends that has saturated."""
        margin = torch.finfo(y.dtype).eps * max(self.width, abs(self.low), abs(self.high))
        return y.clamp(self.low + margin, self.high - margin)

    @property
    def width(self) -> float:
        """high − low."""
        return self.high - self.low

    def coordinates(self, y: Tensor) -> Tensor:
        """log t / (1 − t)."""
        return ((y - self.low) / (self.high - y)).log()

    def point(self, u: Tensor) -> Tensor:
        """low + (high − low) σ(u)."""
        t = u.sigmoid()
        return t if (self.low, self.high) == (0.0, 1.0) else self.low + self.width * t

    def spread(self, y: Tensor, v: Tensor) -> Tensor:
        """t (1 − t) v."""
        if (self.low, self.high) == (0.0, 1.0):
            return torch.ops.aten.sigmoid_backward(v, y)  # y (1 − y) v by one kernel
        return (y - self.low) * (self.high - y) / self.width**2 * v

    def penalty(self, u: Tensor, y: Tensor) -> Tensor | None:
        """−τ Σ softplus(u) − u σ(u)."""
        if not self.entropy:
            return None
        return -self.entropy * (F.softplus(u) - u * u.sigmoid()).flatten(1).sum(1)


@dataclass(frozen=True)
class SoftmaxLogits(Distributions, LogitDomain):
    """Distributions along the last axis, moved by their logits: y = softmax(u).

    Args:
        entropy: τ ≥ 0, the weight of −Σ y log y, which is subtracted from the energy.

    Raises:
        ValueError: For a negative entropy.
    """

    def check(self, y: Tensor) -> None:
        """Lets positive entries with sum one pass."""
        super().check(y)
        if bool((y <= 0).any()):
            raise ValueError(
                f"y0 has {int((y <= 0).sum())} entries that are zero, whose logits are infinite: "
                "start from domain.center(...), or mix it with the uniform distribution."
            )

    def inside(self, y: Tensor) -> Tensor:
        """Away from zero, where a softmax's output ends that has saturated."""
        return y.clamp(min=torch.finfo(y.dtype).tiny)

    def coordinates(self, y: Tensor) -> Tensor:
        """log y."""
        return y.log()

    def point(self, u: Tensor) -> Tensor:
        """softmax(u)."""
        return u.softmax(-1)

    def spread(self, y: Tensor, v: Tensor) -> Tensor:
        """y (v − ⟨y, v⟩)."""
        return y * (v - (y * v).sum(-1, keepdim=True))

    def penalty(self, u: Tensor, y: Tensor) -> Tensor | None:
        """τ Σ y log y."""
        if not self.entropy:
            return None
        return self.entropy * (y * u.log_softmax(-1)).flatten(1).sum(1)


def mirror_coordinates(domain: Domain) -> LogitDomain:
    """The coordinates in which entropic mirror descent on a bounded domain is linear.

    Raises:
        ValueError: If the domain has none.
    """
    if isinstance(domain, Box):
        return Logits(domain.low, domain.high, entropy=domain.entropy)
    if isinstance(domain, Simplex):
        return SoftmaxLogits(entropy=domain.entropy)
    raise ValueError(
        f"MirrorDescent does not go with {domain}: it needs a bounded set, Box or Simplex (on "
        "logits, GradientDescent is its relative)."
    )
