"""How wrong an output is: per-example errors and qualities of soft labels y ∈ [0, 1]ᴸ.

The convex ones are computed by torch's own loss functions, at which a Gauss-Newton matrix of the
training loss splits it into the output of inference and the error of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TASK_LOSSES", "TaskLossName", "log_loss", "soft_f1", "soft_f1_loss", "squared_loss"]

TaskLossName = Literal["squared", "log", "soft_f1"]

_SMALLEST = 1e-6


def _check_shapes(y: Tensor, target: Tensor) -> None:
    """Lets targets pass that are shaped like y: others would be broadcast.

    Raises:
        ValueError: if they are not.
    """
    if y.shape != target.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)} for outputs y of shape {tuple(y.shape)}: "
            "expected the same; the energy's first guess gives the outputs' shape."
        )


def squared_loss(y: Tensor, target: Tensor) -> Tensor:
    """‖y − y*‖² of each example, `[B]`."""
    _check_shapes(y, target)
    return F.mse_loss(y, target.to(y.dtype), reduction="none").flatten(1).sum(1)


def log_loss(y: Tensor, target: Tensor) -> Tensor:
    """−Σ y* log y + (1 − y*) log(1 − y) of each example, `[B]`, with y kept 1e-6 away from 0 and 1,
    so that a wrong corner costs 13.8 and not infinity."""
    _check_shapes(y, target)
    wide = torch.promote_types(y.dtype, torch.float32)
    y, target = y.to(wide).clamp(_SMALLEST, 1 - _SMALLEST), target.to(wide)
    with torch.autocast(y.device.type, enabled=False):  # which refuses probabilities
        return F.binary_cross_entropy(y, target, reduction="none").flatten(1).sum(1)


def soft_f1(y: Tensor, target: Tensor) -> Tensor:
    """2 Σ min(y, y*) / Σ (y + y*) of each example, `[B]`: the F1 score for labels of 0 and 1, with
    the relaxation of Gygli, Norouzi and Angelova (2017, ICML) between them. 1 where
    both are all zero."""
    _check_shapes(y, target)
    y, target = y.flatten(1), target.flatten(1)
    total = (y + target).sum(1)
    overlap = 2 * torch.minimum(y, target).sum(1)
    return torch.where(total > 0, overlap / total.clamp_min(_SMALLEST), 1.0)


def soft_f1_loss(y: Tensor, target: Tensor) -> Tensor:
    """1 − `soft_f1` of each example, `[B]`."""
    return 1 - soft_f1(y, target)


TASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": squared_loss,
    "log": log_loss,
    "soft_f1": soft_f1_loss,
}
"""The errors by name."""
