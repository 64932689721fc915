"""Jacobian products in forward and in reverse mode."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch.utils import _pytree as pytree

from hvpopt.engines.support import differentiable_kernels
from hvpopt.products.differences import central
from hvpopt.products.directions import Limit, along
from hvpopt.products.jacobian_graph import JacobianGraph
from hvpopt.products.surroundings import must_compose, rewinder
from hvpopt.pytrees import Tree, check_like, check_params, num_directions
from hvpopt.trees import TensorList

Mode = Literal["forward", "double_reverse", "finite_difference"]


def jvp(
    f: Callable[..., Tree],
    params: Tree,
    v: Tree,
    *args: Any,
    mode: Mode = "forward",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> tuple[Tree, Tree]:
    """The value f(params) and its derivative J v along ``v``, or along several directions.

    The modes are forward mode; "double_reverse", which differentiates u ↦ Jᵀu along v, for
    operations without forward-mode formulas; and "finite_difference", the central difference
    (f(params + h v) − f(params − h v)) / 2h with the step of `hvp_finite_difference`,
    approximate and not differentiable.

    Args:
        f: ``f(params, *args)``, a pytree of tensors.
        params: Real floating-point tensors.
        v: A tangent, of the structure, shapes and dtypes of ``params``, or k of them, with one
            more dimension, the first, in every leaf.
        *args: Passed on to ``f``, not differentiated.
        mode: How, as above.
        chunk_size: As of `grad_and_hvp`.
        memory_budget: As of `grad_and_hvp`.

    Returns:
        (out, tangent): f's value, and J v in its structure and shapes, with k's dimension where
        ``v`` has it.

    Raises:
        TypeError: For parameters that are not real floating-point tensors, and in the other
            modes than "forward" for such values of f.
        ValueError: If ``v`` does not match ``params``, these hold no tensor, or an option is
            unknown or out of range.

    Examples:
        >>> jvp(lambda p: p**2, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        (tensor([1., 9.]), tensor([2., 6.]))
    """
    check_mode(mode, Mode)
    limit = Limit(chunk_size, memory_budget)
    check_params(params, "params")
    k = num_directions(v, params, "v", "params")
    composes = must_compose(params, v, args)

    def value(p: Tree) -> Tree:
        return f(p, *args)

    one = _forward(value, params)
    if mode == "finite_difference":
        one, limit = _differenced(value, params), Limit(1, None)
    elif mode == "double_reverse":
        one = (_double_reverse if composes else _lean_double_reverse)(value, params)
    return along(one, v, k, limit=limit, run=value, params=params)


def check_mode(mode: object, modes: Any) -> None:
    """Lets a mode pass that is one of a Literal's.

    Raises:
        ValueError: For others.
    """
    if mode not in get_args(modes):
        choices = ", ".join(map(repr, get_args(modes)))
        raise ValueError(f"mode={mode!r} is unknown: choose one of {choices}.")


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
        check_params(value, VALUE)
        return value

    out, pullback = torch.func.vjp(checked, params)[:2]
    check_like(u, out, "u", VALUE)
    return out, pullback(u)[0]


VALUE = "the value of f"
Pushforward = Callable[[Tree], tuple[Tree, Tree]]


def _forward(f: Callable[[Tree], Tree], params: Tree) -> Pushforward:
    def one(v: Tree) -> tuple[Tree, Tree]:
        with differentiable_kernels():
            return torch.func.jvp(f, (params,), (v,))[:2]

    return one


def _double_reverse(f: Callable[[Tree], Tree], params: Tree) -> Pushforward:
    with differentiable_kernels():
        out, pullback = torch.func.vjp(f, params)[:2]
    check_params(out, VALUE)
    zero = pytree.tree_map(torch.zeros_like, out)
    pushforward = torch.func.vjp(lambda u: pullback(u)[0], zero)[1]
    return lambda v: (out, pushforward(v)[0])


def _lean_double_reverse(f: Callable[[Tree], Tree], params: Tree) -> Pushforward:
    graph = JacobianGraph(f, params, VALUE)

    def one(v: Tree) -> tuple[Tree, Tree]:
        tangent = graph.pushforward(pytree.tree_leaves(v))
        return graph.value(), pytree.tree_unflatten(tangent, graph.spec)

    return one


def _differenced(f: Callable[[Tree], Tree], params: Tree) -> Pushforward:
    rewind = rewinder(params)
    with torch.no_grad():
        out = f(params)
    check_params(out, VALUE)

    def values(p: Tree) -> TensorList:
        with torch.no_grad():
            return pytree.tree_leaves(f(p))

    def one(v: Tree) -> tuple[Tree, Tree]:
        rewind()  # the differences are of the function whose value this is
        (tangent,) = central(values, params, v, (1.0,), 1 / 3)
        return out, pytree.tree_unflatten(tangent, pytree.tree_structure(out))

    return one
