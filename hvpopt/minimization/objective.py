"""The function to minimise, as lists of tensors, with its calls counted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt import trees
from hvpopt.products import linearize
from hvpopt.pytrees import Tree, check_params, scalar_valued
from hvpopt.trees import TensorList


class ProductLimitError(Exception):
    """Raised inside a minimisation where the next product would be one too many."""


@dataclass(frozen=True)
class Point:
    """f, its gradient and its Hessian at x."""

    x: TensorList
    value: float
    grad: TensorList
    grad_norm: float
    product: Callable[[TensorList], TensorList]

    @property
    def is_finite(self) -> bool:
        """Whether value and gradient are."""
        return math.isfinite(self.value) and math.isfinite(self.grad_norm)


class Objective:
    """f on lists of tensors.

    Args:
        f: ``f(x, *args)``.
        x0: Gives structure, shapes and dtypes.
        args: Passed on to ``f``.
        max_products: The most Hessian products.

    Attributes:
        rounding: The machine's ε of the least precise of x and f.
        nfev, njev, nhev: How often f, its gradient and a Hessian product were computed.

    Raises:
        TypeError: If ``x0`` holds what is not a real floating-point tensor.
        ValueError: If it holds no tensor.
    """

    def __init__(
        self, f: Callable[..., Tensor], x0: Tree, args: tuple[Any, ...], max_products: int | None
    ) -> None:
        check_params(x0, "x0")
        leaves, self._spec = pytree.tree_flatten(x0)
        self.start = trees.clone(leaves)
        if sum(x.numel() for x in leaves) == 0:
            raise ValueError("x0 has no entries; expected at least one number to vary.")
        self._f, self._args, self._max_products = f, args, max_products
        self.rounding = max(torch.finfo(x.dtype).eps for x in leaves)
        self.nfev = self.njev = self.nhev = 0

    def tree(self, xs: TensorList) -> Tree:
        """The list in the structure of x0."""
        return pytree.tree_unflatten(xs, self._spec)

    def value(self, x: TensorList) -> float:
        """f(x)."""
        self.nfev += 1
        with torch.enable_grad():  # f may differentiate inside, as a PINN's residual does
            return float(scalar_valued(self._f, "f")(self.tree(x), *self._args).detach())

    def expand(self, x: TensorList) -> Point:
        """f, its gradient and its Hessian at x."""
        self.nfev += 1
        self.njev += 1
        point = linearize(self._f, self.tree(x), *self._args)
        self.rounding = max(self.rounding, torch.finfo(point.loss.dtype).eps)
        grad = pytree.tree_leaves(point.grad)

        def product(v: TensorList) -> TensorList:
            if self._max_products is not None and self.nhev >= self._max_products:
                raise ProductLimitError
            self.nhev += 1
            return pytree.tree_leaves(point.hvp(self.tree(v)))

        return Point(x, float(point.loss), grad, float(trees.norm(grad)), product)

    def noise(self, value: float) -> float:
        """Differences of f near this value that may be rounding."""
        return 10 * self.rounding * abs(value)
