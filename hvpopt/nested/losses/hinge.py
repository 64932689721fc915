"""The structured hinge loss, with loss-augmented inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.losses.base import LossValue, Minimizer, check_choice
from hvpopt.nested.losses.task import TASK_LOSSES
from hvpopt.options import check_range

__all__ = ["AugmentedHead", "StructuredHinge"]


class StructuredHinge:
    """[w Δ(ŷ, y*) − E(x, ŷ) + E(x, y*)]₊ averaged over the batch, at the most offending output

        ŷ = argmin_y E(x, y) − w Δ(y, y*)

    of loss-augmented inference (Taskar et al. 2003; for energies Belanger and McCallum 2016,
    ICML): right outputs shall lie lower than wrong ones, the more wrong the lower. ŷ stays
    unrounded. It is a constant for the gradient, so no adjoint is needed (the envelope theorem);
    but inference has to be accurate, a poor ŷ hides offences.

    Where the domain adds an entropy, −τ H(y), it is part of E.

    Args:
        task_loss: Δ, "squared" or "log".
        scale: w, of the margin.

    Raises:
        ValueError: for an unknown word, or a scale that is not above zero.
    """

    needs_inference = True

    def __init__(
        self, *, task_loss: Literal["squared", "log"] = "squared", scale: float = 1.0
    ) -> None:
        self.task_loss = TASK_LOSSES[check_choice("task_loss", task_loss, ("squared", "log"))]
        self.scale = check_range("scale", scale, 1e-12)

    def __call__(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, *, step: int = 0
    ) -> LossValue:
        """The loss of a batch; `step` is not used."""
        encoding = energy.encoder(x)
        initial = energy.initial(encoding)
        augmented = AugmentedHead(energy.head, self.task_loss, self.scale)
        with torch.no_grad():
            inference = minimizer(augmented, {"x": encoding, "target": target}, initial)
            y = inference.y
            errors = self.task_loss(y, target)
            margin = self.scale * errors - _penalty(minimizer, y)
        gaps = margin - energy.head(encoding, y) + energy.head(encoding, target)
        figures = {
            "task_loss": errors.mean(),
            "violated": (gaps.detach() > 0).to(errors.dtype).mean(),
        }
        return LossValue(gaps.clamp_min(0).mean(), inference, figures)


def _penalty(minimizer: Minimizer, y: Tensor) -> Tensor | float:
    """−τ H(y) of each example; it is zero at right outputs, which are corners."""
    space = minimizer.method.coordinates(minimizer.domain)
    # outputs in a corner have infinite logits, and no entropy
    penalty = space.penalty(space.coordinates(y).clamp(-80, 80), y)
    return 0.0 if penalty is None else penalty


class AugmentedHead(nn.Module):
    """E(x, y) − w Δ(y, y*), for `{"x": encoding, "target": y*}`."""

    def __init__(
        self, head: nn.Module, task_loss: Callable[[Tensor, Tensor], Tensor], scale: float
    ) -> None:
        super().__init__()
        self.head = head
        self.task_loss = task_loss
        self.scale = scale

    def forward(self, x: dict[str, Any], y: Tensor) -> Tensor:
        """Augmented energies `[B]` of y `[B, *shape]`."""
        return self.head(x["x"], y) - self.scale * self.task_loss(y, x["target"])
