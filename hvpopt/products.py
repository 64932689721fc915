"""Derivative products of functions on pytrees, like ``torch.func``.

``f(params, *args)`` takes parameters as a pytree (a tensor, or dicts, lists and tuples of
tensors). With ``torch.func.functional_call`` it is a module's loss. Parameters stay as they are
and receive no ``.grad``, whether they require gradients or not.

One-shot Hessian products are forward-over-reverse by ``torch.func.jvp`` of the gradient. Duals
attached in place, or an inner reverse pass without a graph, need less memory, but there
``vmap`` fails or a derivative of the product is silently wrong: those belong to
`hvpopt.closure`, where nothing is composed. All functions here but `linearize` compose with
``torch.vmap``, ``torch.func.grad`` and ``backward()``. Parameters that require gradients make
the result differentiable too, which takes memory: detach them, or call under ``no_grad``, where
only the value is wanted.

A function that updates a captured tensor in place, such as BatchNorm's running statistics in
training mode, must be given a copy of it: ``functional_call(net, (params, clones), x)``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvpopt.engines.support import differentiable_kernels
from hvpopt.linearization import Linearization, linearize
from hvpopt.pytrees import Tree, check_like, check_params, scalar_valued

__all__ = ["Linearization", "ggnvp", "grad_and_hvp", "hvp", "jvp", "linearize", "vjp"]


def jvp(f: Callable[..., Tree], params: Tree, v: Tree, *args: Any) -> tuple[Tree, Tree]:
    """The value f(params) and its derivative J v along ``v``, by forward mode.

    Args:
        f: ``f(params, *args)``, a pytree of tensors.
        params: Real floating-point tensors.
        v: A tangent, of the structure, shapes and dtypes of ``params``.
        *args: Passed on to ``f``, not differentiated.

    Returns:
        (out, tangent): f's value, and J v in its structure and shapes.

    Raises:
        TypeError: For parameters that are not real floating-point tensors.
        ValueError: If ``v`` does not match ``params``, or these hold no tensor.

    Examples:
        >>> jvp(lambda p: p**2, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        (tensor([1., 9.]), tensor([2., 6.]))
    """
    check_params(params, "params")
    check_like(v, params, "v", "params")
    with differentiable_kernels():
        out, tangent = torch.func.jvp(lambda p: f(p, *args), (params,), (v,))[:2]
    return out, tangent


def vjp(f: Callable[..., Tree], params: Tree, u: Tree, *args: Any) -> tuple[Tree, Tree]:
    """The value f(params) and the pullback Jᵀu of a cotangent ``u``, by reverse mode.

    Args:
        f: ``f(params, *args)``, a pytree of tensors.
        params: Real floating-point tensors.
        u: A cotangent, of the structure, shapes and dtypes of f's value.
        *args: Passed on to ``f``, not differentiated.

    Returns:
        (out, cotangent): f's value, and Jᵀu in the structure and shapes of ``params``.

    Raises:
        TypeError: For parameters or values that are not real floating-point tensors.
        ValueError: If ``u`` does not match f's value, or ``params`` hold no tensor.

    Examples:
        >>> vjp(lambda p: p**2, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]))
        (tensor([1., 9.]), tensor([2., 0.]))
    """
    check_params(params, "params")

    def checked(p: Tree) -> Tree:
        value = f(p, *args)
        check_params(value, "the value of f")
        return value

    out, pullback = torch.func.vjp(checked, params)[:2]
    check_like(u, out, "u", "the value of f")
    return out, pullback(u)[0]


def hvp(f: Callable[..., Tensor], params: Tree, v: Tree, *args: Any) -> Tree:
    """The Hessian-vector product ∇²f(params) v, by forward-over-reverse.

    The arguments, units and errors are those of `grad_and_hvp`, which returns what this
    computes on the way.

    Examples:
        >>> hvp(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    return grad_and_hvp(f, params, v, *args)[2]


def grad_and_hvp(
    f: Callable[..., Tensor], params: Tree, v: Tree, *args: Any
) -> tuple[Tensor, Tree, Tree]:
    """The loss f(params), its gradient ∇f, and ∇²f v, for little more than ∇²f v costs.

    The derivative of the gradient along v, d/dε ∇f(params + ε v) at ε = 0, by forward mode over
    reverse mode: about three gradients in a deep network.

    Args:
        f: ``f(params, *args)``, a real floating-point tensor without dimensions.
        params: Real floating-point tensors.
        v: A direction, of the structure, shapes and dtypes of ``params``.
        *args: Passed on to ``f``, not differentiated.

    Returns:
        (loss, grad, hv): the last two in the structure and shapes of ``params`` and in f's own
        scale (of the mean over a batch, where f is a mean). Parameters that f does not use have
        zeros.

    Raises:
        TypeError: If parameters or the loss are not real floating-point tensors.
        ValueError: If ``v`` does not match ``params``, these hold no tensor, or the loss has
            dimensions.

    Source: Pearlmutter, Fast exact multiplication by the Hessian (Neural Computation, 1994).

    Examples:
        >>> p, v = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}
        >>> loss, grad, hv = grad_and_hvp(lambda p: (p["w"] ** 3).sum(), p, v)
        >>> loss, grad["w"], hv["w"]
        (tensor(9.), tensor([ 3., 12.]), tensor([6., 0.]))
    """
    check_params(params, "params")
    check_like(v, params, "v", "params")
    return _grad_and_hvp(scalar_valued(lambda p: f(p, *args), "f"), params, v)


def ggnvp(
    model: Callable[..., Tree],
    loss: Callable[[Tree], Tensor],
    params: Tree,
    v: Tree,
    *args: Any,
) -> Tree:
    """The generalised Gauss-Newton product Jᵀ ∇²loss(z) J v, with J = ∂z/∂params.

    J v by forward mode and Jᵀu by reverse mode over one run of the model: about 5/3 gradients.
    It is positive semidefinite where ``loss`` is convex in z, and the Hessian where the model is
    linear.

    Args:
        model: ``model(params, *args)``, the network's output z, a pytree of real floating-point
            tensors.
        loss: ``loss(z)``, a real floating-point tensor without dimensions.
        params: Real floating-point tensors.
        v: A direction, of the structure, shapes and dtypes of ``params``.
        *args: Passed on to ``model``, not differentiated.

    Returns:
        The product in the structure and shapes of ``params``, in the scale of ``loss``.

    Raises:
        TypeError: If parameters, the model's output or the loss are not real floating-point
            tensors.
        ValueError: If ``v`` does not match ``params``, these hold no tensor, or the loss has
            dimensions.

    Source: Schraudolph, Fast curvature matrix-vector products (Neural Computation, 2002).

    Examples:
        >>> model, loss = lambda p, x: x * p**2, lambda z: 0.5 * (z**2).sum()
        >>> ggnvp(model, loss, torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([144.])
    """
    check_params(params, "params")
    check_like(v, params, "v", "params")

    def pushed(p: Tree) -> tuple[Tree, Tree]:
        z, tangent = torch.func.jvp(lambda q: model(q, *args), (p,), (v,))[:2]
        check_params(z, "the model's output")
        return z, tangent

    with differentiable_kernels():
        z, pullback, tangent = torch.func.vjp(pushed, params, has_aux=True)  # type: ignore[misc]
    curved = _grad_and_hvp(scalar_valued(loss, "loss"), z, tangent)[2]
    return pullback(curved)[0]


def _grad_and_hvp(f: Callable[[Tree], Tensor], params: Tree, v: Tree) -> tuple[Tensor, Tree, Tree]:
    with differentiable_kernels():
        (grad, loss), (hv, _) = torch.func.jvp(torch.func.grad_and_value(f), (params,), (v,))[:2]
    return loss, grad, hv
