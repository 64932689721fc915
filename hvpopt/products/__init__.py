"""Derivative products of functions on pytrees, like ``torch.func``.

``f(params, *args)`` takes parameters as a pytree (a tensor, or dicts, lists and tuples of
tensors). With ``torch.func.functional_call`` it is a module's loss. Parameters stay as they are
and receive no ``.grad``, whether they require gradients or not.

A direction has the structure and shapes of the parameters. Where every leaf has one more
dimension, its first, of size k, it holds k directions, and the product gets the same dimension.

`jvp`, `vjp`, `hvp`, `grad_and_hvp`, `ggnvp` and `fisher_vp` compose with ``torch.vmap``,
``torch.func.grad`` and ``backward()``, but not by finite differences, nor with ``compile=True``.
Parameters that require gradients make the result differentiable too, which takes time and memory:
detach them, or call under ``no_grad``, where only the value is wanted.

A function that updates a captured tensor in place, such as BatchNorm's running statistics in
training mode, must be given a copy of it: ``functional_call(net, (params, clones), x)``.
"""

from hvpopt.linearization import Linearization
from hvpopt.products.differences import FiniteDifference, hvp_finite_difference
from hvpopt.products.first_order import jvp, vjp
from hvpopt.products.fisher import fisher_vp
from hvpopt.products.gauss_newton import ggnvp
from hvpopt.products.hessian import grad_and_hvp, hvp
from hvpopt.products.linearized import linearize

__all__ = [
    "FiniteDifference",
    "Linearization",
    "fisher_vp",
    "ggnvp",
    "grad_and_hvp",
    "hvp",
    "hvp_finite_difference",
    "jvp",
    "linearize",
    "vjp",
]
