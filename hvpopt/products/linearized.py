"""The gradient built once, as an operator for many Hessian products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.engines.support import differentiable_kernels
from hvpopt.linearization import Linearization
from hvpopt.products.compiled import compiled_for
from hvpopt.products.directions import Limit
from hvpopt.products.gradient_graph import GradientGraph
from hvpopt.pytrees import Tree, check_params, num_directions, scalar_valued


def linearize(
    f: Callable[..., Tensor], params: Tree, *args: Any, compile: bool = False
) -> Linearization:
    """The loss, its gradient, and ∇²f as an operator that is cheap to apply many times.

    The gradient's graph is built once and kept; ∇²f v = ∇(∇fᵀv) is then one reverse pass over
    it, about two gradients, and f is not run again. The graph lives as long as the result
    does. Applications may be batched, ``torch.vmap(linearization.hvp)(vs)`` or with k directions
    at once, but nothing here is differentiable further. Changing the parameters in place
    invalidates the graph, and ``hvp`` then raises torch's error about a modified variable.

    Args:
        f: ``f(params, *args)``, a real floating-point tensor without dimensions.
        params: Real floating-point tensors.
        *args: Passed on to ``f``, not differentiated.
        compile: Compiles the gradient and its pullback by ``torch.compile``, with the cache and
            the fall-back of `hvpopt.products.grad_and_hvp`. k directions then go one by one.

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
    with torch.no_grad():  # so that nothing that f captures is recorded
        graph = _compiled(f, params, args) if compile else None
        is_compiled = graph is not None
        graph = graph or GradientGraph(f, params, args)

    def product(v: Tree, chunk_size: int | None, memory_budget: int | None) -> Tree:
        limit = Limit(chunk_size, memory_budget)
        k = num_directions(v, params, "v", "params")
        return graph.products(v, k, Limit(1, None) if is_compiled else limit)

    return Linearization(graph.loss, graph.grad, product)


def _compiled(
    f: Callable[..., Tensor], params: Tree, args: tuple[Any, ...]
) -> GradientGraph | None:
    """The graph whose only node is compiled, or None where that fails."""
    function = compiled_for(_gradient, f)
    is_new = function.is_new
    if function.has_failed:
        return None
    args = pytree.tree_map_only(Tensor, Tensor.detach, args)

    def gradient(f: Any, leaves: Any, spec: Any, args: Any) -> tuple[Tensor, list[Tensor | None]]:
        # what the compiled pullback reads is read again by the next product
        with torch._functorch.config.patch(donated_buffer=False):
            loss, grad = function.compiled(f, pytree.tree_unflatten(leaves, spec), args)
        return loss, pytree.tree_leaves(grad)

    try:
        graph = GradientGraph(f, params, args, gradient)
        if is_new:  # the pullback is compiled when it is first needed
            graph.product(pytree.tree_map(torch.zeros_like, params))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        eager = GradientGraph(f, params, args)  # raises again what is not the compiler's doing
        function.give_up(error)
        return eager
    return graph


def _gradient(f: Callable[..., Tensor], params: Tree, args: tuple[Any, ...]) -> tuple[Tensor, Tree]:
    with differentiable_kernels():
        grad, loss = torch.func.grad_and_value(scalar_valued(lambda p: f(p, *args), "f"))(params)
    return loss, grad
