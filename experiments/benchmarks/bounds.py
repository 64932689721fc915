"""What second-order products must cost at least, counted in matrix products."""

from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode

from hvpopt.engines.support import differentiable_kernels

from .models import Problem


@dataclass(frozen=True)
class FlopBound:
    """Floating-point operations of a network's matrix products, convolutions and attention.

    A product y = W x whose factors both depend on the parameters needs two products in the
    backward pass and two for its tangent; one whose factor x is data (the first layer's) needs
    one and one. With forward F = F₂ + F₁ and backward B = 2 F₂ + F₁ counted, the two kinds are
    F₂ = B − F and F₁ = 2 F − B, and in units of the gradient F + B = 3 F₂ + 2 F₁

    - loss, gradient and Hessian product at once: (9 F₂ + 4 F₁) / (F + B),
    - a Hessian product where the primal is reused: (6 F₂ + 2 F₁) / (F + B),
    - a Gauss-Newton product at once: (5 F₂ + 3 F₁) / (F + B),
    - a Gauss-Newton product where the primal is reused: (4 F₂ + 2 F₁) / (F + B).

    Element-wise operations are not counted: where they dominate, no engine reaches the bound.
    """

    forward: int
    """F."""
    backward: int
    """B."""

    @property
    def one_shot_hvp(self) -> float:
        """Loss, gradient and Hessian product, in gradients."""
        return self._in_gradients(9, 4)

    @property
    def repeated_hvp(self) -> float:
        """A Hessian product where the primal is reused, in gradients."""
        return self._in_gradients(6, 2)

    @property
    def one_shot_ggn(self) -> float:
        """A Gauss-Newton product, in gradients."""
        return self._in_gradients(5, 3)

    @property
    def repeated_ggn(self) -> float:
        """A Gauss-Newton product where the primal is reused, in gradients."""
        return self._in_gradients(4, 2)

    def _in_gradients(self, both: int, one: int) -> float:
        with_both, with_one = self.backward - self.forward, 2 * self.forward - self.backward
        return (both * with_both + one * with_one) / (self.forward + self.backward)


def flop_bound(problem: Problem) -> FlopBound:
    """Counts one gradient of the problem with ``torch.utils.flop_counter``.

    Attention and recurrent layers are counted by their plain matrix products, not by fused
    kernels, which the counter does not see or which recompute.
    """
    with differentiable_kernels():
        with FlopCounterMode(display=False) as forward:
            problem.loss(problem.module(problem.inputs))
        with FlopCounterMode(display=False) as gradient:
            problem.closure()
    once = forward.get_total_flops()
    return FlopBound(once, gradient.get_total_flops() - once)
