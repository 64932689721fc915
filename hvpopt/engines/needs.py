"""Which of an autograd Function's gradients the reverse pass under way will use."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_will_execute = getattr(torch._C, "_will_engine_execute_node", None)


def remember(ctx: Any, inputs: Sequence[Any]) -> None:
    """Keeps what `needed` has to know; for a Function's ``setup_context``."""
    ctx.are_tensors = [isinstance(x, Tensor) for x in inputs]


def needed(ctx: Any) -> list[bool]:
    """For each input, whether its gradient is wanted in this pass; for ``backward``.

    ``ctx.needs_input_grad`` says which inputs require gradients, whatever ``autograd.grad`` was
    asked for; torch's own functions leave out what it was not, and so should ours.
    """
    edges = iter(ctx.next_functions)
    nodes = [next(edges)[0] if is_tensor else None for is_tensor in ctx.are_tensors]
    pairs = zip(ctx.needs_input_grad, nodes, strict=True)
    return [needs and _will_use(node) for needs, node in pairs]


def off_leaf(x: Tensor) -> Tensor:
    """``x``, or a view of it: the engine tells of nodes what it will do, and not of leaves."""
    return x.view_as(x) if x.is_leaf and x.requires_grad else x


def _will_use(node: Any) -> bool:
    if node is None or _will_execute is None:
        return True
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # a leaf, or no pass of the engine
        return True
