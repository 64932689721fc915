"""Ordinary LightningModules of the experiments; nothing in them knows of second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["Autoencoder", "Classifier"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class _Module(lightning.LightningModule):
    """A network with its optimizer and, if wanted, a learning-rate schedule (a step an epoch)."""

    def __init__(
        self, net: nn.Module, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None
    ) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler

    def forward(self, images: Tensor) -> Tensor:
        """The network's output for images `[B, C, H, W]`."""
        return self.net(images)

    def configure_optimizers(self) -> Any:
        """The optimizer over all parameters, with its schedule if there is one."""
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the optimizer's name, so that a resumed run can refuse another's state."""
        checkpoint["optimizer_name"] = type(self.trainer.optimizers[0]).__name__


class Classifier(_Module):
    """A classifier trained with the mean cross-entropy.

    Logs `train/loss` at every step, and `loss` and `accuracy` over each epoch of training,
    validation and test.

    Args:
        net: images `[B, C, H, W]` to logits `[B, num_classes]`.
        optimizer: parameters to optimizer, as `functools.partial(hvpopt.NewtonCG, lr=1.0)`.
        scheduler: optimizer to learning-rate schedule, stepped every epoch; None for none.
        num_classes: number of classes.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean cross-entropy of a batch."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy of a validation batch."""
        self._evaluate("val", batch, self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy of a test batch."""
        self._evaluate("test", batch, self.test_accuracy)

    def _evaluate(
        self, stage: str, batch: tuple[Tensor, Tensor], accuracy: MulticlassAccuracy
    ) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True)


class Autoencoder(_Module):
    """An autoencoder of images with pixels in [0, 1], trained pixel by pixel.

    Logs `train/loss` at every step; over each epoch of validation and test the loss, the squared
    error of the reconstruction summed over an image's pixels (`squared_error`, the number of the
    literature) and averaged over them (`mse`). At the end of each validation it writes a picture
    of images and reconstructions to TensorBoard.

    Args:
        net: images `[B, C, H, W]` to as many logits.
        optimizer: parameters to optimizer, as `functools.partial(hvpopt.NewtonCG, lr=1.0)`.
        scheduler: optimizer to learning-rate schedule, stepped every epoch; None for none.
        loss: "bce", the cross-entropy between pixels and the sigmoid of the logits, or "mse", the
            squared error of the logits themselves; both averaged over pixels and batch.
        num_pictures: images in the picture; 0 writes none.

    Raises:
        ValueError: if the loss is unknown or `num_pictures` negative.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        loss: Literal["bce", "mse"] = "bce",
        num_pictures: int = 8,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        if loss not in ("bce", "mse"):
            raise ValueError(f"loss must be 'bce' or 'mse', got {loss!r}.")
        if num_pictures < 0:
            raise ValueError(f"num_pictures must be at least 0, got {num_pictures}.")
        self.loss = loss
        self.num_pictures = num_pictures
        self._picture: Tensor | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        images, _ = batch
        loss = self._loss(self(images), images)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the errors of a validation batch and keeps the first images for the picture."""
        reconstructions = self._evaluate("val", batch[0])
        if batch_idx == 0 and self.num_pictures:
            pair = torch.stack([batch[0], reconstructions])[:, : self.num_pictures]
            self._picture = pair.clamp(0, 1)

    def on_validation_epoch_end(self) -> None:
        """Writes the picture: images above, their reconstructions below."""
        picture, self._picture = self._picture, None
        if picture is None or self.trainer.sanity_checking or not self.trainer.is_global_zero:
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # [2, n, C, H, W] -> [C, 2 H, n W]
                rows = picture.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
                logger.experiment.add_image("val/reconstructions", rows.cpu(), self.global_step)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the errors of a test batch."""
        self._evaluate("test", batch[0])

    def _evaluate(self, stage: str, images: Tensor) -> Tensor:
        logits = self(images)
        reconstructions = logits.sigmoid() if self.loss == "bce" else logits
        errors = (reconstructions - images).square().flatten(1)
        self.log(f"{stage}/loss", self._loss(logits, images), sync_dist=True)
        self.log(f"{stage}/squared_error", errors.sum(1).mean(), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/mse", errors.mean(), sync_dist=True)
        return reconstructions

    def _loss(self, logits: Tensor, images: Tensor) -> Tensor:
        if self.loss == "bce":
            return F.binary_cross_entropy_with_logits(logits, images)
        return F.mse_loss(logits, images)
