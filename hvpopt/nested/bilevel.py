"""What the hypergradients share: losses with their gradients and products, and checks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt import trees
from hvpopt.engines.base import fill
from hvpopt.engines.support import differentiable_kernels
from hvpopt.nested.joint import Products
from hvpopt.products import hvp, linearize
from hvpopt.products.surroundings import ordinary, rewinder
from hvpopt.pytrees import Tree, check_params, scalar_valued
from hvpopt.trees import TensorList

Loss = Callable[[Tree, Tree], Tensor]
"""(params, hparams) ↦ a scalar."""
JointProduct = Callable[[Tree], tuple[Tree, Tree]]
"""v ↦ (H v, C v), with H = ∂²f/∂w² and C = ∂²f/∂λ∂w."""


_REMEDY = (
    "convert it with .float(), or leave out what has no derivative, and let the losses take it "
    "from where they are defined"
)


@dataclass(frozen=True)
class Expanded:
    """A loss at parameters and hyper-parameters, and its partial derivatives, detached."""

    loss: Tensor
    """Without dimensions."""
    by_params: Tree
    """∂/∂w."""
    by_hparams: Tree
    """∂/∂λ: of λ as the loss uses it itself, zero where it does not."""


def check_problem(params: Tree, hparams: Tree) -> None:
    """Lets parameters and hyper-parameters pass that are pytrees of real floating-point tensors.

    Raises:
        ValueError: If one holds no tensor.
        TypeError: If a leaf is not such a tensor.
    """
    check_params(params, "params", remedy=_REMEDY)
    check_params(hparams, "hparams", remedy=_REMEDY)


def outer_gradient(outer_loss: Loss, params: Tree, hparams: Tree) -> Expanded:
    """The outer loss and its partial derivatives by both arguments.

    Raises:
        TypeError: If the loss is not a real floating-point tensor.
        ValueError: If it has dimensions, or the loss or a derivative is not finite.
    """
    return expanded(outer_loss, params, hparams, "outer_loss")


def inner_products(
    inner_loss: Loss, params: Tree, hparams: Tree, products: Products
) -> tuple[Expanded, JointProduct]:
    """The inner loss with its partial derivatives, and v ↦ (H v, C v).

    Args:
        inner_loss: f.
        params: w.
        hparams: λ.
        products: By a reverse pass over the graph of f's gradient, which is kept, or forward over
            reverse, which runs f anew each time, with the same random numbers, and holds less.

    Raises:
        TypeError: If the loss is not a real floating-point tensor.
        ValueError: If it has dimensions, or the loss or a derivative is not finite.
    """
    at, resting = (params, hparams), pytree.tree_map(torch.zeros_like, hparams)
    f = scalar_valued(inner_loss, "inner_loss")
    if products == "reverse_over_reverse":
        point = linearize(lambda at: f(*at), at)
        found = Expanded(point.loss, *point.grad)
        _check_finite(found, "inner_loss")
        return found, lambda v: point.hvp((v, resting))

    before = rewinder(at)
    found = expanded(inner_loss, params, hparams, "inner_loss")

    def product(v: Tree) -> tuple[Tree, Tree]:
        after = rewinder(at)
        before()
        joint = hvp(lambda at: f(*at), at, (v, resting), mode="forward_over_reverse")
        after()
        return joint

    return found, product


def expanded(loss: Loss, params: Tree, hparams: Tree, what: str) -> Expanded:
    """A loss and its partial derivatives by both arguments; errors as of `outer_gradient`."""
    flat, spec = pytree.tree_flatten((params, hparams))
    with torch.inference_mode(False), torch.enable_grad(), differentiable_kernels():
        leaves = recorded(flat)
        value = scalar_valued(loss, what)(*pytree.tree_unflatten(leaves, spec))
        if not value.requires_grad:
            raise ValueError(
                f"{what} depends neither on params nor on hparams by operations that autograd "
                "follows: expected a value computed from its arguments, without detach(), .item() "
                "or no_grad."
            )
        grads = pullback([value], leaves, [torch.ones_like(value)])
    found = Expanded(value.detach(), *pytree.tree_unflatten(grads, spec))
    _check_finite(found, what)
    return found


def _check_finite(found: Expanded, what: str) -> None:
    if not trees.all_finite([found.loss, *pytree.tree_leaves(found.by_params)]):
        raise ValueError(
            f"{what} is {float(found.loss):.3g} at these parameters, or its gradient is not "
            "finite: the inner optimization may have diverged; lower its step size, or start "
            "elsewhere."
        )


def recorded(xs: TensorList) -> TensorList:
    """Detached copies of the list that autograd records."""
    return [ordinary(x).detach().requires_grad_() for x in xs]


def pullback(outputs: TensorList, leaves: TensorList, cotangents: TensorList) -> TensorList:
    """Jᵀu of outputs by their leaves, zero where they do not depend on one; frees the graph."""
    pairs = [(o, u) for o, u in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return trees.zeros_like(leaves)
    grads = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [u for _, u in pairs], allow_unused=True
    )
    return fill(grads, leaves)
