"""The first-order methods that move y: pure functions from one state to the next.

A state is a tuple of tensors (batch, *shape), the coordinates u first. With g = ∂E/∂y and
G = ∂F/∂u (`hvpopt.nested.domains`) the step lengths α may differ from example to example:

    GradientDescent   u ← P(u − α G)
    HeavyBall         p ← μ p − α G,   u ← P(u + p)
    MirrorDescent     u ← u − α (g + τ u)   on logits, that is y ∝ y exp(−α (g + τ log y))

Everything here is differentiable, element by element; what is expensive, g, comes from outside.
"""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hvpopt.nested.domains import Domain
from hvpopt.nested.line_search import Backtracking
from hvpopt.nested.logits import LogitDomain, mirror_coordinates
from hvpopt.nested.rows import less
from hvpopt.options import check_count, check_range

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Method(ABC):
    """What `minimize_energy` asks of a method; the common part of their options."""

    step_size: float | Tensor = 0.1
    num_steps: int = 20
    _: KW_ONLY
    rtol: float = 0.0
    gtol: float = 0.0

    is_second_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.step_size, Tensor):
            check_range("step_size", self.step_size, 0.0)
            if self.step_size == 0:
                raise ValueError("step_size=0 never moves; expected a number above 0.")
        elif self.step_size.dim() > 2 or not self.step_size.is_floating_point():
            raise ValueError(
                f"step_size is a tensor of shape {tuple(self.step_size.shape)} and "
                f"{self.step_size.dtype}; expected floating point of shape (), (batch,), "
                "(num_steps, 1) or (num_steps, batch)."
            )
        check_count("num_steps", self.num_steps)
        check_range("rtol", self.rtol, 0.0)
        check_range("gtol", self.gtol, 0.0)

    @property
    def search(self) -> Backtracking | None:
        """The line search, if there is one."""
        return getattr(self, "line_search", None)

    def check(self, domain: Domain, batch_size: int) -> None:
        """Lets a domain and a batch pass that the method can serve.

        Raises:
            ValueError: For others.
        """
        is_singular = bool(domain.entropy_weight) and not isinstance(domain, LogitDomain)
        if is_singular and not isinstance(self, MirrorDescent):
            raise ValueError(
                f"{domain} has an entropy, whose gradient is infinite on the boundary that "
                f"{type(self).__name__} may reach: choose MirrorDescent, or the domain Logits or "
                "SoftmaxLogits."
            )
        if isinstance(self.step_size, Tensor) and self.step_size.dim():
            shape = tuple(self.step_size.shape)
            rows = {(batch_size,), (self.num_steps, 1), (self.num_steps, batch_size)}
            if shape not in rows:
                raise ValueError(
                    f"step_size has shape {shape} for a batch of {batch_size} and "
                    f"{self.num_steps} steps; expected (), ({batch_size},), ({self.num_steps}, 1) "
                    f"or ({self.num_steps}, {batch_size})."
                )

    def coordinates(self, domain: Domain) -> Domain:
        """The coordinates in which the method moves."""
        return domain

    def start(self, u: Tensor) -> State:
        """The state at the start."""
        return (u,)

    def lengths(self, step_size: float | Tensor, step: int, rows: Tensor | None) -> float | Tensor:
        """α of a step: a number, a scalar tensor, or (k,), one for each example of ``rows``."""
        if not isinstance(step_size, Tensor) or step_size.dim() == 0:
            return step_size
        of_step = step_size[step] if step_size.dim() == 2 else step_size
        if len(of_step) == 1 and step_size.dim() == 2:
            return of_step[0]
        return of_step if rows is None else of_step[rows]

    @abstractmethod
    def advance(
        self, domain: Domain, state: State, y: Tensor, g: Tensor, alpha: float | Tensor
    ) -> State:
        """The state after a step; differentiable by all tensors."""


@dataclass(frozen=True)
class GradientDescent(Method):
    """Projected gradient descent.

    Args:
        step_size: α, a number, or a tensor of shape (), (batch,), (num_steps, 1) or
            (num_steps, batch), through which gradients flow. With a line search, where it starts.
        num_steps: The most steps.
        rtol: An example stops where ‖y⁺ − y‖ ≤ rtol ‖y⁺‖; 0 never.
        gtol: An example stops where its residual is at most this; 0 never.
        line_search: Shortens each example's step until its energy falls enough.

    Raises:
        ValueError: For options out of range.
    """

    _: KW_ONLY
    line_search: Backtracking | None = None

    def advance(
        self, domain: Domain, state: State, y: Tensor, g: Tensor, alpha: float | Tensor
    ) -> State:
        """P(u − α G)."""
        (u,) = state
        return (domain.project(less(u, alpha, domain.pull(u, y, g))),)


@dataclass(frozen=True)
class HeavyBall(Method):
    """Projected gradient descent with Polyak's momentum.

    Args:
        step_size: As of `GradientDescent`, like all but the momentum.
        num_steps: The most steps.
        rtol: Relative change of y.
        gtol: Residual.
        momentum: μ, at least 0 and below 1.

    Raises:
        ValueError: For options out of range.

    Source: Polyak (USSR Comput. Math. Math. Phys. 4, 1964).
    """

    _: KW_ONLY
    momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("momentum", self.momentum, 0.0, 1.0)
        if self.momentum == 1.0:
            raise ValueError("momentum=1 never comes to rest; expected a number below 1.")

    def start(self, u: Tensor) -> State:
        """At rest."""
        return (u, torch.zeros_like(u, requires_grad=False))

    def advance(
        self, domain: Domain, state: State, y: Tensor, g: Tensor, alpha: float | Tensor
    ) -> State:
        """P(u + p⁺) and p⁺ = μ p − α G."""
        u, p = state
        p = less(self.momentum * p, alpha, domain.pull(u, y, g))
        return (domain.project(u + p), p)


@dataclass(frozen=True)
class MirrorDescent(Method):
    """Entropic mirror descent on a `Box` or a `Simplex`: multiplicative steps, which stay inside.

    Args:
        step_size: As of `GradientDescent`, like all others.
        num_steps: The most steps.
        rtol: Relative change of y.
        gtol: Residual.
        line_search: Shortens each example's step until its energy falls enough.

    Raises:
        ValueError: For options out of range.

    Source: Beck and Teboulle (Oper. Res. Lett. 31, 2003).
    """

    _: KW_ONLY
    line_search: Backtracking | None = None

    def coordinates(self, domain: Domain) -> Domain:
        """Logits."""
        return mirror_coordinates(domain)

    def advance(
        self, domain: Domain, state: State, y: Tensor, g: Tensor, alpha: float | Tensor
    ) -> State:
        """u − α (g + τ u)."""
        (u,) = state
        assert isinstance(domain, LogitDomain)
        return (less(u, alpha, domain.natural(u, g)),)
