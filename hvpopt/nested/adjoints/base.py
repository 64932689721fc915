"""What every way to differentiate through an inference shares."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hvpopt.nested.book import Descent
from hvpopt.nested.descent import Run
from hvpopt.nested.methods import Method
from hvpopt.solvers import Status
from hvpopt.solvers.batched import STATUSES

TWICE = (
    "The training loss was to be differentiated twice through an inference with adjoint={name!r}, "
    "whose backward pass has no derivative of its own: an optimizer that needs products of the "
    "training loss's Hessian or Gauss-Newton matrix goes with adjoint='unrolled' (or with "
    "engine='finite_difference')."
)
FORWARD = (
    "The inference was called inside a level of forward mode (as that of an optimizer with "
    "engine='dual') with adjoint={name!r}, which has no tangent: choose engine='graph' and "
    "adjoint='unrolled', or a first-order optimizer."
)


@dataclass
class AdjointReport:
    """What the backward pass through an inference took; empty until it has run."""

    name: str
    """The adjoint's."""
    num_products: int = 0
    """Products with the energy's second derivatives, each of a batch or what was left of it."""
    residuals: Tensor | None = None
    """(batch,), ‖b − A v‖ / ‖b‖ of the linear systems, where such were solved."""
    steps: Tensor | None = None
    """(batch,), the solver's steps."""
    status: Tensor | None = None
    """(batch,), codes of `hvpopt.solvers.batched.STATUSES`."""

    @property
    def statuses(self) -> list[Status]:
        """How the solver ended for each example, in sentences; empty where none was used."""
        return [] if self.status is None else [STATUSES[code] for code in self.status.tolist()]


@dataclass(frozen=True)
class Gradients:
    """What a pullback gives, each None where there is none."""

    y0: Tensor | None
    inputs: Sequence[Tensor | None]
    theta: Sequence[Tensor | None]
    step_size: Tensor | None = None


Pullback = Callable[[Tensor, Tensor | None], Gradients]
"""(ȳ, cotangents of the iterates or None) ↦ the gradients."""


@dataclass(frozen=True)
class Adjoint(ABC):
    """What `minimize_energy` asks of a way to differentiate."""

    name: ClassVar[str]
    follows_iterates: ClassVar[bool] = False
    """Whether gradients may enter at every iterate, and go through every step to y0."""
    differentiates_steps: ClassVar[bool] = True
    """Whether it is made of derivatives of steps, some or all; else it looks at the end alone."""

    def check(self, method: Method, *, keep_iterates: bool) -> None:
        """Lets a method pass that the adjoint can follow.

        Raises:
            ValueError: For another, or iterates of which the adjoint knows nothing.
        """
        if method.is_second_order and self.differentiates_steps:
            raise ValueError(
                f"adjoint={self.name!r} does not go with {type(method).__name__}, whose steps "
                "would take third derivatives: choose 'implicit' or 'neumann'."
            )
        if keep_iterates and not self.follows_iterates:
            raise ValueError(
                f"keep_iterates=True with adjoint={self.name!r}, which gives gradients of the "
                "last iterate alone: choose 'unrolled', 'checkpointed' or 'back_optimization'."
            )

    @abstractmethod
    def solve(self, run: Run, report: AdjointReport) -> Descent:
        """The descent, its y and iterates in autograd's graph."""


def attached(run: Run, descent: Descent, name: str, pullback: Pullback) -> Descent:
    """A descent whose y and iterates are in the graph of the inner problem's inputs."""
    sizes = [run.step_size] if isinstance(run.step_size, Tensor) else []
    inputs = [run.y0, *run.problem.inputs, *run.problem.theta, *sizes]
    y, iterates = _Attached.apply(name, pullback, descent.y, descent.iterates, *inputs)
    return replace(descent, y=y, iterates=iterates)


class _Attached(torch.autograd.Function):
    """y and the iterates as they are; backward is the adjoint's."""

    @staticmethod
    def forward(
        ctx: Any, name: str, pullback: Pullback, y: Tensor, iterates: Tensor | None, *inputs: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.adjoint, ctx.pullback, ctx.like = name, pullback, (y.shape, y.dtype, y.device)
        return y.clone(), None if iterates is None else iterates.view_as(iterates)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE.format(name=ctx.adjoint))
        ybar, path = cotangents
        if ybar is None:
            shape, dtype, device = ctx.like
            ybar = torch.zeros(shape, dtype=dtype, device=device)
        found = ctx.pullback(ybar, path)
        return None, None, None, None, found.y0, *found.inputs, *found.theta, found.step_size

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD.format(name=ctx.adjoint))


class Sums:
    """Gradients by the inputs of x and by θ, summed over steps."""

    def __init__(self, run: Run) -> None:
        self._problem = run.problem
        self._total: list[Tensor | None] = [None] * len([*run.problem.inputs, *run.problem.theta])

    def add(self, terms: Sequence[Tensor | None], rows: Tensor | None, sign: float = 1.0) -> None:
        """Adds terms of some examples: by their own rows of the inputs, and by θ."""
        inputs = self._problem.inputs
        for i, term in enumerate(terms):
            if term is None:
                continue
            term = term if i >= len(inputs) else self._problem.spread(term, rows, inputs[i])
            total = self._total[i]
            if total is None:
                self._total[i] = sign * term
            else:
                total.add_(term, alpha=sign)

    def gradients(self, y0: Tensor | None, step_size: Tensor | None = None) -> Gradients:
        """What has been summed, with what else there is."""
        count = len(self._problem.inputs)
        return Gradients(y0, self._total[:count], self._total[count:], step_size)
