"""Up to which curvature an optimizer's iteration is stable."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvpopt.options import check_range
from hvpopt.trees import TensorList


@dataclass(frozen=True)
class StabilityLimit:
    """The largest curvature under which an optimizer's steps on a quadratic do not grow.

    An iteration on ½ xᵀAx is stable where no eigenvalue of P^-½ (A + W) P^-½ is above the
    threshold, P being a diagonal preconditioner and W the weight decay that enters the gradient.
    """

    threshold: float
    """In the units of P⁻¹ A; it is inversely proportional to the learning rate."""
    lr: float
    """The learning rate, the largest one of all parameter groups."""
    name: str
    """The threshold as a formula."""
    preconditioner: TensorList | None = None
    """The diagonal of P, one tensor a parameter; None for the identity."""
    weight_decay: tuple[float, ...] | None = None
    """The diagonal of W, one number a parameter; None for zero."""


def gradient_descent_limit(
    lr: float, *, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0
) -> StabilityLimit:
    """The limit of gradient descent with momentum, in the convention of `torch.optim.SGD`.

    2/lr without momentum, 2 (1 + β) / ((1 − d) lr) with momentum β and dampening d, and
    2 (1 + β) / ((1 + 2β) lr) with Nesterov's. With noise of mini-batches iterations settle below.

    Raises:
        ValueError: For ``lr`` ≤ 0, momentum or dampening outside [0, 1), or Nesterov's momentum
            with none or with dampening.

    Source: Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient descent on neural networks typically
    occurs at the edge of stability" (ICLR 2021), section 2 and appendix B.

    Examples:
        >>> gradient_descent_limit(0.1).threshold
        20.0
    """
    check_range("lr", lr, 0.0)
    if lr == 0:
        raise ValueError("lr=0 has no limit: expected a positive learning rate.")
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} is out of range: expected a number in [0, 1).")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError("Nesterov's momentum needs momentum > 0 and dampening = 0.")
    if nesterov:
        factor, name = (2 + 2 * momentum) / (1 + 2 * momentum), "(2 + 2β) / ((1 + 2β) lr)"
    elif momentum and dampening:
        factor, name = (2 + 2 * momentum) / (1 - dampening), "(2 + 2β) / ((1 − d) lr)"
    elif momentum:
        factor, name = 2 + 2 * momentum, "(2 + 2β) / lr"
    else:
        factor, name = 2.0, "2 / lr"
    return StabilityLimit(factor / lr, float(lr), name)


def optimizer_limit(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> StabilityLimit:
    """The limit of a `torch.optim.SGD`, `Adam` or `AdamW` in its present state.

    Adam's second moments change slowly, so that it is stable while gradient descent with its
    momentum, an exponential mean, on the preconditioned problem is: threshold
    2 (1 + β₁) / ((1 − β₁) lr), which is 38/lr for β₁ = 0.9, and

        P = (1 − β₁ᵗ) (√(v / (1 − β₂ᵗ)) + ε).

    Groups of other learning rates than the largest enter P. Decoupled weight decay is left out:
    its share of a step is that of a curvature of ``weight_decay``, commonly far below the limit.

    Args:
        optimizer: the optimizer.
        params: the parameters that the operator's vectors stand for, in their order; each in one
            of the optimizer's groups.

    Raises:
        TypeError: For another optimizer.
        ValueError: If a parameter is in no group, groups differ in momentum, the learning rate is
            zero throughout, or Adam has not yet taken a step.

    Source: Cohen et al., "Adaptive gradient methods at the edge of stability" (arXiv:2207.14484,
    2022), and of SGD as `gradient_descent_limit`.
    """
    groups = _groups(optimizer, params)
    lr = max(float(group["lr"]) for group in groups)
    kind = type(optimizer)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        beta = _common(groups, "betas")[0]
        plain = gradient_descent_limit(lr, momentum=beta, dampening=beta)
        scales = [_adam(optimizer.state[p], group) for p, group in zip(params, groups, strict=True)]
        name = "(2 + 2β₁) / ((1 − β₁) lr)"
    elif kind is torch.optim.SGD:
        momentum, nesterov = _common(groups, "momentum"), _common(groups, "nesterov")
        dampening = _common(groups, "dampening") if momentum else 0.0
        plain = gradient_descent_limit(
            lr, momentum=momentum, nesterov=nesterov, dampening=dampening
        )
        scales = [torch.ones((), dtype=p.dtype, device=p.device) for p in params]
        name = plain.name
    else:
        raise TypeError(
            f"No limit of stability is known for {kind.__name__}: expected torch.optim.SGD, Adam "
            "or AdamW, or state one with gradient_descent_limit or StabilityLimit."
        )
    factors = [lr / float(group["lr"]) if group["lr"] else float("inf") for group in groups]
    is_plain = kind is torch.optim.SGD and all(f == 1 for f in factors)
    diagonal = [
        (f * s).expand_as(p).contiguous() for f, s, p in zip(factors, scales, params, strict=True)
    ]
    decays = tuple(_coupled_decay(optimizer, group) for group in groups)
    return StabilityLimit(
        plain.threshold,
        lr,
        name,
        preconditioner=None if is_plain else diagonal,
        weight_decay=decays if any(decays) else None,
    )


def _groups(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Each parameter's group."""
    owners = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for i, p in enumerate(params):
        if id(p) not in owners:
            raise ValueError(
                f"params[{i}], of shape {tuple(p.shape)}, is in no group of the optimizer."
            )
    if not params:
        raise ValueError("params is empty; give at least one parameter of the optimizer.")
    return [owners[id(p)] for p in params]


def _common(groups: list[dict[str, Any]], option: str) -> Any:
    value = groups[0][option]
    if any(group[option] != value for group in groups):
        raise ValueError(f"The optimizer's groups differ in {option}: there is no common limit.")
    return value


def _coupled_decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """The weight decay that enters the gradient."""
    is_decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
    return 0.0 if is_decoupled else float(group["weight_decay"])


def _adam(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P of one parameter."""
    if "exp_avg_sq" not in state:
        raise ValueError("Adam has no second moments yet: take a step before its limit.")
    step = int(state["step"])
    beta1, beta2 = group["betas"]
    second: Tensor = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    root = (second / (1 - beta2**step)).sqrt()
    return (root + group["eps"]) * (1 - beta1**step)
