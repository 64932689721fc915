"""The rules that combine forward and reverse mode to loss, gradient and Hessian product.

Each takes a scalar-valued f, parameters and a direction, and returns (loss, grad, hv). Without
``with_grad`` those that would do more for it return () in its place. Those named ``lean_`` return
values alone; the others compose with everything that ``torch.func`` composes with.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.engines.support import differentiable_kernels
from hvpopt.products.normalization import ElementaryNormalization, check_formulas
from hvpopt.products.surroundings import captures_recorded, rewinder
from hvpopt.pytrees import Tree

Scalar = Callable[[Tree], Tensor]


class Rule(Protocol):
    """What these functions have in common."""

    def __call__(
        self, f: Scalar, params: Tree, v: Tree, *, with_grad: bool = True
    ) -> tuple[Tensor, Tree, Tree]:
        """(loss, grad, hv)."""
        ...


def forward_over_reverse(
    f: Scalar, params: Tree, v: Tree, *, with_grad: bool = True
) -> tuple[Tensor, Tree, Tree]:
    """d/dε ∇f(params + ε v) at ε = 0."""
    with differentiable_kernels():
        (grad, loss), (hv, _) = torch.func.jvp(torch.func.grad_and_value(f), (params,), (v,))[:2]
    return loss, grad, hv


def reverse_over_reverse(
    f: Scalar, params: Tree, v: Tree, *, with_grad: bool = True
) -> tuple[Tensor, Tree, Tree]:
    """∇(∇fᵀv) = (∂∇f/∂params)ᵀ v."""
    with differentiable_kernels():
        (grad, loss), pullback = torch.func.vjp(torch.func.grad_and_value(f), params)[:2]
    return loss, grad, pullback((v, torch.zeros_like(loss)))[0]


def reverse_over_forward(
    f: Scalar, params: Tree, v: Tree, *, with_grad: bool = True
) -> tuple[Tensor, Tree, Tree]:
    """∇(d/dε f(params + ε v)), and ∇f by one more reverse pass."""

    def along(p: Tree) -> tuple[Tensor, Tensor]:
        loss, slope = torch.func.jvp(f, (p,), (v,))[:2]
        check_formulas([loss, slope])
        return loss, slope

    with differentiable_kernels(), ElementaryNormalization():
        (loss, _), pullback = torch.func.vjp(along, params)[:2]
    one, zero = torch.ones_like(loss), torch.zeros_like(loss)
    grad = pullback((one, zero))[0] if with_grad else ()
    return loss, grad, pullback((zero, one))[0]


def lean_forward_over_reverse(
    f: Scalar, params: Tree, v: Tree, *, with_grad: bool = True
) -> tuple[Tensor, Tree, Tree]:
    """`forward_over_reverse` with a reverse pass that records no graph and frees what it used.

    ``torch.func.grad`` builds its gradient with ``create_graph=True``, for a derivative that nobody
    takes here: on a GPT of four layers that doubles the peak memory. Where a backward kernel has
    no forward-mode formula (SiLU, Mish, GroupNorm), the graph is needed after all: f then runs
    a second time. So it does where f captures what autograd records.
    """
    rewind = rewinder(params)

    def gradient(p: Tree) -> tuple[Tree, Tensor]:
        loss, pullback = torch.func.vjp(f, p)[:2]
        one = torch.ones_like(loss)
        grad = pullback(one, retain_graph=False, create_graph=False)[0]
        return grad, loss

    try:
        with differentiable_kernels():
            (grad, loss), (hv, _) = torch.func.jvp(gradient, (params,), (v,))[:2]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        pass
    else:
        if not loss.requires_grad:
            return loss, grad, hv
    rewind()
    return forward_over_reverse(f, params, v)


def lean_reverse_over_forward(
    f: Scalar, params: Tree, v: Tree, *, with_grad: bool = True
) -> tuple[Tensor, Tree, Tree]:
    """`reverse_over_forward` with reverse passes of plain autograd.

    Where f captures what autograd records, it runs a second time, for the rule that composes.
    """
    rewind, may_record = rewinder(params), torch.is_grad_enabled()
    flat, spec = pytree.tree_flatten(params)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in flat]
        with differentiable_kernels(), ElementaryNormalization():
            loss, slope = torch.func.jvp(f, (pytree.tree_unflatten(leaves, spec),), (v,))[:2]
    check_formulas([loss, slope])
    if may_record and captures_recorded([loss, slope], leaves):
        rewind()
        return reverse_over_forward(f, params, v, with_grad=with_grad)
    grad = ()
    if with_grad:
        grad = pytree.tree_unflatten(_gradient(loss, leaves, retain_graph=True), spec)
    hv = pytree.tree_unflatten(_gradient(slope, leaves), spec)
    return loss.detach(), grad, hv


def _gradient(value: Tensor, leaves: list[Tensor], *, retain_graph: bool = False) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(x, requires_grad=False) for x in leaves]
    return list(
        torch.autograd.grad(value, leaves, retain_graph=retain_graph, materialize_grads=True)
    )
