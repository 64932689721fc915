"""A loss along directions through a point."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpopt import trees
from hvpopt.options import check_count, check_range
from hvpopt.pytrees import check_params
from hvpopt.solvers.checks import checked_like
from hvpopt.trees import TensorList

Vector = Sequence[Tensor]


@dataclass(frozen=True)
class LossSlice:
    """Values of a loss on a line or a grid through a point."""

    values: Tensor
    """(s,), or (s, t) for two directions; float64 on the CPU, as they are: also NaN and ∞."""
    distances: tuple[Tensor, ...]
    """(s,), and (t,): how far along each direction, in its own lengths, float64."""
    num_evaluations: int
    """Of the loss, s t."""
    num_products: int = 0
    """None are needed."""


def loss_slice(
    loss: Callable[[TensorList], Tensor | float],
    params: Sequence[Tensor],
    directions: Vector | Sequence[Vector],
    *,
    distances: Tensor | Sequence[float] | tuple[Tensor, Tensor] | None = None,
    radius: float = 1.0,
    num_points: int = 31,
    in_place: bool = False,
) -> LossSlice:
    """The loss at params + a u, or params + a u + b v, such as along the Hessian's eigenvectors.

    Args:
        loss: From a list of tensors like ``params`` to a scalar; run without gradients.
        params: The point.
        directions: One direction or two, of any lengths; eigenvectors are of unit length.
        distances: The a, or a pair of tensors with the a and the b, in any order; by default both
            run over ``num_points`` from −radius to radius.
        radius: In lengths of the directions.
        num_points: An odd number has the point itself in the middle.
        in_place: ``params`` themselves are moved and put back exactly, also after an error, and
            ``loss`` is given them: for losses that read them where they are, such as
            ``lambda _: operator.loss()``. Else it is given new tensors.

    Raises:
        ValueError: For none or more than two directions, other shapes, no point, a ``radius`` that
            is not positive, or distances given for one direction too many.
        TypeError: If ``params`` hold no real floating-point tensors.

    Source: Goodfellow, Vinyals and Saxe, "Qualitatively characterizing neural network optimization
    problems" (ICLR 2015); in two dimensions Li et al., "Visualizing the loss landscape of neural
    nets" (NeurIPS 2018).

    Examples:
        >>> w = [torch.tensor([1.0, 2.0])]
        >>> u = [torch.tensor([1.0, 0.0])]
        >>> loss_slice(lambda p: (p[0] ** 2).sum(), w, u, distances=[-1.0, 0.0, 1.0]).values
        tensor([4., 5., 8.], dtype=torch.float64)
    """
    check_params(list(params), "params")
    point = trees.clone(params)
    axes = _directions(directions, point)
    scales = _distances(distances, len(axes), radius, num_points)
    counts = tuple(len(s) for s in scales)
    values = torch.empty(math.prod(counts), dtype=torch.float64)
    with torch.no_grad(), _put_back(list(params), point, in_place):
        for i, steps in enumerate(torch.cartesian_prod(*scales).reshape(-1, len(axes)).tolist()):
            moved = point
            for step, axis in zip(steps, axes, strict=True):
                moved = trees.add(moved, axis, step)
            if in_place:
                trees.copy_(params, moved)
            values[i] = float(loss(list(params) if in_place else moved))
    return LossSlice(values.reshape(counts), scales, len(values))


def filter_normalized(direction: Vector, params: Sequence[Tensor]) -> TensorList:
    """The direction with each filter scaled to the length of the parameters' filter.

    A filter is what leads to one output, a slice of the first dimension of a weight. Tensors of
    less than two dimensions, such as biases, become zero. This makes slices along random
    directions comparable between networks whose weights are scaled differently.

    Raises:
        ValueError: If shapes differ.

    Source: Li, Xu, Taylor, Studer and Goldstein, "Visualizing the loss landscape of neural nets"
    (NeurIPS 2018), section 4.
    """
    like = trees.clone(params)
    result = []
    for d, p in zip(checked_like(direction, like, "direction"), like, strict=True):
        if p.dim() < 2:
            result.append(torch.zeros_like(p))
            continue
        others = tuple(range(1, p.dim()))
        lengths = [torch.linalg.vector_norm(x, dim=others, keepdim=True) for x in (p, d)]
        floor = torch.finfo(p.dtype).tiny
        result.append(d * (lengths[0] / lengths[1].clamp(min=floor)))
    return result


def _directions(directions: Vector | Sequence[Vector], point: TensorList) -> list[TensorList]:
    single = [x for x in directions if isinstance(x, Tensor)]
    given = [single] if single else [x for x in directions if not isinstance(x, Tensor)]
    if len(given) not in (1, 2):
        raise ValueError(f"A slice needs one or two directions, got {len(given)}.")
    return [checked_like(v, point, "A direction") for v in given]


def _distances(
    distances: Tensor | Sequence[float] | tuple[Tensor, Tensor] | None,
    count: int,
    radius: float,
    num_points: int,
) -> tuple[Tensor, ...]:
    if distances is None:
        check_range("radius", radius, 0.0)
        check_count("num_points", num_points)
        if radius == 0:
            raise ValueError("radius=0 leaves no slice: expected a positive number.")
        line = torch.linspace(-radius, radius, num_points, dtype=torch.float64)
        return (line,) * count
    if isinstance(distances, tuple) and all(isinstance(x, Tensor) for x in distances):
        lines = [torch.as_tensor(x, dtype=torch.float64).cpu() for x in distances]
    else:
        lines = [torch.as_tensor(distances, dtype=torch.float64).cpu()] * count
    if len(lines) != count or any(x.dim() != 1 or len(x) == 0 for x in lines):
        shapes = [tuple(x.shape) for x in lines]
        raise ValueError(
            f"distances have the shapes {shapes}; expected one tensor of numbers, or one for each "
            f"of the {count} directions."
        )
    return tuple(lines)


@contextmanager
def _put_back(params: TensorList, point: TensorList, in_place: bool) -> Iterator[None]:
    try:
        yield
    finally:
        if in_place:
            trees.copy_(params, point)
