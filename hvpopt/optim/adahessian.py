"""AdaHessian: Adam with the curvature's diagonal in the place of the gradient's square."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvpopt.closure import ClosureOracle
from hvpopt.engines.choice import EngineName
from hvpopt.optim.checks import check_flag
from hvpopt.optim.diagonal import DiagonalOptimizer, Moved, State
from hvpopt.optim.probes import hutchinson
from hvpopt.options import check_range
from hvpopt.trees import TensorList


def block_average(diagonal: Tensor) -> Tensor:
    """The mean of |diagonal| over the block that each entry is in, of the same shape.

    A block is a convolution's kernel (all dimensions but the first two), or a matrix's row; an
    entry of what has fewer dimensions is a block by itself.

    Examples:
        >>> block_average(torch.tensor([[1.0, -3.0], [0.0, 2.0]]))
        tensor([[2., 2.],
                [1., 1.]])
    """
    size = diagonal.abs()
    if size.dim() < 2:
        return size
    dims = (1,) if size.dim() == 2 else tuple(range(2, size.dim()))
    return size.mean(dims, keepdim=True).expand_as(size)


class AdaHessian(DiagonalOptimizer):
    """Adam with a running root mean square of the Hessian's diagonal (Yao et al. 2021).

    With the gradient g and Hutchinson's estimate z ⊙ H z, z random signs, from one run of the
    closure, and D the mean of |z ⊙ H z| over blocks (`block_average`), at the t-th step

        m ← β₁ m + (1 − β₁) g                    v ← β₂ v + (1 − β₂) D⊙D
        θ ← (1 − lr wd) θ − lr m̂ / (√v̂ᵏ + ε)     m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)

    With Hessian power k = 1 it divides by the curvature, with k = 0 it is a gradient step with
    momentum. The absolute values are those of the authors' program; the source's equation 10 has
    none, and curvatures of opposite signs would then cancel in a block and make its step large.

    Args:
        params: parameters, named parameters, or groups; ``lr``, ``betas``, ``hessian_power``,
            ``eps`` and ``weight_decay`` may differ from group to group.
        lr: learning rate, of a Newton step where k = 1: of another order than Adam's.
        betas: β₁ and β₂.
        hessian_power: k, from 0 to 1.
        eps: ε, added to the denominator, in its units.
        weight_decay: wd, decoupled from the loss.
        block_averaging: False leaves D = |z ⊙ H z|.
        update_every: steps from one estimate to the next; v stays in between, and its t counts
            estimates.
        seed: of the probes.
        engine: see `hvpopt.closure.ClosureOracle`.
        max_consecutive_failures: so many failed steps in a row raise FloatingPointError.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for complex, integer or sparse parameters.

    Source: Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, "ADAHESSIAN: an adaptive second order
    optimizer for machine learning" (2021), algorithm 1; the defaults are those of the authors'
    program.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = AdaHessian([w], lr=1.0, eps=0.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (torch.tensor([1.0, 100.0]) * w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        409.0
        >>> bool(w.abs().max() < 1e-5)
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.15,
        betas: Sequence[float] = (0.9, 0.999),
        hessian_power: float = 1.0,
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        block_averaging: bool = True,
        update_every: int = 1,
        seed: int = 0,
        engine: EngineName = "auto",
        max_consecutive_failures: int = 5,
    ) -> None:
        self._averages = check_flag("block_averaging", block_averaging)
        defaults = {
            "lr": lr,
            "betas": betas,
            "hessian_power": hessian_power,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(
            params,
            defaults,
            update_every=update_every,
            seed=seed,
            engine=engine,
            max_consecutive_failures=max_consecutive_failures,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_range("hessian_power", group["hessian_power"], 0.0, 1.0)

    def _estimate(
        self, oracle: ClosureOracle, params: TensorList, seed: int
    ) -> tuple[Tensor, TensorList]:
        return hutchinson(oracle, params, seed)

    def _moved(
        self, p: Tensor, grad: Tensor, diagonal: Tensor | None, group: dict[str, Any], state: State
    ) -> Moved:
        beta1, beta2 = group["betas"]
        zeros = torch.zeros_like(p, requires_grad=False)
        m = torch.lerp(state.get("momentum", zeros), grad, 1 - beta1)
        v = state.get("square", zeros)
        num_estimates = state.get("num_estimates", 0)
        if diagonal is not None:
            d = block_average(diagonal) if self._averages else diagonal
            v, num_estimates = torch.lerp(v, d**2, 1 - beta2), num_estimates + 1
        num_steps = state.get("num_updates", 0) + 1
        size = (v / (1 - beta2**num_estimates)).sqrt()
        step = m / (1 - beta1**num_steps) / _positive(size ** group["hessian_power"], group["eps"])
        value = (1 - group["lr"] * group["weight_decay"]) * p - group["lr"] * step
        new = {
            "momentum": m,
            "square": v,
            "num_updates": num_steps,
            "num_estimates": num_estimates,
        }
        return Moved(value, new, size, {})


def _positive(denominator: Tensor, eps: float) -> Tensor:
    """The denominator plus eps, at least the least positive number."""
    return (denominator + eps).clamp(min=torch.finfo(denominator.dtype).tiny)
