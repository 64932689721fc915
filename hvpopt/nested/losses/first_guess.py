"""The loss of the first guess, without inference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.losses.base import LossValue, Minimizer, check_choice
from hvpopt.nested.losses.task import TASK_LOSSES, TaskLossName

__all__ = ["FirstGuess"]


class FirstGuess:
    """The error of the energy's first guess, averaged over the batch: for the first guess what
    `EndToEnd` is for the minimum. It trains a feed-forward network, or where inference starts.

    Args:
        task_loss: "squared", "log" or "soft_f1".

    Raises:
        ValueError: for an unknown word.
    """

    needs_inference = False

    def __init__(self, *, task_loss: TaskLossName = "log") -> None:
        self.task_loss = TASK_LOSSES[check_choice("task_loss", task_loss, tuple(TASK_LOSSES))]

    def __call__(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, *, step: int = 0
    ) -> LossValue:
        """The loss of a batch; `minimizer` and `step` are not used."""
        guess = energy.initial(energy.encoder(x))
        return LossValue(self.task_loss(guess, target).mean())
