"""Training of the local term alone, as a classifier."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.losses.base import LossValue, Minimizer
from hvpopt.options import check_range

__all__ = ["LabelByLabel"]


class LabelByLabel:
    """The cross-entropy of the encoder's scores, label by label: the first stage of a SPEN.

    The local term −⟨y, s(x)⟩ with the entropy of y is smallest at σ(s(x)), so that a classifier's
    logits are a fair start for it. Summed over the labels, averaged over the batch.

    Args:
        smoothing: ε; the target is then y* (1 − ε) + ε/2.

    Raises:
        ValueError: if the smoothing is not in [0, 1].
    """

    needs_inference = False

    def __init__(self, *, smoothing: float = 0.0) -> None:
        self.smoothing = check_range("smoothing", smoothing, 0.0, 1.0)

    def __call__(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, *, step: int = 0
    ) -> LossValue:
        """The loss of a batch; `minimizer` and `step` are not used."""
        scores = energy.encoder(x)["scores"]
        smoothed = target * (1 - self.smoothing) + self.smoothing / 2
        loss = F.binary_cross_entropy_with_logits(scores, smoothed, reduction="sum")
        return LossValue(loss / len(target))
