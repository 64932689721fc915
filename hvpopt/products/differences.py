"""Hessian products by differences of gradients, with an estimate of their error."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt import trees
from hvpopt.engines.base import fill
from hvpopt.products.surroundings import in_transform, ordinary, ordinary_args, rewinder
from hvpopt.pytrees import Tree, check_like, check_params, scalar_valued
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class FiniteDifference:
    """A Hessian product by finite differences, and how far it may be off."""

    value: Tree
    """≈ ∇²f v, in the structure and shapes of the parameters."""
    error: float
    """The estimated error ‖value − ∇²f v‖ / ‖value‖ over the whole tree."""


def hvp_finite_difference(
    f: Callable[..., Tensor], params: Tree, v: Tree, *args: Any, extrapolate: bool = False
) -> FiniteDifference:
    """The Hessian-vector product ∇²f(params) v by central differences, and its error.

    D(h) = (∇f(params + h v) − ∇f(params − h v)) / 2h,      h = ε^⅓ max(1, ‖params‖) / ‖v‖,

    with ε the machine precision of the coarsest dtype: the truncation error, of order h², then
    balances the rounding error, of order ε/h, and the product is good to about ε^⅔ (1e-10 in
    float64, 1e-5 in float32, in the best case) where ∇f is smooth on the scale of h v. Where it
    jumps (ReLU, max pooling), differences count each jump in reach as curvature, which the
    Hessian does not.

    The error is that of ‖D(2h) − D(h)‖: three times D(h)'s truncation error and a little more than
    its rounding error, so rather too large than too small. It is an estimate, not a bound.

    Args:
        f: ``f(params, *args)``, a real floating-point tensor without dimensions; only its gradient
            is needed. It is run four times (six to extrapolate), with the same random numbers.
        params: Real floating-point tensors.
        v: A direction, of the structure, shapes and dtypes of ``params``.
        *args: Passed on to ``f``.
        extrapolate: Gives Richardson's R(h) = (4 D(h) − D(2h)) / 3, whose truncation error is of
            order h⁴, with ε^⅕ instead of ε^⅓ in the step: good to about ε^⅘ where ∇f is smooth
            over that longer step. The error is then that of ‖R(2h) − R(h)‖.

    Raises:
        TypeError: If parameters or the loss are not real floating-point tensors.
        ValueError: If ``v`` does not match ``params``, these hold no tensor, the loss has
            dimensions, or a transform of ``torch.func`` is at work.

    Source: Nocedal and Wright, Numerical Optimization (2006), section 8.1.

    Examples:
        >>> p = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> found = hvp_finite_difference(lambda p: (p**3).sum(), p, torch.ones_like(p))
        >>> found.value.round(decimals=6), found.error < 1e-6
        (tensor([ 6., 12.], dtype=torch.float64), True)
    """
    check_params(params, "params")
    check_like(v, params, "v", "params")
    args = ordinary_args(args)
    value = scalar_valued(lambda p: f(p, *args), "f")
    multiples, order = ((1.0, 2.0, 4.0), 1 / 5) if extrapolate else ((1.0, 2.0), 1 / 3)
    rows = central(lambda p: gradient(value, p)[1], params, v, multiples, order)
    if extrapolate:
        rows = [
            trees.add(trees.scale(fine, 4 / 3), coarse, -1 / 3)
            for fine, coarse in itertools.pairwise(rows)
        ]
    best, other = rows
    size, error = float(trees.norm(best)), float(trees.norm(trees.add(other, best, -1.0)))
    relative = 0.0 if error == 0 else error / size if size > 0 else float("inf")
    return FiniteDifference(pytree.tree_unflatten(best, pytree.tree_structure(params)), relative)


def differenced(
    f: Callable[[Tree], Tensor], params: Tree, v: Tree, *, with_grad: bool = True
) -> tuple[Tensor, Tree, Tree]:
    """Loss, gradient and product from three runs of a scalar-valued f; two without the first."""
    rewind, spec = rewinder(params), pytree.tree_structure(params)
    (flat,) = central(lambda p: gradient(f, p)[1], params, v, (1.0,), 1 / 3)
    product = pytree.tree_unflatten(flat, spec)
    if not with_grad:
        return flat[0].new_zeros(()), (), product
    rewind()
    loss, grad = gradient(f, params)
    return loss, pytree.tree_unflatten(grad, spec), product


def gradient(f: Callable[[Tree], Tensor], params: Tree) -> tuple[Tensor, TensorList]:
    """The loss and its gradient by plain autograd, with whatever kernels are fastest."""
    flat, spec = pytree.tree_flatten(params)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [ordinary(p).detach().requires_grad_() for p in flat]
        loss = f(pytree.tree_unflatten(leaves, spec))
        if not loss.requires_grad:
            return loss, trees.zeros_like(leaves)
        return loss.detach(), fill(torch.autograd.grad(loss, leaves, allow_unused=True), leaves)


def central(
    at: Callable[[Tree], TensorList],
    params: Tree,
    v: Tree,
    multiples: tuple[float, ...],
    order: float,
) -> list[TensorList]:
    """(at(params + m h v) − at(params − m h v)) / 2 m h for each multiple m.

    h = ε^order max(1, ‖params‖) / ‖v‖. Each run of ``at`` has the same random numbers.

    Raises:
        ValueError: Inside a transform of ``torch.func``.
    """
    if in_transform():
        raise ValueError(
            "Finite differences are inside a torch.func transform, and their step depends on "
            "values, which transforms hide: choose another mode."
        )
    flat, spec = pytree.tree_flatten(params)
    flat = [ordinary(p.detach()) for p in flat]
    direction = [ordinary(x.detach()) for x in pytree.tree_leaves(v)]
    length = float(trees.norm(direction))
    if length == 0:
        return [trees.zeros_like(at(params)) for _ in multiples]
    epsilon = max(torch.finfo(p.dtype).eps for p in flat)
    step = epsilon**order * max(1.0, float(trees.norm(flat))) / length
    rewind = rewinder(params)
    quotients = []
    for h in (m * step for m in multiples):
        sides = []
        for signed in (h, -h):
            rewind()
            sides.append(at(pytree.tree_unflatten(trees.add(flat, direction, signed), spec)))
        up, down = sides
        quotients.append(trees.scale(trees.add(up, down, -1.0), 1 / (2 * h)))
    return quotients
