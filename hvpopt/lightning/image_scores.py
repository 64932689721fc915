"""The peak signal-to-noise ratio of images."""

from __future__ import annotations

from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import PeakSignalNoiseRatio

__all__ = ["ImagePSNR", "psnr"]

_RANGE = (0.0, 1.0)
_IMAGE = (1, 2, 3)


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each image `[B]`, −10 log₁₀ of its mean squared error, in
    decibels.

    Args:
        images: `[B, C, H, W]`; pixels are clipped to [0, 1] first, which is all that can be shown.
        target: the right images, of the same shape.
    """
    return peak_signal_noise_ratio(images, target, _RANGE, reduction="none", dim=_IMAGE)


class ImagePSNR(nn.Module):
    """The score `psnr` of outputs that are images with pixels in [0, 1]: the function `psnr`,
    averaged over the images."""

    main_figure = "psnr"

    def __init__(self) -> None:
        super().__init__()
        self.val = PeakSignalNoiseRatio(_RANGE, dim=_IMAGE)
        self.test = PeakSignalNoiseRatio(_RANGE, dim=_IMAGE)

    def update(self, stage: str, y: Tensor, target: Tensor) -> None:
        """Counts a batch `[B, C, H, W]` of the stage "val" or "test"."""
        (self.val if stage == "val" else self.test).update(y, target)

    def figures(self, stage: str) -> dict[str, float]:
        """The average over all images of a stage, which are then forgotten."""
        metric = self.val if stage == "val" else self.test
        value = float(metric.compute())
        metric.reset()
        return {"psnr": value}
