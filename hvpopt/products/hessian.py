"""Hessian products of scalar functions, and which rule computes them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.products import rules
from hvpopt.products.compiled import compiled_for
from hvpopt.products.differences import differenced
from hvpopt.products.directions import Limit, along, for_each
from hvpopt.products.first_order import check_mode
from hvpopt.products.gradient_graph import GradientGraph
from hvpopt.products.surroundings import in_transform, must_compose, ordinary_args, rewinder
from hvpopt.pytrees import Tree, check_params, num_directions, scalar_valued

Mode = Literal[
    "auto",
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "finite_difference",
]

_COMPOSING: dict[str, rules.Rule] = {
    "forward_over_reverse": rules.forward_over_reverse,
    "reverse_over_forward": rules.reverse_over_forward,
    "reverse_over_reverse": rules.reverse_over_reverse,
}
_LEAN: dict[str, rules.Rule] = {
    "forward_over_reverse": rules.lean_forward_over_reverse,
    "reverse_over_forward": rules.lean_reverse_over_forward,
}


def hvp(
    f: Callable[..., Tensor],
    params: Tree,
    v: Tree,
    *args: Any,
    mode: Mode = "auto",
    compile: bool = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tree:
    """The Hessian-vector product ∇²f(params) v, or several.

    The arguments, units and errors are those of `grad_and_hvp`, which also returns what most
    modes compute on the way.

    Examples:
        >>> hvp(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
        >>> hvp(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]), torch.eye(2))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    limit = Limit(chunk_size, memory_budget)
    return _second_order(f, params, v, args, mode, compile, limit, with_grad=False)[2]


def grad_and_hvp(
    f: Callable[..., Tensor],
    params: Tree,
    v: Tree,
    *args: Any,
    mode: Mode = "auto",
    compile: bool = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tree, Tree]:
    """The loss f(params), its gradient ∇f, and ∇²f v, for little more than ∇²f v costs.

    The modes, with the time and the peak memory of all three on a CPU, in those of one gradient,
    for an MLP, a CNN and a GPT (`hvpopt.experiments.benchmarks` measures yours):

    - "reverse_over_reverse": ∇(∇fᵀv); time 2.5, 3.7, 3.3, memory 2.4, 2.0, 3.3.
    - "forward_over_reverse": d/dε ∇f(params + ε v) at ε = 0; time 3.7, 4.4, 4.2, memory 3.2, 1.8,
      2.4: the least of networks whose activations outweigh their weights. Where the result is
      differentiable it is torch.func's, with memory 4.4, 3.1, 5.3.
    - "reverse_over_forward": ∇(d/dε f(params + ε v)), and one more reverse pass for ∇f; time 3.4,
      5.8, 4.3, memory 2.8, 3.3, 3.8. Layer, batch and instance norm are then computed step by
      step, as torch's forward-mode formulas of them are wrong under a reverse pass.
    - "finite_difference": central differences of ∇f, approximate (`hvp_finite_difference`), for
      what has no second derivatives in torch. It neither composes nor is differentiable.
    - "auto": reverse over reverse where only the value can be wanted; forward over reverse, by
      ``torch.func``, inside transforms and ``torch.compile``, under inference mode, and where
      autograd records one of ``params``, ``v`` and ``*args``.

    Args:
        f: ``f(params, *args)``, a real floating-point tensor without dimensions.
        params: Real floating-point tensors.
        v: A direction, of the structure, shapes and dtypes of ``params``, or k directions, with
            one more dimension, the first, in every leaf.
        *args: Passed on to ``f``, not differentiated.
        mode: How, as above.
        compile: Computes one direction's product by ``torch.compile`` (in the mode given; "auto"
            is reverse over reverse). It is compiled on the first call, which takes seconds to
            minutes, again where shapes, dtypes or what f depends on change, and kept for the 32
            functions used last. Functions are told apart by their code, so that a lambda made
            anew at each call is compiled once; callable objects by their identity, so pass the
            same one. What cannot be compiled runs eagerly, with one warning that says why.
            Results are values: nothing is recorded.
        chunk_size: How many of k directions go at once (by ``torch.vmap``; 1 for one by one).
        memory_budget: Instead of ``chunk_size``, how many bytes the intermediate values of the
            directions that go at once may take, by an estimate from f's graph; f is run once
            more for it, except by reverse over reverse. The default is 64 MiB on a CPU and
            1 GiB elsewhere; inside a transform and under inference mode all go at once.

    Returns:
        (loss, grad, hv): the last two in the structure and shapes of ``params`` and in f's own
        scale (of the mean over a batch, where f is a mean), hv with k's dimension where v has
        it. Parameters that f does not use have zeros. All k products are of one function: f's
        random numbers are the same for each.

    Raises:
        TypeError: If parameters or the loss are not real floating-point tensors.
        ValueError: If ``v`` does not match ``params``, these hold no tensor, the loss has
            dimensions, or an option is unknown or out of range.
        RuntimeError: If f has an operation without the derivatives that the mode takes.

    Source: Pearlmutter, Fast exact multiplication by the Hessian (Neural Computation, 1994).

    Examples:
        >>> p, v = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}
        >>> loss, grad, hv = grad_and_hvp(lambda p: (p["w"] ** 3).sum(), p, v)
        >>> loss, grad["w"], hv["w"]
        (tensor(9.), tensor([ 3., 12.]), tensor([6., 0.]))
    """
    limit = Limit(chunk_size, memory_budget)
    return _second_order(f, params, v, args, mode, compile, limit, with_grad=True)


def _second_order(
    f: Callable[..., Tensor],
    params: Tree,
    v: Tree,
    args: tuple[Any, ...],
    mode: Mode,
    compile: bool,
    limit: Limit,
    *,
    with_grad: bool,
) -> tuple[Tensor, Tree, Tree]:
    """(loss, grad, hv); without grad its place is empty where it would take work of its own."""
    check_mode(mode, Mode)
    check_params(params, "params")
    k = num_directions(v, params, "v", "params")
    if compile and not torch.compiler.is_compiling():
        return _compiled(f, params, v, args, mode, k, limit)
    composes = must_compose(params, v, args)
    if mode == "auto":
        mode = "forward_over_reverse" if composes else "reverse_over_reverse"
    if mode == "reverse_over_reverse" and not composes:
        graph = GradientGraph(f, params, args)
        return graph.loss, graph.grad, graph.products(v, k, limit, are_last=True)

    rule = (_COMPOSING if composes else _LEAN).get(mode, differenced)
    if mode == "finite_difference":
        limit, args = Limit(1, None), ordinary_args(args)
    value = scalar_valued(lambda p: f(p, *args), "f")

    def one(t: Tree) -> tuple[Tree, Tree]:
        chosen = rule
        if rule is rules.lean_reverse_over_forward and in_transform():
            chosen = rules.reverse_over_forward  # several at once: vmap batches no plain autograd
        loss, grad, hv = chosen(value, params, t, with_grad=with_grad)
        return (loss, grad), hv

    (loss, grad), hv = along(one, v, k, limit=limit, run=value, params=params)
    return loss, grad, hv


def _compiled(
    f: Callable[..., Tensor],
    params: Tree,
    v: Tree,
    args: tuple[Any, ...],
    mode: Mode,
    k: int | None,
    limit: Limit,
) -> tuple[Tensor, Tree, Tree]:
    """Loss, gradient and product by ``torch.compile``; several directions one by one."""
    if mode == "finite_difference":
        raise ValueError(
            "compile=True with mode='finite_difference': differences are two gradients; compile f."
        )
    rule = _COMPOSING["reverse_over_reverse" if mode == "auto" else mode]
    function = compiled_for(_product, f, mode)
    if function.has_failed:
        with torch.no_grad():
            return _second_order(f, params, v, args, mode, False, limit, with_grad=True)
    params, v, args = pytree.tree_map_only(Tensor, Tensor.detach, (params, v, args))

    def one(t: Tree) -> tuple[Tree, Tree]:
        loss, grad, hv = function(rule, f, params, t, args)
        return (loss, grad), hv

    (loss, grad), hv = one(v) if k is None else for_each(one, v, k, 1, rewinder(params))
    return loss, grad, hv


def _product(
    rule: rules.Rule, f: Callable[..., Tensor], params: Tree, v: Tree, args: tuple[Any, ...]
) -> tuple[Tensor, Tree, Tree]:
    return rule(scalar_valued(lambda p: f(p, *args), "f"), params, v)
