"""Products with the generalised Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.engines.support import differentiable_kernels
from hvpopt.products.directions import Limit, along
from hvpopt.products.first_order import check_mode
from hvpopt.products.gradient_graph import GradientGraph
from hvpopt.products.jacobian_graph import JacobianGraph
from hvpopt.products.rules import reverse_over_reverse
from hvpopt.products.surroundings import must_compose, rewinder
from hvpopt.pytrees import Tree, check_params, num_directions, scalar_valued

Mode = Literal["forward", "double_reverse"]
OUTPUT = "the model's output"


def ggnvp(
    model: Callable[..., Tree],
    loss: Callable[[Tree], Tensor],
    params: Tree,
    v: Tree,
    *args: Any,
    mode: Mode = "forward",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tree:
    """The generalised Gauss-Newton product Jᵀ ∇²loss(z) J v, with J = ∂z/∂params, or several.

    J v by forward mode and Jᵀu by reverse mode over one run of the model: about 5/3 gradients.
    It is positive semidefinite where ``loss`` is convex in z, and the Hessian where the model is
    linear. ``mode="double_reverse"`` takes J v as the derivative of u ↦ Jᵀu instead, for models
    with operations that have no forward-mode formulas.

    Args:
        model: ``model(params, *args)``, the network's output z, a pytree of real floating-point
            tensors.
        loss: ``loss(z)``, a real floating-point tensor without dimensions.
        params: Real floating-point tensors.
        v: A direction, of the structure, shapes and dtypes of ``params``, or k directions, with
            one more dimension, the first, in every leaf.
        *args: Passed on to ``model``, not differentiated.
        mode: How J v is computed.
        chunk_size: As of `grad_and_hvp`.
        memory_budget: As of `grad_and_hvp`.

    Returns:
        The product in the structure and shapes of ``params``, with k's dimension where ``v`` has
        it, in the scale of ``loss``.

    Raises:
        TypeError: If parameters, the model's output or the loss are not real floating-point
            tensors.
        ValueError: If ``v`` does not match ``params``, these hold no tensor, the loss has
            dimensions, or an option is unknown or out of range.

    Source: Schraudolph, Fast curvature matrix-vector products (Neural Computation, 2002).

    Examples:
        >>> model, loss = lambda p, x: x * p**2, lambda z: 0.5 * (z**2).sum()
        >>> ggnvp(model, loss, torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([144.])
    """
    check_mode(mode, Mode)
    limit = Limit(chunk_size, memory_budget)
    check_params(params, "params")
    k = num_directions(v, params, "v", "params")
    composes = must_compose(params, v, args)

    def value(p: Tree) -> Tree:
        return model(p, *args)

    if mode == "double_reverse":
        one = (_double_reverse if composes else _lean_double_reverse)(value, loss, params)
    elif k is not None and not composes:
        one = _apart(value, loss, params)
    else:
        one = _forward(value, loss, params, composes)
    return along(one, v, k, limit=limit, run=value, params=params)[1]


Product = Callable[[Tree], tuple[Tree, Tree]]


def forward_and_back(
    model: Callable[[Tree], Tree], params: Tree, v: Tree
) -> tuple[Tree, Tree, Callable[..., Tree]]:
    """The output z, J v, and u ↦ (Jᵀu,), over one run of the model."""

    def pushed(p: Tree) -> tuple[Tree, Tree]:
        z, tangent = torch.func.jvp(model, (p,), (v,))[:2]
        check_params(z, OUTPUT)
        return z, tangent

    with differentiable_kernels():
        z, pullback, tangent = torch.func.vjp(pushed, params, has_aux=True)  # type: ignore[misc]
    return z, tangent, pullback


def _forward(
    model: Callable[[Tree], Tree], loss: Callable[[Tree], Tensor], params: Tree, composes: bool
) -> Product:
    def one(v: Tree) -> tuple[Tree, Tree]:
        z, tangent, pullback = forward_and_back(model, params, v)
        curved = reverse_over_reverse(scalar_valued(loss, "loss"), z, tangent)[2]
        record = (composes or _is_recorded(z, curved)) and torch.is_grad_enabled()
        return (), pullback(curved, retain_graph=record, create_graph=record)[0]

    return one


def _apart(model: Callable[[Tree], Tree], loss: Callable[[Tree], Tensor], params: Tree) -> Product:
    """For several directions: one run for Jᵀ, which all share, and forward mode in runs of its own.

    Forward mode inside of the run for Jᵀ would record the tangents of all directions, too.
    """
    rewind = rewinder(params)
    with differentiable_kernels():
        z, pullback = torch.func.vjp(model, params)[:2]
    check_params(z, OUTPUT)

    def one(v: Tree) -> tuple[Tree, Tree]:
        rewind()
        with differentiable_kernels():
            tangent = torch.func.jvp(model, (params,), (v,))[1]
        curved = reverse_over_reverse(scalar_valued(loss, "loss"), z, tangent)[2]
        record = _is_recorded(z, curved) and torch.is_grad_enabled()
        return (), pullback(curved, retain_graph=True, create_graph=record)[0]

    return one


def _is_recorded(*trees: Tree) -> bool:
    """Whether captured tensors add to a graph; where there is none, none is built."""
    return any(x.requires_grad for x in pytree.tree_leaves(trees))


def _double_reverse(
    model: Callable[[Tree], Tree], loss: Callable[[Tree], Tensor], params: Tree
) -> Product:
    with differentiable_kernels():
        z, pullback = torch.func.vjp(model, params)[:2]
    check_params(z, OUTPUT)
    zero = pytree.tree_map(torch.zeros_like, z)
    pushforward = torch.func.vjp(lambda u: pullback(u)[0], zero)[1]

    def one(v: Tree) -> tuple[Tree, Tree]:
        curved = reverse_over_reverse(scalar_valued(loss, "loss"), z, pushforward(v)[0])[2]
        return (), pullback(curved)[0]

    return one


def _lean_double_reverse(
    model: Callable[[Tree], Tree], loss: Callable[[Tree], Tensor], params: Tree
) -> Product:
    graph = JacobianGraph(model, params, OUTPUT)
    if graph.is_recorded:
        return _double_reverse(model, loss, params)
    head = GradientGraph(loss, graph.value(), (), what="loss")

    def one(v: Tree) -> tuple[Tree, Tree]:
        tangent = graph.pushforward(pytree.tree_leaves(v))
        curved = head.product(pytree.tree_unflatten(tangent, graph.spec))
        pulled = graph.pullback(pytree.tree_leaves(curved))
        return (), pytree.tree_unflatten(pulled, pytree.tree_structure(params))

    return one
