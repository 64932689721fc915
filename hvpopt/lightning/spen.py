"""A LightningModule that trains an energy network, with any optimizer and any of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn

from hvpopt.lightning.inference_log import adjoint_figures, inference_figures, plot_energies
from hvpopt.lightning.modules import SchedulerFactory
from hvpopt.lightning.phases import (
    Phase,
    active_phase,
    checked_phases,
    freeze_others,
    has_unused,
    parameter_groups,
    set_modes,
    trained_parameters,
)
from hvpopt.nested.energies import EncodedEnergy
from hvpopt.nested.inference import Inference
from hvpopt.nested.losses import Minimizer, squared_loss

__all__ = ["SPENModule", "Scores"]

GroupOptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]


class Scores(Protocol):
    """A module that scores predictions, such as `hvpopt.lightning.scores.MultiLabelF1`."""

    main_figure: str
    """The figure by which checkpoints are compared."""

    def update(self, stage: str, y: Tensor, target: Tensor) -> None:
        """Counts a batch of the stage "val" or "test"."""

    def figures(self, stage: str) -> dict[str, float]:
        """The scores of the stage's rows, which are then forgotten."""


class SPENModule(lightning.LightningModule):
    """An energy network whose prediction is the minimum of its energy, found by inference.

    Training is automatic optimization with any optimizer, in one or several phases: each has its
    loss, the parameters that it trains, its learning rate and number of epochs. A new phase starts
    with a fresh optimizer. In phases that train the encoder alone as a classifier (`LabelByLabel`),
    and always with `minimizer=None` (the feed-forward baseline), the prediction is the energy's
    first guess.

    Logs in training, at every step, `train/loss`, `train/NAME` for the loss's own figures, and of
    inference and adjoint, where there are any, `inference/…`: steps, residual and energy (means
    over the batch), the fractions that converged and diverged, gradient evaluations; and
    `adjoint/…`: products, residual. Logs over each epoch of validation and test `loss`, the
    squared error summed over an example's outputs, the figures of `scores`, and in validation
    `val/candidate`: the main figure, or NaN in phases whose predictions are not those of the last
    one, to compare checkpoints by. After each validation TensorBoard gets a plot of the energy
    along inference's steps.

    Args:
        energy: the network.
        optimizer: parameter groups to optimizer, as `functools.partial(torch.optim.Adam)`. Second-
            order products need `adjoint="unrolled"` where the loss passes through inference, and
            `curvature="hessian"` where it is made of energies (`StructuredHinge`).
        scheduler: optimizer to learning-rate schedule within a phase, stepped every epoch.
        phases: by name, in order; None leaves one out.
        minimizer: inference; None predicts by the energy's first guess.
        scores: figures of the predictions, none by default.

    Raises:
        ValueError: if there is no phase, one before the last has no number of epochs, or a loss
            needs inference and there is no minimizer.
    """

    def __init__(
        self,
        energy: EncodedEnergy,
        optimizer: GroupOptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        phases: Mapping[str, Phase | None],
        minimizer: Minimizer | None = None,
        scores: Scores | None = None,
    ) -> None:
        super().__init__()
        self.energy = energy
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.phases = checked_phases(phases)
        self.minimizer = minimizer
        self.scores = scores
        self._phase_index = 0
        self._trainable = {name for name, p in energy.named_parameters() if p.requires_grad}
        self._trained_by: Inference | None = None
        self._seen: Inference | None = None
        for name, phase in self.phases.items():
            if phase.loss.needs_inference and minimizer is None:
                raise ValueError(
                    f"phases.{name} has the loss {type(phase.loss).__name__}, which needs "
                    "inference; give a minimizer."
                )

    @property
    def phase(self) -> Phase:
        """The phase of training that the module is in; after training, was in."""
        return list(self.phases.values())[self._phase_index]

    def infer(self, x: Any, *, keep_iterates: bool = False) -> Inference | None:
        """Inference for inputs x; None in a phase that predicts by the first guess."""
        return self._predict(x, keep_iterates=keep_iterates)[1]

    def forward(self, x: Any) -> Tensor:
        """The predicted outputs `[B, *shape]` of inputs x."""
        return self._predict(x)[0]

    def _predict(self, x: Any, *, keep_iterates: bool = False) -> tuple[Tensor, Inference | None]:
        encoding = self.energy.encoder(x)
        initial = self.energy.initial(encoding)
        if self.minimizer is None or not self.phase.loss.needs_inference:
            return initial, None
        inference = self.minimizer(self.energy.head, encoding, initial, keep_iterates=keep_iterates)
        return inference.y, inference

    # --- training

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        """The phase's loss of a batch.

        Raises:
            TypeError: if the epoch's first targets are not floating point.
            ValueError: if they lie outside of the minimizer's domain.
        """
        x, target = batch
        if batch_idx == 0 and self.minimizer is not None:
            self.minimizer.check_target(target)
        value = self.phase.loss(self.energy, x, target, self.minimizer, step=self._step())  # type: ignore[arg-type]
        self.log("train/loss", value.loss, prog_bar=True)
        self.log_dict({f"train/{name}": figure for name, figure in value.figures.items()})
        self._trained_by = value.inference
        if value.inference is not None:
            self.log_dict(inference_figures(value.inference))
        return value.loss

    def on_after_backward(self) -> None:
        """Logs what the adjoint cost."""
        if self._trained_by is not None:
            self.log_dict(adjoint_figures(self._trained_by.report))

    def _step(self) -> int:
        """A number that no other training batch has."""
        return 0 if self._trainer is None else self.trainer.fit_loop.total_batch_idx

    # --- phases

    def setup(self, stage: str) -> None:
        """Checks that the trainer's strategy can train in phases.

        Raises:
            ValueError: under data parallelism that takes every parameter to be used at each step.
        """
        options = getattr(self.trainer.strategy, "_ddp_kwargs", None)
        all_are_used = options is not None and not options.get("find_unused_parameters")
        if stage != "fit" or not all_are_used:
            return
        for name, phase in self.phases.items():
            if has_unused(phase, self._trainable):
                raise ValueError(
                    f"phases.{name} leaves a part of the energy without gradient, but the strategy "
                    "takes every parameter to have one at each step: set "
                    "trainer.strategy=ddp_find_unused_parameters_true."
                )

    def on_train_epoch_start(self) -> None:
        """Starts the phase that the epoch belongs to, with a fresh optimizer."""
        index = active_phase(list(self.phases.values()), self.current_epoch)
        if index != self._phase_index:
            self._phase_index = index
            self.trainer.strategy.setup_optimizers(self.trainer)
        # Here and not in `setup`, so that data parallelism knows the parameters of all phases.
        freeze_others(self.energy, self._trained())
        set_modes(self.energy, self.phase)

    def on_train_end(self) -> None:
        """Leaves nothing frozen, and no part in evaluation mode."""
        for name, p in self.energy.named_parameters():
            p.requires_grad_(name in self._trainable)
        self.energy.train()

    def _trained(self) -> list[nn.Parameter]:
        return trained_parameters(self.energy, self.phase, self._trainable)

    def configure_optimizers(self) -> Any:
        """The optimizer of what the phase trains, with its schedule if there is one."""
        optimizer = self.make_optimizer(parameter_groups(self._trained(), self.phase))
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the phase, and the optimizer's name, so that a resumed run refuses another's."""
        checkpoint["phase_index"] = self._phase_index
        checkpoint["optimizer_name"] = type(self.trainer.optimizers[0]).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Returns to the checkpoint's phase, whose optimizer state it holds."""
        self._phase_index = checkpoint["phase_index"]

    # --- evaluation

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        """Counts a validation batch."""
        inference = self._evaluate("val", batch)
        if batch_idx == 0:
            self._seen = inference

    def test_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        """Counts a test batch."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The predicted outputs `[B, *shape]` of a batch, `(x, target)` or x alone."""
        return self(batch[0] if isinstance(batch, list | tuple) else batch)

    def _evaluate(self, stage: str, batch: tuple[Any, Tensor]) -> Inference | None:
        x, target = batch
        y, inference = self._predict(x)
        loss = squared_loss(y, target).mean()
        self.log(f"{stage}/loss", loss, batch_size=len(target), sync_dist=True)
        if inference is not None:
            figures = inference_figures(inference, prefix=f"{stage}_inference")
            self.log_dict(figures, batch_size=len(target), sync_dist=True)
        if self.scores is not None:
            self.scores.update(stage, y, target)
        return inference

    def on_validation_epoch_end(self) -> None:
        """Logs the scores, and plots the energy along the steps of inference."""
        if self.scores is not None:
            figures = self.scores.figures("val")
            main = figures[self.scores.main_figure]
            last = list(self.phases.values())[-1]
            alike = self.phase.loss.needs_inference == last.loss.needs_inference
            # equal on all ranks; sync_dist only keeps Lightning from asking for it
            self.log("val/candidate", main if alike else float("nan"), sync_dist=True)
            for name, value in figures.items():
                is_main = name == self.scores.main_figure
                self.log(f"val/{name}", value, prog_bar=is_main, sync_dist=True)
        if self._seen is not None and not self.trainer.sanity_checking:
            plot_energies(self._seen, self.trainer)
        self._seen = None

    def on_test_epoch_end(self) -> None:
        """Logs the scores."""
        if self.scores is not None:
            figures = self.scores.figures("test")
            self.log_dict({f"test/{name}": figures[name] for name in figures}, sync_dist=True)
