"""Sees what a training closure does: its calls of ``backward`` and of the loss functions."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from hvpopt.engines.split import LossSplit
from hvpopt.engines.substitutes import LINEAR_CROSS_ENTROPY, linear_cross_entropy


class EndOfRun(BaseException):
    """Ends a repeated run of the closure at its last ``backward``, past any ``except``."""


class Backward(Protocol):
    """What an engine does in place of ``loss.backward(**kwargs)``; ``plain`` is the original."""

    def __call__(self, loss: Tensor, plain: Callable[..., None], /, **kwargs: Any) -> None:
        """Handle one call."""
        ...


def _plain_backward(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> None:
    """``loss.backward(...)``, during which function modes stay active (`base.reverse`)."""
    gradient = torch.ones_like(loss) if gradient is None else gradient
    keep = create_graph if retain_graph is None else retain_graph
    _engine_run_backward(
        (loss,), (gradient,), keep, create_graph, (), allow_unreachable=True, accumulate_grad=True
    )


class Interception(TorchFunctionMode):
    """While active, hands ``Tensor.backward`` to an engine, and loss functions to a split.

    Args:
        on_backward: takes the loss, the original ``backward`` and its keyword arguments.
        split: where given, cuts the graph at the input of each loss function.
        stop_after: ends the run with `EndOfRun` once so many ``backward`` calls are done.

    Attributes:
        num_backwards: how many calls of ``backward`` there were.
        takes_derivatives: whether ``torch.autograd.grad`` gave tensors with a graph of their own.
    """

    def __init__(
        self,
        on_backward: Backward,
        *,
        split: LossSplit | None = None,
        stop_after: int | None = None,
    ) -> None:
        super().__init__()
        self._on_backward = on_backward
        self._split = split
        self._stop_after = stop_after
        self.num_backwards = 0
        self.takes_derivatives = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            self._backward(*args, **kwargs)
            return None
        if func is not None and func is LINEAR_CROSS_ENTROPY:
            with self:  # the split sees the loss inside
                return linear_cross_entropy(*args, **kwargs)
        if self._split is not None and self._split.handles(func):
            return self._split(func, *args, **kwargs)
        result = func(*args, **kwargs)
        if func is torch.autograd.grad:
            self.takes_derivatives |= any(t is not None and t.requires_grad for t in result)
        return result

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        if inputs is not None:
            raise ValueError(
                "The closure calls backward(inputs=...), which hvpopt does not support: call "
                "backward() and freeze what should have no gradient with requires_grad_(False)."
            )
        if loss.numel() != 1 or loss.dtype.is_complex:
            raise ValueError(
                f"The closure calls backward on a tensor of shape {tuple(loss.shape)} and dtype "
                f"{loss.dtype}, where a real scalar loss is expected: reduce it with mean() or "
                "sum() before backward()."
            )
        if gradient is not None:
            loss = loss * gradient
        options = {"retain_graph": retain_graph, "create_graph": create_graph}
        self._on_backward(loss.reshape(()), _plain_backward, **options)
        self.num_backwards += 1
        if self.num_backwards == self._stop_after:
            raise EndOfRun
