"""What every engine shares: the runs it asks for, the trace it returns, reverse products."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from hvpopt.engines.interception import Backward
from hvpopt.engines.split import Curvature, LossSplit
from hvpopt.trees import TensorList


class Run(Protocol):
    """A run under way, as a recorder sees it."""

    params: TensorList

    @property
    def is_first(self) -> bool:
        """Whether it is the one that counts."""
        ...


class Runner(Run, Protocol):
    """Runs the closure for an engine: the first time for good, later without a trace."""

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    @property
    def wants_gradient(self) -> bool:
        """Whether what the run under way leaves in ``p.grad`` is looked at."""
        ...

    @property
    def other_leaves(self) -> TensorList:
        """In the run that counts, what else ``loss.backward()`` would give gradients."""
        ...

    def __call__(
        self,
        on_backward: Backward,
        *,
        split: LossSplit | None = None,
        around: AbstractContextManager[object] | None = None,
    ) -> None:
        """One run, inside the context ``around``, with ``on_backward`` as its backward."""
        ...

    def recomputation(self) -> AbstractContextManager[object]:
        """A context for products that may run parts of the closure again."""
        ...

    def untraced(self) -> AbstractContextManager[object]:
        """A context for what else may run parts of the closure."""
        ...

    def average(self, tensors: Sequence[Tensor]) -> TensorList:
        """The mean over ranks."""
        ...


@dataclass(frozen=True)
class Trace:
    """The loss at the current parameters and its derivatives, of this rank alone.

    Attributes:
        loss: scalar, the sum over the closure's ``backward`` calls.
        batch_grad: its gradient, one tensor a parameter.
        product: v ↦ H v or G v.
        has_remainder: whether a part of a GGN is the Hessian of a term outside the split.
    """

    loss: Tensor
    batch_grad: TensorList
    product: Callable[[TensorList], TensorList]
    has_remainder: bool = False


class Engine(Protocol):
    """One way to the products of a closure."""

    name: str

    def trace(self, run: Runner, curvature: Curvature) -> Trace:
        """Loss, gradient, and the operator at the current parameters."""
        ...

    def trace_along(
        self, run: Runner, v: TensorList, curvature: Curvature
    ) -> tuple[Tensor, TensorList]:
        """The loss and the product with ``v``; the gradient is left in ``p.grad``."""
        ...


def fill(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> TensorList:
    """``grads`` with zeros of the parameters' shapes where there is none."""
    return [
        torch.zeros_like(p, requires_grad=False) if g is None else g.detach()
        for g, p in zip(grads, like, strict=True)
    ]


def reverse(
    outputs: Sequence[Tensor],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """``torch.autograd.grad`` with ``allow_unused``, during which function modes stay active.

    That is itself a torch function, and a mode rests while it handles one: a checkpointed layer
    would run again with other functions than the first time.
    """
    # the engine's own arguments: allow_unreachable, accumulate_grad
    return list(
        _engine_run_backward(
            tuple(outputs), tuple(cotangents), retain_graph, create_graph, tuple(inputs),
            allow_unreachable=True, accumulate_grad=False,
        )
    )  # fmt: skip


def vjp(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> list[Tensor | None]:
    """Σᵢ (∂outputᵢ/∂input)ᵀ cotangentᵢ for each input; None where no output depends on it."""
    pairs = [
        (o, c)
        for o, c in zip(outputs, cotangents, strict=True)
        if o is not None and c is not None and o.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    return reverse(
        [o for o, _ in pairs],
        inputs,
        [c.to(o.dtype) for o, c in pairs],
        retain_graph=retain_graph,
        create_graph=create_graph,
    )


def unit_cotangent(loss: Tensor) -> Tensor:
    """A one for the gradient of ``loss`` to start from, which itself requires a gradient.

    A custom Function marked ``once_differentiable`` then raises where its backward would be
    differentiated, instead of passing for a constant.
    """
    return torch.ones_like(loss).requires_grad_()
