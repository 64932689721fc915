"""The second-order expansion of a function, or of a training closure, at a point."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.engines.support import differentiable_kernels
from hvpopt.pytrees import Tree, check_like, check_params, scalar_valued
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class Linearization:
    """A function's value at a point, its gradient, and its Hessian as an operator."""

    loss: Tensor
    """f(params), without dimensions, detached."""
    grad: Tree
    """∇f(params), in the structure and shapes of the parameters, detached."""
    _product: Callable[[Tree], Tree] = field(repr=False)

    def hvp(self, v: Tree) -> Tree:
        """∇²f v at the point of the linearization, detached.

        Args:
            v: A direction, of the structure, shapes and dtypes of the parameters.

        Raises:
            ValueError: If ``v`` does not match the parameters.
        """
        return self._product(v)


@dataclass(frozen=True)
class LinearizedClosure:
    """A closure's loss at the current parameters, its gradient, and its curvature.

    All are in the loss's own scale: of its mean over the batch where the loss is a mean. Under
    ``DistributedDataParallel`` they are means over the ranks.

    Attributes:
        loss: scalar; over micro-batches, the last one's.
        grad: what the closure left in ``p.grad`` (zeros where it left None), one tensor a
            parameter: summed over accumulated micro-batches, clipped where the closure clips.
        batch_grad: the gradient of ``loss`` itself.
        product: v ↦ C v, the Hessian's or GGN's product with a list of tensors.
        has_remainder: whether a part of a GGN is the Hessian of a term outside the loss function.
    """

    loss: Tensor
    grad: TensorList
    batch_grad: TensorList
    product: Callable[[TensorList], TensorList]
    has_remainder: bool


def linearize(f: Callable[..., Tensor], params: Tree, *args: Any) -> Linearization:
    """The loss, its gradient, and ∇²f as an operator that is cheap to apply many times.

    The gradient's graph is built once and kept; ∇²f v = ∇(∇fᵀv) is then one reverse pass over
    it, about two gradients, and f is not run again. The graph lives as long as the result
    does. Applications may be batched, ``torch.vmap(linearization.hvp)(vs)``, but nothing here
    is differentiable further. Changing the parameters in place invalidates the graph, and
    ``hvp`` then raises torch's error about a modified variable.

    Args:
        f: ``f(params, *args)``, a real floating-point tensor without dimensions.
        params: Real floating-point tensors.
        *args: Passed on to ``f``, not differentiated.

    Raises:
        TypeError: If parameters or the loss are not real floating-point tensors.
        ValueError: If ``params`` hold no tensor, or the loss has dimensions.

    Source: Pearlmutter (1994), by reverse mode twice.

    Examples:
        >>> point = linearize(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]))
        >>> point.loss, point.grad, point.hvp(torch.tensor([1.0, 0.0]))
        (tensor(9.), tensor([ 3., 12.]), tensor([6., 0.]))
    """
    check_params(params, "params")
    flat, spec = pytree.tree_flatten(params)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_ordinary(p).detach().requires_grad_() for p in flat]
        args = pytree.tree_map_only(Tensor, _ordinary, args)
        with differentiable_kernels():
            loss = scalar_valued(f, "f")(pytree.tree_unflatten(leaves, spec), *args)
        grads = _reverse([loss], leaves, None, create_graph=True)
    detached = [g.detach() for g in grads]

    def product(v: Tree) -> Tree:
        check_like(v, params, "v", "params")
        pairs = zip(grads, pytree.tree_leaves(v), strict=True)
        used = [(g, x) for g, x in pairs if g.requires_grad]  # the others are constant
        with torch.inference_mode(False), torch.enable_grad():
            products = _reverse([g for g, _ in used], leaves, [_ordinary(x) for _, x in used])
        return pytree.tree_unflatten([p.detach() for p in products], spec)

    return Linearization(loss.detach(), pytree.tree_unflatten(detached, spec), product)


def _reverse(
    outputs: list[Tensor],
    inputs: list[Tensor],
    cotangents: list[Tensor] | None,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """One reverse pass that keeps the graph; zeros where nothing depends on an input."""
    if not any(o.requires_grad for o in outputs):
        return [torch.zeros_like(x, requires_grad=False) for x in inputs]
    return list(
        torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
    )


def _ordinary(x: Tensor) -> Tensor:
    """``x``, or a copy that autograd can record where it was made under inference mode."""
    return x.clone() if x.is_inference() else x
