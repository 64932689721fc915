"""Checks that vectors and operators of a solver fit each other."""

from collections.abc import Callable, Sequence

from torch import Tensor

from hvpopt.trees import TensorList

Operator = Callable[[TensorList], Sequence[Tensor]]
"""A linear map from a list of tensors to a list of the same shapes."""


def checked_vector(xs: Sequence[Tensor], what: str) -> TensorList:
    """``xs`` detached, if it is a vector that a solver can work with.

    Raises:
        ValueError: If the list is empty.
        TypeError: If a tensor is not real floating point.
    """
    if len(xs) == 0:
        raise ValueError(f"{what} is an empty list; give at least one tensor.")
    for i, x in enumerate(xs):
        if not x.is_floating_point():
            raise TypeError(
                f"{what} must hold real floating-point tensors, but entry {i} is {x.dtype}."
            )
    return [x.detach() for x in xs]


def checked_like(xs: Sequence[Tensor], like: TensorList, what: str) -> TensorList:
    """``xs`` detached and in the dtypes of ``like``.

    Raises:
        ValueError: If the shapes differ.
    """
    shapes, expected = [tuple(x.shape) for x in xs], [tuple(x.shape) for x in like]
    if shapes != expected:
        raise ValueError(f"{what} has the shapes {shapes}; expected {expected}.")
    return [x.detach().to(y.dtype) for x, y in zip(xs, like, strict=True)]


def checked_map(f: Operator, like: TensorList, what: str) -> Callable[[TensorList], TensorList]:
    """``f`` with its results detached and checked against ``like``."""
    return lambda v: checked_like(f(v), like, f"the result of {what}")
