"""A callback that shows what denoising does."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from hvpopt.lightning.image_scores import psnr
from hvpopt.lightning.spen import SPENModule
from hvpopt.options import check_count

__all__ = ["DenoisingPictures", "stages"]


class DenoisingPictures(lightning.Callback):
    """Writes the picture `val/denoising` to TensorBoard after each validation, and logs the PSNR of
    the noisy images themselves, `val/psnr_noisy` and `test/psnr_noisy`, to every logger.

    In the picture each column is one of the first validation images: noisy at the top, clean at
    the bottom, and between them what inference has made of it after several of its steps, the
    last one included; the output alone where the module predicts without inference. Pixels are
    clipped to [0, 1].

    Args:
        num_pictures: columns.
        num_stages: rows between the noisy and the clean images, at most.

    Raises:
        ValueError: if a number is below one.
    """

    def __init__(self, num_pictures: int = 8, *, num_stages: int = 4) -> None:
        self.num_pictures = check_count("num_pictures", num_pictures)
        self.num_stages = check_count("num_stages", num_stages)
        self._pair: tuple[Tensor, Tensor] | None = None

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the batch's noise, and keeps the first validation images."""
        noisy, clean = batch
        pl_module.log(
            f"{'test' if trainer.testing else 'val'}/psnr_noisy",
            psnr(noisy, clean).mean(),
            on_epoch=True,
            batch_size=len(clean),
            sync_dist=True,
        )
        if batch_idx == 0 and not trainer.testing:
            self._pair = noisy[: self.num_pictures], clean[: self.num_pictures]

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Writes the picture."""
        pair, self._pair = self._pair, None
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if pair is None or not loggers or trainer.sanity_checking or not trainer.is_global_zero:
            return
        noisy, clean = pair
        rows = torch.cat([noisy[None], stages(pl_module, noisy, self.num_stages), clean[None]])
        # [rows, columns, C, H, W] -> [C, rows H, columns W]
        picture = rows.clamp(0, 1).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2).cpu()
        for logger in loggers:
            logger.experiment.add_image("val/denoising", picture, trainer.global_step)


def stages(module: lightning.LightningModule, noisy: Tensor, count: int) -> Tensor:
    """What the module makes of noisy images `[B, C, H, W]`, `[K, B, C, H, W]`: K ≤ `count` iterates
    of inference, evenly spaced, the last of them the output; K = 1 without inference."""
    found = module.infer(noisy, keep_iterates=True) if isinstance(module, SPENModule) else None
    if found is None:
        return module(noisy)[None]
    assert found.iterates is not None
    num_steps = len(found.iterates) - 1
    steps = sorted({-(-num_steps * stage // count) for stage in range(1, count + 1)})
    return found.iterates[steps].detach()
