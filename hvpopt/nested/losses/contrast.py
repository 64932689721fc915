"""Losses that compare energies of several outputs: ranking, and contrast with wrong ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvpopt.nested.energies.base import EncodedEnergy
from hvpopt.nested.inference import Inference
from hvpopt.nested.losses.base import LossValue, Minimizer, generator_of
from hvpopt.nested.losses.task import soft_f1
from hvpopt.options import check_count, check_range

__all__ = ["Contrastive", "Ranking"]


class _Candidates:
    """The right output, inference's, and copies of the right one with labels flipped at random.

    Args:
        num_corrupted: corrupted copies a row.
        flip: probability of flipping a label.
        seed: of the flips.
    """

    needs_inference = True

    def __init__(self, num_corrupted: int, flip: float, seed: int) -> None:
        self.num_corrupted = check_count("num_corrupted", num_corrupted)
        self.flip = check_range("flip", flip, 0.0, 1.0)
        self.seed = seed

    def _compared(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, step: int
    ) -> tuple[Tensor, Tensor, Inference]:
        """Energies and qualities `[K, B]` of the candidates, the right output first."""
        generator = generator_of(self.seed, step)
        encoding = energy.encoder(x)
        with torch.no_grad():
            inference = minimizer(energy.head, encoding, energy.initial(encoding))
        candidates = [target, inference.y]
        for _ in range(self.num_corrupted):
            flipped = torch.rand(target.shape, generator=generator).to(target.device) < self.flip
            candidates.append(torch.where(flipped, 1 - target, target))
        energies = torch.stack([energy.head(encoding, y) for y in candidates])
        qualities = torch.stack([soft_f1(y, target) for y in candidates])
        return energies, qualities, inference


class Ranking(_Candidates):
    """The mean over all pairs of outputs, q(a) > q(b), of

        [margin (q(a) − q(b)) + E(x, a) − E(x, b)]₊,

    which asks that the better output, by its soft F1 q, lies lower (as in Rooshenas, Zhang, Sharma
    and McCallum 2019, "Search-guided, lightly-supervised training of structured prediction energy
    networks", NeurIPS). Pairs come from the right output, inference's, and corrupted
    copies of the right one. The outputs are constants for the gradient.

    Args:
        margin: how far apart, for each unit of quality.
        num_corrupted: corrupted copies a row.
        flip: probability of flipping a label of those.
        seed: of the flips.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self, *, margin: float = 1.0, num_corrupted: int = 4, flip: float = 0.02, seed: int = 0
    ) -> None:
        super().__init__(num_corrupted, flip, seed)
        self.margin = check_range("margin", margin, 0.0)

    def __call__(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, *, step: int = 0
    ) -> LossValue:
        """The loss of a batch."""
        energies, qualities, inference = self._compared(energy, x, target, minimizer, step)
        better = qualities[:, None] - qualities[None, :]
        gaps = self.margin * better + energies[:, None] - energies[None, :]
        is_pair = better > 0
        hinges = torch.where(is_pair, gaps.clamp_min(0), 0.0)
        figures = {
            "violated": ((gaps.detach() > 0) & is_pair).sum() / is_pair.sum().clamp_min(1),
            "quality": qualities[1].mean(),
        }
        return LossValue(hinges.sum() / is_pair.sum().clamp_min(1), inference, figures)


class Contrastive(_Candidates):
    """−log softmax(−E/T) of the right output among it, inference's and corrupted copies of the
    right one, averaged over the batch (LeCun et al. 2006, "A tutorial on energy-based learning",
    with the sum over all outputs replaced by these). The outputs are constants for
    the gradient.

    Args:
        temperature: T.
        num_corrupted: corrupted copies a row.
        flip: probability of flipping a label of those; copies without a flip are left out.
        seed: of the flips.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self, *, temperature: float = 1.0, num_corrupted: int = 4, flip: float = 0.02, seed: int = 0
    ) -> None:
        super().__init__(num_corrupted, flip, seed)
        self.temperature = check_range("temperature", temperature, 1e-12)

    def __call__(
        self, energy: EncodedEnergy, x: Any, target: Tensor, minimizer: Minimizer, *, step: int = 0
    ) -> LossValue:
        """The loss of a batch."""
        energies, qualities, inference = self._compared(energy, x, target, minimizer, step)
        logits = -energies / self.temperature
        is_copy = qualities == 1
        is_copy[0] = False
        log_normalizers = logits.masked_fill(is_copy, -torch.inf).logsumexp(0)
        figures = {"quality": qualities[1].mean()}
        return LossValue((log_normalizers - logits[0]).mean(), inference, figures)
