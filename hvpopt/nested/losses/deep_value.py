"""Training of a deep value network: σ(−E(x, y)) learns the quality of any output y."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.inference import Inference
from hvpopt.nested.losses.base import LossValue, Minimizer, generator_of
from hvpopt.nested.losses.task import soft_f1
from hvpopt.options import check_count, check_range

__all__ = ["DeepValue"]


class DeepValue:
    """The cross-entropy between the value σ(−E(x, y)) and the quality q(y, y*), the soft F1, on
    outputs y that are generated for each batch (Gygli, Norouzi and Angelova 2017, ICML):

    - by inference, in the middle of what prediction will meet, or,
    - in a part `adversarial` of the batches, by steps up the loss itself, y ← clip(y + η ∂ℓ/∂y),
      where the value is most mistaken; a part `from_truth` of their rows starts at y* (with the
      others, where inference starts), so that high values are seen, too.

    Averaged over the batch. The generated outputs are constants for the gradient.

    Args:
        adversarial: probability that a batch is adversarial.
        from_truth: probability that a row of such a batch starts at y*.
        step_size: η of the adversarial steps.
        num_adversarial_steps: how many.
        num_samples: outputs to learn from in a batch of inference: the last, and others drawn from
            the iterates before it. The encoder runs once for all.
        seed: of the random choices.

    Raises:
        ValueError: for an argument out of range.
    """

    needs_inference = True

    def __init__(
        self,
        *,
        adversarial: float = 0.5,
        from_truth: float = 0.5,
        step_size: float = 0.5,
        num_adversarial_steps: int = 1,
        num_samples: int = 1,
        seed: int = 0,
    ) -> None:
        self.adversarial = check_range("adversarial", adversarial, 0.0, 1.0)
        self.from_truth = check_range("from_truth", from_truth, 0.0, 1.0)
        self.step_size = check_range("step_size", step_size, 0.0)
        self.num_adversarial_steps = check_count("num_adversarial_steps", num_adversarial_steps)
        self.num_samples = check_count("num_samples", num_samples)
        self.seed = seed

    def __call__(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, *, step: int = 0
    ) -> LossValue:
        """The loss of a batch."""
        generator = generator_of(self.seed, step)
        encoding = energy.encoder(x)
        fixed = {name: part.detach() for name, part in encoding.items()}
        initial = energy.initial(fixed)
        inference: Inference | None = None
        if float(torch.rand((), generator=generator)) < self.adversarial:
            samples = [self._adversarial(energy, fixed, target, minimizer, generator)]
        else:
            with torch.no_grad():
                inference = minimizer(
                    energy.head, fixed, initial, keep_iterates=self.num_samples > 1
                )
            samples = self._drawn(inference, generator)
        losses, qualities = [], []
        for y in samples:
            quality = soft_f1(y, target)
            losses.append(_cross_entropy(energy.head(encoding, y), quality).mean())
            qualities.append(quality.mean())
        figures = {"quality": qualities[-1]} if inference is not None else {}
        return LossValue(torch.stack(losses).mean(), inference, figures)

    def _adversarial(
        self,
        energy: EncodedEnergy,
        encoding: dict[str, Tensor],
        target: Tensor,
        minimizer: Minimizer,
        generator: torch.Generator,
    ) -> Tensor:
        """Outputs about which the value is mistaken."""
        start = minimizer.start_from(energy.initial(encoding))
        at_truth = torch.rand(len(target), generator=generator) < self.from_truth
        at_truth = at_truth.view(-1, *[1] * (target.ndim - 1)).to(target.device)
        y = torch.where(at_truth, target, start)
        for _ in range(self.num_adversarial_steps):
            y = y.detach().requires_grad_()
            loss = _cross_entropy(energy.head(encoding, y), soft_f1(y, target)).sum()
            (slope,) = torch.autograd.grad(loss, y)
            y = (y + self.step_size * slope).clamp(0, 1)
        return y.detach()

    def _drawn(self, inference: Inference, generator: torch.Generator) -> list[Tensor]:
        """The last iterate, and others before it."""
        if inference.iterates is None:
            return [inference.y]
        *before, last = inference.iterates
        drawn = torch.randperm(len(before), generator=generator)[: self.num_samples - 1]
        return [*(before[i] for i in drawn.tolist()), last]


def _cross_entropy(energies: Tensor, quality: Tensor) -> Tensor:
    """Between the value σ(−E) and the quality, `[B]`."""
    return F.binary_cross_entropy_with_logits(-energies, quality, reduction="none")
