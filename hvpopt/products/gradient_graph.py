"""The gradient with its graph, by plain autograd: each Hessian product is one reverse pass."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.engines.base import fill, reverse, unit_cotangent
from hvpopt.engines.support import differentiable_kernels
from hvpopt.products.directions import Limit, for_each, intermediates
from hvpopt.products.surroundings import (
    captures_recorded,
    check_twice_differentiable,
    ordinary,
    ordinary_args,
)
from hvpopt.pytrees import Tree, scalar_valued

Gradient = Callable[..., tuple[Tensor, list[Tensor | None]]]


class GradientGraph:
    """∇f at a point and the graph that it was computed by: ∇²f v = ∇(∇fᵀv).

    The products are differentiable, by tensors that f captures, where autograd records at
    construction and such tensors require gradients; else they are values.

    Args:
        f: ``f(params, *args)``, checked to be scalar-valued here.
        params: Detached here.
        args: Passed on to ``f``.
        gradient: (f, leaves, spec, args) ↦ (loss, gradient as a list), with a graph; by default
            f's run and its reverse pass.
        what: What errors call f.

    Raises:
        RuntimeError: If a custom Function of f is marked ``once_differentiable``.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        params: Tree,
        args: tuple[Any, ...],
        gradient: Gradient | None = None,
        *,
        what: str = "f",
    ) -> None:
        may_record = torch.is_grad_enabled()
        flat, self._spec = pytree.tree_flatten(params)
        with torch.inference_mode(False), torch.enable_grad():
            self._leaves = [ordinary(p).detach().requires_grad_() for p in flat]
            args = ordinary_args(args)
            checked = scalar_valued(f, what)
            # a compiled gradient has its kernels; without, only checkpointed parts run again
            runs_again, gradient = gradient is None, gradient or _gradient
            kernels: Any
            with differentiable_kernels() if runs_again else nullcontext() as kernels:
                loss, grads = gradient(checked, self._leaves, self._spec, args)
            self._runs_again = runs_again and getattr(kernels, "checkpoints", False)
        check_twice_differentiable([loss], grads)
        self._loss, self._grads = loss, grads
        self._is_recorded = may_record and captures_recorded([loss], self._leaves)
        self.loss = loss if self._is_recorded else loss.detach()
        self.grad = self._tree(grads)

    def _tree(self, grads: list[Tensor | None]) -> Tree:
        if self._is_recorded:
            pairs = zip(grads, self._leaves, strict=True)
            filled = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        else:
            filled = fill(grads, self._leaves)
        return pytree.tree_unflatten(filled, self._spec)

    def product(self, v: Tree, *, is_last: bool = False) -> Tree:
        """∇²f v for one direction; the last frees the graph, which takes less memory."""
        with torch.inference_mode(False), torch.enable_grad():
            pairs = [
                (g, ordinary(x))
                for g, x in zip(self._grads, pytree.tree_leaves(v), strict=True)
                if g is not None and g.requires_grad
            ]
            if not pairs:
                return self._tree([None] * len(self._leaves))
            with differentiable_kernels() if self._runs_again else nullcontext():
                products = reverse(
                    [g for g, _ in pairs],
                    self._leaves,
                    [x for _, x in pairs],
                    retain_graph=self._is_recorded or not is_last,
                    create_graph=self._is_recorded,
                )
            return self._tree(products)

    def products(self, v: Tree, k: int | None, limit: Limit, *, are_last: bool = False) -> Tree:
        """∇²f v, for one direction or for each of k; the last may free the graph."""
        if k is None:
            return self.product(v, is_last=are_last)
        device = self._leaves[0].device
        chunk = limit.of(k, device, lambda: intermediates([self._loss]), is_retained=True)
        return for_each(lambda t: ((), self.product(t)), v, k, chunk)[1]


def _gradient(
    f: Callable[..., Tensor], leaves: list[Tensor], spec: pytree.TreeSpec, args: tuple[Any, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    loss = f(pytree.tree_unflatten(leaves, spec), *args)
    if not loss.requires_grad:
        return loss, [None] * len(leaves)
    return loss, reverse(
        [loss], leaves, [unit_cotangent(loss)], retain_graph=True, create_graph=True
    )
