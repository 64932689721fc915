"""What surrounds a product: transforms, recording, random numbers, inference mode."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from hvpopt.engines.support import graph_nodes, reaches_dead_end


def must_compose(*trees: Any) -> bool:
    """Whether a product of these inputs must be by ``torch.func``, and not by plain autograd.

    That is so where ``torch.compile``, a ``torch.func`` transform or a forward-mode level is at
    work, where autograd records one of the inputs, and under inference mode, whose tensors plain
    autograd cannot save. Elsewhere only the value can be wanted, and plain autograd on detached
    copies gives it for less.
    """
    return (
        torch.compiler.is_compiling()
        or in_transform()
        or torch.is_inference_mode_enabled()
        or forward_ad._current_level >= 0
        or (
            torch.is_grad_enabled()
            and any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(trees))
        )
    )


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def captures_recorded(outputs: Iterable[Tensor], leaves: Iterable[Tensor]) -> bool:
    """Whether outputs depend on a tensor that requires a gradient and is not among the leaves."""
    ours = set(map(id, leaves))
    variables = (getattr(node, "variable", None) for node in graph_nodes(outputs))
    return any(x is not None and id(x) not in ours for x in variables)


def check_twice_differentiable(
    outputs: Iterable[Tensor], gradients: Iterable[Tensor | None]
) -> None:
    """Raises where the gradients of outputs only seem to be differentiable.

    Raises:
        RuntimeError: If there is such a node.
    """
    custom = torch.autograd.function.BackwardCFunction
    if not any(isinstance(node, custom) for node in graph_nodes(outputs)):
        return  # the graph of the gradients is longer
    if reaches_dead_end(gradients):
        raise RuntimeError(
            "The backward of a custom autograd Function is marked once_differentiable: write it "
            "in differentiable operations and remove the mark, or take "
            "hvpopt.products.hvp_finite_difference."
        )


def ordinary(x: Tensor) -> Tensor:
    """``x``, or a copy that autograd can record where it was made under inference mode."""
    return x.clone() if x.is_inference() else x


def ordinary_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args``, the very objects where none of their tensors needs a copy."""
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    if not any(x.is_inference() for x in tensors):
        return args
    with torch.inference_mode(False):
        return pytree.tree_map_only(Tensor, ordinary, args)


def rewinder(tree: Any) -> Callable[[], None]:
    """A function that puts torch's random number generators back to where they stand now.

    A function that is run several times for one result then draws the same dropout mask each
    time, and leaves the generators as one run leaves them.
    """
    devices = {x.device for x in pytree.tree_leaves(tree) if x.device.type == "cuda"}
    cpu, cuda = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)

    return rewind
