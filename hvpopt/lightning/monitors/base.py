"""What the monitors share: scalars to every logger, and what only TensorBoard can show."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from hvpopt.lightning.monitors.layout import layout


class Monitor(L.Callback):
    """A callback whose scalars go to every logger, at the step of Lightning's own monitors.

    The last monitor of a trainer speaks for all of them: it writes the custom layout of their
    scalars to TensorBoard, once there are any, and the report at the end of training.
    """

    def __init__(self) -> None:
        self.tags: set[str] = set()
        """The names under which scalars were logged."""
        self._layout: dict[str, Any] = {}
        self._num_tags = 0

    @abstractmethod
    def watch(self, trainer: L.Trainer, module: L.LightningModule, was_trained: bool) -> None:
        """Looks at what a training batch has changed.

        Args:
            trainer: that trains.
            module: its module.
            was_trained: whether ``training_step`` returned something.
        """

    def section(self, trainer: L.Trainer) -> str:
        """The monitor's part of the report, in Markdown; empty where there is nothing to say."""
        return ""

    def publish(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
        """Hands scalars to every logger."""
        if metrics:
            self.tags.update(metrics)
            for logger in trainer.loggers:
                logger.log_metrics(dict(metrics), step=current_step(trainer))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Lets the monitor watch."""
        self.watch(trainer, pl_module, bool(outputs))
        self._lay_out(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the report of the run."""
        self._lay_out(trainer)
        monitors = _monitors(trainer)
        if monitors[-1] is self:
            text = "\n\n".join(filter(None, (monitor.section(trainer) for monitor in monitors)))
            for writer in writers(trainer):
                writer.add_text("report/training", text, current_step(trainer))

    def _lay_out(self, trainer: L.Trainer) -> None:
        """Writes the layout, when there is something new in it."""
        monitors = _monitors(trainer)
        if monitors[-1] is not self:
            return
        tags = set[str]().union(*(monitor.tags for monitor in monitors))
        if len(tags) == self._num_tags:
            return
        self._num_tags, found = len(tags), layout(tags)
        if found != self._layout:
            self._layout = found
            for writer in writers(trainer):
                writer.add_custom_scalars(found)


def current_step(trainer: L.Trainer) -> int:
    """The step under which Lightning's own monitors log what follows the last optimizer step."""
    num_steps = trainer.fit_loop.epoch_loop._batches_that_stepped  # of it only after the batch
    return min(num_steps, max(trainer.global_step - 1, 0))


def writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """TensorBoard's writers, on the rank that writes."""
    if not trainer.is_global_zero:
        return []
    return [lg.experiment for lg in trainer.loggers if isinstance(lg, TensorBoardLogger)]


def _monitors(trainer: L.Trainer) -> list[Monitor]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Monitor)]


def table(rows: Mapping[str, str], head: tuple[str, str] = ("", "")) -> str:
    """A table of two columns in Markdown."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])
