"""The function that a Newton step minimises: the closure's loss with weight decay."""

import math
from collections.abc import Sequence

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
        decay: wd of each parameter.
        value: F(θ), up to tᵀθ.
        eps: the machine's, of the loss.
        noise: the rounding error to expect in differences of F.
        takes_derivatives: as of the linearization.
        is_partial: whether the gradient is of more data than loss and curvature, of earlier
            micro-batches: F then has no curvature where those have it alone, and no lower bound.
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
        self._params, self._start, self.decay = params, start, decay
        self._is_moved = False
        same = all(map(torch.equal, point.grad, point.batch_grad))
        self._tilt = None if same else trees.add(point.grad, point.batch_grad, -1.0)
        self.is_partial = not same and _is_of_more(point.grad, point.batch_grad)
        self.grad = (
            trees.add(point.grad, trees.scale_each(decay, start)) if any(decay) else point.grad
        )
        self.value = float(point.loss) + self._penalty()
        self.takes_derivatives = point.takes_derivatives
        self.eps = torch.finfo(point.loss.dtype).eps
        self.noise = 4 * self.eps * abs(self.value)

    def at(self, point: LinearizedClosure) -> "Objective":
        """The same with another curvature, that of ``point``."""
        return Objective(self._oracle, point, self._params, self._start, self.decay)

    @property
    def start_norm(self) -> float:
        """‖θ‖."""
        return float(trees.norm(self._start))

    def _penalty(self) -> float:
        if not any(self.decay):
            return 0.0
        return 0.5 * float(trees.dot(trees.scale_each(self.decay, self._params), self._params))

    def product(self, v: TensorList) -> TensorList:
        """B v at θ, without damping."""
        if self._is_moved:
            self.restore()
        product = self._point.product(v)
        return trees.add(product, trees.scale_each(self.decay, v)) if any(self.decay) else product

    def put(self, update: TensorList, length: float) -> None:
        """Puts the parameters at θ + length·update.

        The graph that products go through holds the parameters, and may be used again when they
        are back at θ: they are written unseen by its check of versions.
        """
        trees.copy_([p.data for p in self._params], trees.add(self._start, update, length))
        self._is_moved = True

    def move(self, update: TensorList, length: float) -> float:
        """Puts the parameters at θ + length·update and returns F there; NaN for −∞, too."""
        self.put(update, length)
        value = float(self._oracle.evaluate()) + self._penalty() + self.tilt(update, length)
        return value if value > -math.inf else math.nan

    def shrink(self, factors: Sequence[float]) -> float:
        """Multiplies each parameter by its factor, where it is, and returns F there without t."""
        torch._foreach_mul_([p.data for p in self._params], list(factors))
        self._is_moved = True
        return float(self._oracle.evaluate()) + self._penalty()

    def tilt(self, update: TensorList, length: float) -> float:
        """length·tᵀupdate, which `value` leaves out."""
        return length * float(trees.dot(self._tilt, update)) if self._tilt else 0.0

    def restore(self) -> None:
        """Puts the parameters back to θ, exactly."""
        trees.copy_([p.data for p in self._params], self._start)
        self._is_moved = False


def _is_of_more(grad: TensorList, batch_grad: TensorList) -> bool:
    """Whether the first differs from the second, by more than rounding, and is not clipped."""
    tilt = float(trees.norm(trees.add(grad, batch_grad, -1.0)))
    return tilt > 1e-3 * float(trees.norm(grad)) and clipping(grad, batch_grad) == 1


def clipping(grad: TensorList, batch_grad: TensorList) -> float:
    """By how much the first gradient is the second one scaled down, or clipped by value; else 1."""
    if all(map(torch.equal, grad, batch_grad)):
        return 1.0
    norm, batch_norm = float(trees.norm(grad)), float(trees.norm(batch_grad))
    if not 0 < norm < batch_norm < math.inf:
        return 1.0
    bound = max(float(g.abs().max()) for g in grad if g.numel())
    is_scaled = float(trees.dot(grad, batch_grad)) > (1 - 1e-5) * norm * batch_norm
    is_clamped = all(
        torch.allclose(g, b.clamp(-bound, bound)) for g, b in zip(grad, batch_grad, strict=True)
    )
    return norm / batch_norm if is_scaled or is_clamped else 1.0
