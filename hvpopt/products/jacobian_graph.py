"""A function's values with their graph, by plain autograd: J v and Jᵀu by reverse passes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hvpopt.engines.base import vjp
from hvpopt.engines.support import differentiable_kernels
from hvpopt.products.surroundings import captures_recorded, check_twice_differentiable, ordinary
from hvpopt.pytrees import Tree, check_params


class JacobianGraph:
    """The values of f at a point, and its Jacobian as an operator on lists of tensors.

    J v is the derivative of the linear map u ↦ Jᵀu along v, so that reverse mode suffices.

    Args:
        f: ``f(params)``.
        params: Detached here.
        what: What errors call f's value.

    Raises:
        TypeError: If a value of f is not a real floating-point tensor.
        RuntimeError: If a custom Function of f is marked ``once_differentiable``.
    """

    def __init__(self, f: Callable[[Tree], Tree], params: Tree, what: str) -> None:
        may_record = torch.is_grad_enabled()
        flat, spec = pytree.tree_flatten(params)
        with torch.inference_mode(False), torch.enable_grad():
            self.leaves = [ordinary(p).detach().requires_grad_() for p in flat]
            with differentiable_kernels():
                value = f(pytree.tree_unflatten(self.leaves, spec))
            check_params(value, what)
            self.outputs, self.spec = pytree.tree_flatten(value)
            self.is_recorded = may_record and captures_recorded(self.outputs, self.leaves)
            self._u = [torch.zeros_like(o, requires_grad=True) for o in self.outputs]
            self._pulled = vjp(self.outputs, self.leaves, self._u, create_graph=True)
            check_twice_differentiable(self.outputs, self._pulled)

    def value(self) -> Tree:
        """f's value."""
        outputs = self.outputs if self.is_recorded else [o.detach() for o in self.outputs]
        return pytree.tree_unflatten(outputs, self.spec)

    def pushforward(self, v: Sequence[Any]) -> list[Tensor]:
        """J v."""
        return self._vjp(self._pulled, self._u, v)

    def pullback(self, u: Sequence[Any]) -> list[Tensor]:
        """Jᵀu."""
        return self._vjp(self.outputs, self.leaves, u)

    def _vjp(
        self, outputs: Sequence[Tensor | None], inputs: list[Tensor], cotangents: Sequence[Any]
    ) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            cotangents = [ordinary(c) for c in cotangents]
            found = vjp(outputs, inputs, cotangents, create_graph=self.is_recorded)
        filled = [
            torch.zeros_like(x, requires_grad=False) if g is None else g
            for g, x in zip(found, inputs, strict=True)
        ]
        return filled if self.is_recorded else [g.detach() for g in filled]
