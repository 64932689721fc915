"""The second-order expansion of a function, or of a training closure, at a point."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hvpopt.pytrees import Tree
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class Linearization:
    """A function's value at a point, its gradient, and its Hessian as an operator."""

    loss: Tensor
    """f(params), without dimensions, detached."""
    grad: Tree
    """∇f(params), in the structure and shapes of the parameters, detached."""
    _product: Callable[[Tree, int | None, int | None], Tree] = field(repr=False)

    def hvp(
        self, v: Tree, *, chunk_size: int | None = None, memory_budget: int | None = None
    ) -> Tree:
        """∇²f v at the point of the linearization, detached.

        Args:
            v: A direction, of the structure, shapes and dtypes of the parameters, or k directions,
                with one more dimension, the first, in every leaf; the product then has it too.
            chunk_size: How many of k directions go at once, by vmap over the graph.
            memory_budget: Instead, how many bytes they may take, as of
                `hvpopt.products.grad_and_hvp`.

        Raises:
            ValueError: If ``v`` does not match the parameters, or an option is out of range.
        """
        return self._product(v, chunk_size, memory_budget)


@dataclass(frozen=True)
class LinearizedClosure:
    """A closure's loss at the current parameters, its gradient, and its curvature.

    All are in the loss's own scale: of its mean over the batch where the loss is a mean. Under
    ``DistributedDataParallel`` they are means over the ranks.

    Attributes:
        loss: scalar; over micro-batches, the last one's.
        grad: what the closure left in ``p.grad`` (zeros where it left None), one tensor a
            parameter: summed over accumulated micro-batches, clipped where the closure clips.
        batch_grad: the gradient of ``loss`` itself.
        product: v ↦ C v, the Hessian's or GGN's product with a list of tensors.
        has_remainder: whether a part of a GGN is the Hessian of a term outside the loss function.
        takes_derivatives: whether the closure takes derivatives and goes on with them, as those of
            a residual by the inputs.
    """

    loss: Tensor
    grad: TensorList
    batch_grad: TensorList
    product: Callable[[TensorList], TensorList]
    has_remainder: bool
    takes_derivatives: bool = False
