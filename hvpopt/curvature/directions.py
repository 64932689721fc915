"""The curvature along a direction, and how a gradient lies to eigenvectors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt.operators import LinearOperator
from hvpopt.solvers.checks import Operator, checked_like, checked_vector
from hvpopt.solvers.eigenpairs import Eigenpairs
from hvpopt.solvers.flat import Flat
from hvpopt.solvers.rows import Rows


@dataclass(frozen=True)
class DirectionalCurvature:
    """The curvature along a direction v."""

    value: float
    """vᵀAv / ‖v‖², between the least and the largest eigenvalue of A."""
    residual_norm: float
    """‖A v − value · v‖ / ‖v‖: an eigenvalue lies within that of the value."""
    num_products: int = 1
    """Products with A."""


def directional_curvature(
    operator: LinearOperator | Operator, v: Sequence[Tensor]
) -> DirectionalCurvature:
    """vᵀAv / ‖v‖² for a symmetric A, such as the curvature along a gradient or a step.

    Costs one product.

    Args:
        operator: A `LinearOperator`, or v ↦ A v.
        v: A direction of any length, in the operator's shapes.

    Raises:
        ValueError: If ``v`` is zero, not finite, or of other shapes than the operator's.
        TypeError: If it holds tensors that are not real floating point.

    Examples:
        >>> d = torch.tensor([1.0, 3.0])
        >>> directional_curvature(lambda v: [d * v[0]], [torch.tensor([0.0, 2.0])]).value
        3.0
    """
    v = checked_vector(v, "v")
    rows = Rows(operator, None if isinstance(operator, LinearOperator) else v)
    flat = rows.space.flat(checked_like(v, rows.operator.like, "v"))
    length = float(torch.linalg.vector_norm(flat))
    if not 0 < length < math.inf:
        raise ValueError("v is zero or not finite; directional_curvature needs a direction.")
    flat = flat / length
    product = rows.products(flat[None])[0]
    value = float(torch.dot(flat, product))
    residual = float(torch.linalg.vector_norm(product - value * flat))
    return DirectionalCurvature(value, residual, rows.num_products)


@dataclass(frozen=True)
class Alignment:
    """How a gradient lies to some directions."""

    cosines: tuple[float, ...]
    """(k,) its cosine with each; the sign is that of the direction as given."""
    share: float
    """‖projection of the gradient on the directions' span‖² / ‖gradient‖², between 0 and 1."""
    num_products: int = 0
    """None are needed."""


def alignment(
    gradient: Sequence[Tensor], vectors: Eigenpairs | Sequence[Sequence[Tensor]]
) -> Alignment:
    """The gradient's cosines with directions, and the share of it in their span.

    The share of the gradient in the span of k random directions is k/n on average; in that of the
    Hessian's top eigenvectors it is near 1 in the training of classifiers.

    Args:
        gradient: A list of tensors.
        vectors: Eigenpairs, or k ≥ 1 directions in the gradient's shapes, which need not be
            orthogonal.

    Raises:
        ValueError: If the gradient or a direction is zero or not finite, shapes differ, or there
            is no direction.
        TypeError: If the gradient holds tensors that are not real floating point.

    Source: Gur-Ari, Roberts and Dyer, "Gradient descent happens in a tiny subspace"
    (arXiv:1812.04754, 2018).

    Examples:
        >>> alignment([torch.tensor([3.0, 4.0])], [[torch.tensor([2.0, 0.0])]]).cosines
        (0.6000000238418579,)
    """
    gradient = checked_vector(gradient, "gradient")
    listed = vectors.vectors if isinstance(vectors, Eigenpairs) else vectors
    if len(listed) == 0:
        raise ValueError("vectors is empty; alignment needs at least one direction.")
    space = Flat(gradient)
    g = _unit(space.flat(gradient), "gradient")
    units = torch.stack(
        [
            _unit(space.flat(checked_like(v, gradient, f"vectors[{i}]")), f"vectors[{i}]")
            for i, v in enumerate(listed)
        ]
    )
    cosines = (units @ g).cpu().double()
    # |projection|² = cᵀ G⁺ c with the Gram matrix G
    gram = (units @ units.T).cpu().double()
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=10 * torch.finfo(units.dtype).eps)
    share = float(cosines @ inverse @ cosines)
    return Alignment(tuple(cosines.tolist()), min(max(share, 0.0), 1.0))


def _unit(flat: Tensor, what: str) -> Tensor:
    length = float(torch.linalg.vector_norm(flat))
    if not 0 < length < math.inf:
        raise ValueError(f"{what} is zero or not finite; alignment needs directions.")
    return flat / length
