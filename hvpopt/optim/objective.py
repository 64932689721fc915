"""The function that a Newton step minimises: the closure's loss with weight decay."""

import torch

from hvpopt import trees
from hvpopt.closure import ClosureOracle
from hvpopt.linearization import LinearizedClosure
from hvpopt.trees import TensorList


class Objective:
    """F(θ) = loss + ½ Σ wd ‖θ‖² + tᵀθ at the parameters of one step, with gradient and curvature.

    t is zero where ``p.grad`` is the gradient of the closure's loss. Where it is not (accumulated
    micro-batches, clipping), t is the difference, so that the objective's gradient is ``p.grad``
    plus the decay's: equation 3 of Shamir, Srebro and Zhang (2014), who average over machines what
    is summed over micro-batches here.

    Args:
        oracle: the closure, to evaluate the loss elsewhere.
        point: its linearization at ``start``.
        params: the parameters, which `move` writes.
        start: copies of them as the step began, θ.
        decay: wd of each parameter.

    Attributes:
        grad: the gradient of F at θ.
        value: F(θ), up to tᵀθ.
        noise: the rounding error to expect in differences of F.
    """

    def __init__(
        self,
        oracle: ClosureOracle,
        point: LinearizedClosure,
        params: TensorList,
        start: TensorList,
        decay: list[float],
    ) -> None:
        self._oracle, self._point = oracle, point
        self._params, self._start, self._decay = params, start, decay
        same = all(map(torch.equal, point.grad, point.batch_grad))
        self._tilt = None if same else trees.add(point.grad, point.batch_grad, -1.0)
        self.grad = (
            trees.add(point.grad, trees.scale_each(decay, start)) if any(decay) else point.grad
        )
        self.value = float(point.loss) + self._penalty()
        self.noise = 4 * torch.finfo(point.loss.dtype).eps * abs(self.value)

    @property
    def is_tilted(self) -> bool:
        """Whether t is not zero."""
        return self._tilt is not None

    def _penalty(self) -> float:
        if not any(self._decay):
            return 0.0
        return 0.5 * float(trees.dot(trees.scale_each(self._decay, self._params), self._params))

    def product(self, v: TensorList) -> TensorList:
        """B v, without damping."""
        product = self._point.product(v)
        return trees.add(product, trees.scale_each(self._decay, v)) if any(self._decay) else product

    def move(self, update: TensorList, length: float) -> float:
        """Puts the parameters at θ + length·update and returns F there."""
        trees.copy_(self._params, trees.add(self._start, update, length))
        tilt = length * float(trees.dot(self._tilt, update)) if self._tilt else 0.0
        return float(self._oracle.evaluate()) + self._penalty() + tilt

    def restore(self) -> None:
        """Puts the parameters back to θ, exactly."""
        trees.copy_(self._params, self._start)
