"""Hypergradients through the path of an inner optimizer, such as those of its step sizes."""

import math

from hvpopt.nested.adjoints import (
    BackOptimization,
    Checkpointed,
    ForwardMode,
    Truncated,
    Unrolled,
    adjoint_named,
)
from hvpopt.nested.adjoints.back_optimization import LEAST_TAPES
from hvpopt.nested.bilevel import Loss, check_problem
from hvpopt.nested.inner_path import InnerPath, Step, UnrolledHypergradient
from hvpopt.options import check_count
from hvpopt.pytrees import Tree

PathAdjoint = Unrolled | Checkpointed | BackOptimization | Truncated | ForwardMode


def unrolled_hypergradient(
    step: Step,
    outer_loss: Loss,
    params: Tree,
    hparams: Tree,
    *,
    num_steps: int,
    adjoint: PathAdjoint | str = "back_optimization",
) -> UnrolledHypergradient:
    """dℓ(w_T, λ)/dλ for w_{t+1} = step(w_t, λ, t), t = 0, …, T − 1.

    Reverse mode carries w̄_T = ∂ℓ/∂w back through the steps, w̄_t = (∂step/∂w)ᵀ w̄_{t+1}, and
    sums λ̄ = ∂ℓ/∂λ + Σₜ (∂step/∂λ)ᵀ w̄_{t+1}. The adjoints differ in what they hold meanwhile:

    - `Unrolled`: the tape of all T steps;
    - `Checkpointed`: about √T states and the tape of √T steps; runs nearly all steps twice;
    - `BackOptimization`: the tapes of k = ``num_tapes`` steps (8 for None) and T / k states; runs
      all steps but the last k twice;
    - `Truncated`: the tape of the last K steps; leaves out what the others add;
    - `ForwardMode`: no tape; the derivative of w_t by each hyper-parameter, T products each, so
      for a few hyper-parameters.

    Args:
        step: ``step(params, hparams, t)``. It may run twice, with torch's random numbers (dropout)
            the same both times; draw batches by t, not from an iterator or a generator of your
            own that goes on. Take gradients by ``torch.func.grad``; ``torch.autograd.grad`` with
            ``create_graph=True`` does, too, but not in forward mode. What the optimizer carries
            (momentum) is part of the parameters.
        outer_loss: ``outer_loss(params, hparams)``, a real floating-point scalar.
        params: w₀, a pytree of real floating-point tensors; stays as it is.
        hparams: λ, another.
        num_steps: T.
        adjoint: How, as above: an object, or its word ("unrolled", "checkpointed",
            "back_optimization", "truncated", "forward"). Its ``products`` is for energies: here
            they are those of ``step``.

    Raises:
        TypeError: If a tensor or the loss is not real floating point, or the adjoint is another.
        ValueError: If a word is unknown, ``params`` or ``hparams`` hold no tensor, ``step``
            returns another structure or shapes than ``params``, or other values when it runs
            again, the loss has dimensions, or it or its gradient is not finite, or ``num_steps``
            is below 1.

    Source: Domke, Generic methods for optimization-based modeling (AISTATS 2012); Maclaurin,
    Duvenaud and Adams, Gradient-based hyperparameter optimization through reversible learning
    (ICML 2015); Franceschi et al., Forward and reverse gradient-based hyperparameter
    optimization (ICML 2017).

    Examples:
        >>> import torch
        >>> def step(w, lr, t):
        ...     return w - lr * torch.func.grad(lambda w: (w**2).sum())(w)
        >>> start, lr = torch.tensor([1.0]), torch.tensor(0.25)
        >>> found = unrolled_hypergradient(step, lambda w, lr: w.sum(), start, lr, num_steps=2)
        >>> found.params, found.value  # (1 − 2 lr)², −4 (1 − 2 lr)
        (tensor([0.2500]), tensor(-2.))
    """
    chosen = adjoint_named(adjoint) if isinstance(adjoint, str) else adjoint
    check_problem(params, hparams)
    path = InnerPath(step, params, hparams, check_count("num_steps", num_steps))
    if isinstance(chosen, ForwardMode):
        return path.forward(outer_loss, chosen.max_directions)
    return path.reverse(outer_loss, _marks(chosen, num_steps))


def _marks(adjoint: object, num_steps: int) -> list[int]:
    """The steps at which a state is kept, in order: between two of them lies one tape."""
    if isinstance(adjoint, Unrolled):
        return [0, num_steps]
    if isinstance(adjoint, Truncated):
        return [max(0, num_steps - adjoint.num_steps), num_steps]
    if isinstance(adjoint, BackOptimization):
        length = LEAST_TAPES if adjoint.num_tapes is None else max(1, adjoint.num_tapes)
        return sorted({0, *range(num_steps, 0, -length)})
    if isinstance(adjoint, Checkpointed):
        count = adjoint.num_segments or math.isqrt(num_steps - 1) + 1
        return sorted({round(i * num_steps / count) for i in range(count + 1)})
    raise TypeError(
        f"adjoint={adjoint!r}; expected an Unrolled, Checkpointed, BackOptimization, Truncated or "
        "ForwardMode object, or its word. Implicit and Neumann need no path but a solved inner "
        "problem: take hypergradient."
    )
