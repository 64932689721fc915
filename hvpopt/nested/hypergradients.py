"""Hypergradients of bilevel problems on pytrees, at a solved inner problem."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt import trees
from hvpopt.nested.adjoints import Implicit, Neumann, adjoint_named
from hvpopt.nested.bilevel import Loss, check_problem, inner_products, outer_gradient
from hvpopt.nested.inner_path import UnrolledHypergradient
from hvpopt.nested.unrolled_hypergradients import unrolled_hypergradient
from hvpopt.pytrees import Tree, check_like
from hvpopt.solvers import ResidualNorm, Status, cg
from hvpopt.solvers.batched import batched_minres
from hvpopt.trees import TensorList

Product = Callable[[TensorList], TensorList]

__all__ = ["Hypergradient", "UnrolledHypergradient", "hypergradient", "unrolled_hypergradient"]

_DIVERGED = "the steps lead away from its solution: a step_size above 2 / λ_max(H) diverges"


@dataclass(frozen=True)
class Hypergradient:
    """The derivative of the outer loss by the hyper-parameters, through the inner minimum."""

    value: Tree
    """dℓ/dλ, in the structure and shapes of the hyper-parameters, detached."""
    outer_loss: Tensor
    """ℓ(w, λ), without dimensions, detached."""
    inner_loss: Tensor
    """f(w, λ), likewise."""
    residual: float
    """‖∂f/∂w‖, zero at a solved inner problem: the value is that of another function elsewhere."""
    adjoint: Tree
    """v ≈ (H + damping)⁻¹ ∂ℓ/∂w, in the structure of the parameters: the next call's ``start``."""
    adjoint_residual: float
    """‖∂ℓ/∂w − (H + damping) v‖ / ‖∂ℓ/∂w‖, computed from v itself; zero where ∂ℓ/∂w is."""
    status: Status
    """How the solve for v ended."""
    num_products: int
    """Products (H v, C v), of which one is for the value."""


def hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tree,
    hparams: Tree,
    *,
    adjoint: Implicit | Neumann | str = "implicit",
    start: Tree | None = None,
) -> Hypergradient:
    """dℓ(w*(λ), λ)/dλ for w*(λ) = argmin_w f(w, λ), at a w that solves the inner problem.

    By the implicit function theorem, with H = ∂²f/∂w² and C = ∂²f/∂λ∂w at w,

        dℓ/dλ = ∂ℓ/∂λ − C v,   H v = ∂ℓ/∂w.

    One reverse pass over the graph of ∂f/∂(w, λ) gives H v and C v together. How w was found does
    not matter, and nothing of it is held. Where ∂f/∂w is not zero the value is that of another
    function; `unrolled_hypergradient` is exact on any path.

    Args:
        inner_loss: f: ``inner_loss(params, hparams)``, a real floating-point scalar, twice
            differentiable, on a batch that is drawn beforehand.
        outer_loss: ℓ, likewise, once differentiable.
        params: w, a pytree of real floating-point tensors; stays as it is.
        hparams: λ, another.
        adjoint: How v is found. `Implicit`, the default: conjugate gradients, or MINRES where H is
            indefinite, on H + damping, the damping in the units of H. `Neumann`: the sum of K
            terms, from v₀ = ``start`` or zero, v ← v + α (∂ℓ/∂w − H v), which converges for
            α < 2 / λ_max(H) and, cut short, is the value of `Truncated` with K steps of
            gradient descent. Or their words, "implicit" or "neumann". `Implicit.products` may be
            "forward_over_reverse", which runs f for each product and holds no graph.
        start: The ``adjoint`` of an earlier call nearby. Then a few products do, where it is near.

    Returns:
        The derivative, the losses, and how well both problems are solved. A UserWarning says so
        where v was not found, or the inner problem is not solved: where the first-order bound of
        what solving it changes in ℓ, ‖∂f/∂w‖ ‖v‖, is above ``adjoint.residual_warning`` · |ℓ|.

    Raises:
        TypeError: If a tensor or a loss is not real floating point, or the adjoint is another.
        ValueError: If ``params`` or ``hparams`` hold no tensor, ``start`` does not match
            ``params``, a loss has dimensions, a loss or a gradient is not finite, or `Neumann` is
            given no step size.

    Source: Bengio, Gradient-based optimization of hyperparameters (Neural Computation, 2000);
    Pedregosa, Hyperparameter optimization with approximate gradient (ICML 2016); Lorraine, Vicol
    and Duvenaud, Optimizing millions of hyperparameters by implicit differentiation (AISTATS
    2020).

    Examples:
        >>> def ridge(w, penalty):
        ...     return (w - 2) ** 2 + penalty * w**2
        >>> solution, penalty = torch.tensor(1.0), torch.tensor(1.0)  # w* = 2 / (1 + penalty)
        >>> found = hypergradient(ridge, lambda w, penalty: w**2, solution, penalty)
        >>> found.value, found.residual  # d/dpenalty 4 / (1 + penalty)²
        (tensor(-1.), 0.0)
    """
    chosen = _chosen(adjoint)
    check_problem(params, hparams)
    if start is not None:
        check_like(start, params, "start", "params")
    inner, joint = inner_products(inner_loss, params, hparams, chosen.products)
    outer = outer_gradient(outer_loss, params, hparams)
    b, spec = pytree.tree_flatten(outer.by_params)

    def curvature(v: TensorList) -> TensorList:
        return pytree.tree_leaves(joint(pytree.tree_unflatten(v, spec))[0])

    near = None if start is None else pytree.tree_leaves(start)
    v, status, num_products = _solve(chosen, curvature, b, near)
    hv, cv = joint(pytree.tree_unflatten(v, spec))
    damping = chosen.damping if isinstance(chosen, Implicit) else 0.0
    rest = trees.add(trees.add(b, pytree.tree_leaves(hv), -1.0), v, -damping)
    size = float(trees.norm(b))
    found = Hypergradient(
        value=pytree.tree_map(torch.sub, outer.by_hparams, cv),
        outer_loss=outer.loss,
        inner_loss=inner.loss,
        residual=float(trees.norm(pytree.tree_leaves(inner.by_params))),
        adjoint=pytree.tree_unflatten(v, spec),
        adjoint_residual=float(trees.norm(rest)) / size if size > 0 else 0.0,
        status=status,
        num_products=num_products + 1,
    )
    _warn(found, chosen)
    return found


def _chosen(adjoint: object) -> Implicit | Neumann:
    if isinstance(adjoint, str):
        adjoint = adjoint_named(adjoint)
    if not isinstance(adjoint, (Implicit, Neumann)):
        raise TypeError(
            f"adjoint={adjoint!r}; expected an Implicit or Neumann object. The others "
            "differentiate the inner optimizer's steps: take unrolled_hypergradient."
        )
    if isinstance(adjoint, Neumann) and adjoint.step_size is None:
        raise ValueError(
            "Neumann(step_size=None) takes an inference method's step, and a solved inner problem "
            "has none: give a step_size below 2 / λ_max of the inner Hessian."
        )
    return adjoint


def _solve(
    adjoint: Implicit | Neumann, apply: Product, b: TensorList, start: TensorList | None
) -> tuple[TensorList, Status, int]:
    """v, how the solve for it ended, and the products that it took."""
    if isinstance(adjoint, Neumann):
        return _neumann(adjoint, apply, b, start)

    def damped(v: TensorList) -> TensorList:
        return trees.add(apply(v), v, adjoint.damping)

    if adjoint.solver == "cg":
        rule = ResidualNorm(rtol=adjoint.rtol)
        found = cg(damped, b, x0=start, stop=rule, max_steps=adjoint.max_steps)
        return found.value, found.status, found.num_products
    return _minres(adjoint, damped, b, start)


def _minres(
    adjoint: Implicit, apply: Product, b: TensorList, start: TensorList | None
) -> tuple[TensorList, Status, int]:
    """MINRES on the list as one row; from ``start`` where that leaves less of b than zero does."""
    sizes = [x.numel() for x in b]

    def row(xs: TensorList) -> Tensor:
        return torch.cat([x.reshape(1, -1) for x in xs], dim=1)

    def listed(v: Tensor) -> TensorList:
        parts = v.split(sizes, dim=1)
        return [part.reshape(x.shape).to(x.dtype) for part, x in zip(parts, b, strict=True)]

    near, rest, rtol = trees.zeros_like(b), b, adjoint.rtol
    if start is not None:
        left = trees.add(b, apply(start), -1.0)
        gain = float(trees.norm(b) / trees.norm(left))
        if gain > 1:
            near, rest, rtol = start, left, rtol * gain
    solved = batched_minres(
        lambda v, _: row(apply(listed(v))), row(rest), max_steps=adjoint.max_steps, rtol=rtol
    )
    num_products = solved.num_products + (start is not None)
    return trees.add(near, listed(solved.value)), solved.statuses[0], num_products


def _neumann(
    adjoint: Neumann, apply: Product, b: TensorList, start: TensorList | None
) -> tuple[TensorList, Status, int]:
    """K terms of v ← v + α (b − H v)."""
    assert adjoint.step_size is not None  # checked
    v = trees.zeros_like(b) if start is None else trees.clone(start)
    num_products = 0
    for k in range(adjoint.num_terms):
        rest = b
        if k > 0 or start is not None:
            rest = trees.add(b, apply(v), -1.0)
            num_products += 1
        following = trees.add(v, rest, adjoint.step_size)
        if not trees.all_finite(following):
            return v, Status.BREAKDOWN, num_products
        v = following
    return v, Status.STEP_LIMIT, num_products


def _warn(found: Hypergradient, adjoint: Implicit | Neumann) -> None:
    """Says, at each place once, what makes the value another than the bilevel problem's."""
    reach = found.residual * float(trees.norm(pytree.tree_leaves(found.adjoint)))
    if reach > adjoint.residual_warning * abs(float(found.outer_loss)):
        warnings.warn(
            "The inner problem is not solved: ‖∂f/∂w‖ (.residual) may still change outer_loss by "
            f"more than residual_warning={adjoint.residual_warning:g} of it, and the hypergradient "
            "is not that of the parameters given. Minimise inner_loss further, or take "
            "unrolled_hypergradient.",
            stacklevel=3,
        )
    if found.status in (Status.NEGATIVE_CURVATURE, Status.BREAKDOWN) or found.adjoint_residual > 1:
        why = _DIVERGED if found.status is Status.STEP_LIMIT else found.status.value
        warnings.warn(
            f"The hypergradient's linear system H v = ∂ℓ/∂w is not solved ({why}).", stacklevel=3
        )
