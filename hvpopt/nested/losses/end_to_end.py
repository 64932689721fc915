"""The loss of the predicted output, differentiated through inference."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.losses.base import LossValue, Minimizer, check_choice
from hvpopt.nested.losses.task import TASK_LOSSES, TaskLossName

__all__ = ["EndToEnd"]


class EndToEnd:
    """The error of inference's output, Δ(ŷ(θ), y*), averaged over the batch (Belanger, Yang and
    McCallum 2017, ICML): gradients pass through the minimisation by the minimizer's adjoint.

    With `iterates="all"` every iterate y_1 … y_T is penalised, with weights proportional to
    1 / (T − t + 1), which ask for good outputs early.

    With the adjoint "unrolled" optimizers may take products of its second derivatives, and of its
    Gauss-Newton matrix (1/B) Σ Jᵀ ∇²Δ J, J = ∂ŷ/∂θ, for "squared" and "log", which are convex.

    Args:
        task_loss: Δ: "squared", "log" or "soft_f1".
        iterates: "last" or "all".

    Raises:
        ValueError: for an unknown word.
    """

    needs_inference = True

    def __init__(
        self, *, task_loss: TaskLossName = "log", iterates: Literal["last", "all"] = "last"
    ) -> None:
        self.task_loss = TASK_LOSSES[check_choice("task_loss", task_loss, tuple(TASK_LOSSES))]
        self.iterates = check_choice("iterates", iterates, ("last", "all"))

    def __call__(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, *, step: int = 0
    ) -> LossValue:
        """The loss of a batch; `step` is not used."""
        encoding = energy.encoder(x)
        inference = minimizer(
            energy.head,
            encoding,
            energy.initial(encoding),
            keep_iterates=self.iterates == "all",
        )
        errors = self.task_loss(inference.y, target)
        figures = {"task_loss": errors.mean().detach()}
        if inference.iterates is None:
            return LossValue(errors.mean(), inference, figures)
        iterates = inference.iterates[1:]
        means = torch.stack([self.task_loss(y, target).mean() for y in iterates])
        weights = 1 / torch.arange(len(means), 0, -1, dtype=means.dtype, device=means.device)
        return LossValue((weights / weights.sum()) @ means, inference, figures)
