"""A LightningModule as it stands in the middle of a fit, without a fit.

A `training_step` may ask for its trainer, log, and rely on the trainer's precision and device. Here
all of that is provided for a while and taken back afterwards, so that the step can be looked at.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn

from hvpopt.isolation import World
from hvpopt.silence import trainer_of


def plain_trainer(module: nn.Module, accelerator: str = "") -> L.Trainer:
    """A trainer of one process, without loggers, checkpoints and bars.

    Args:
        module: whose device it trains on.
        accelerator: of Lightning, where another is meant.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    kind = accelerator or {"cuda": "gpu"}.get(device.type, device.type)
    devices: Any = [device.index or 0] if not accelerator and kind == "gpu" else 1
    with _without_announcements():
        return L.Trainer(
            accelerator=kind,
            devices=devices,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


@contextmanager
def attached(
    module: nn.Module,
    trainer: L.Trainer | None = None,
    data: L.LightningDataModule | None = None,
) -> Iterator[L.Trainer]:
    """While active, the module is on the trainer's device, in its precision, and has no traces.

    Yields the trainer: the one given, else the one that the module has, else a plain one. Of a
    trainer for several processes this one alone takes part. What runs inside is silent (logs,
    loggers, callbacks), and afterwards parameters, gradients, buffers, metrics, attributes of the
    modules and random numbers are what they were, and the trainer is as it was.

    Args:
        module: a LightningModule; of others only parameters and buffers are looked after.
        trainer: whose device and precision.
        data: whose hooks batches go through; the trainer's own by default.
    """
    if trainer is None:
        trainer = trainer_of(module) or plain_trainer(module)
    with ExitStack() as stack:
        if isinstance(module, L.LightningModule):
            stack.enter_context(_connected(module, trainer, data))
        world = World(module, list(module.parameters()))
        world.hold_random_numbers()
        stack.enter_context(world.further_run())
        stack.enter_context(_held_parameters(module))
        if isinstance(module, L.LightningModule):
            trainer.precision_plugin.convert_module(module)
            module.to(trainer.strategy.root_device)
        yield trainer


def batch_for(module: nn.Module, trainer: L.Trainer, batch: Any) -> Any:
    """The batch on the trainer's device and in its precision, as ``training_step`` gets it."""
    if not isinstance(module, L.LightningModule):
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), batch)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch)


def loss_of_training_step(
    module: L.LightningModule, trainer: L.Trainer
) -> Callable[[Any], Tensor | None]:
    """A function from a batch to the loss of ``training_step``; None where that returns None."""
    accepted = signature(module.training_step).parameters.values()
    takes_index = len(accepted) > 1 or any(p.kind is p.VAR_POSITIONAL for p in accepted)

    def loss(batch: Any) -> Tensor | None:
        output: Any = trainer.strategy.training_step(*((batch, 0) if takes_index else (batch,)))
        return output["loss"] if isinstance(output, Mapping) else output

    return loss


@contextmanager
def _connected(
    module: L.LightningModule, trainer: L.Trainer, data: L.LightningDataModule | None
) -> Iterator[None]:
    """While active, module and trainer know each other, and the trainer trains."""
    strategy, state, connector = trainer.strategy, trainer.state, trainer._data_connector
    optimizers = ("_optimizers", "_lightning_optimizers", "lr_scheduler_configs")
    names = ("_lightning_module", "_model", *optimizers)
    held = {name: getattr(strategy, name) for name in names}
    held_state = (state.fn, state.stage, state.status)
    held_data = (connector._datahook_selector, getattr(trainer, "datamodule", None))
    previous = trainer_of(module)
    if data is not None or connector._datahook_selector is None:
        connector.attach_datamodule(module)  # makes the selector of hooks
        connector._datahook_selector.datamodule = data  # type: ignore[union-attr]
        trainer.datamodule = data  # type: ignore[attr-defined]
    strategy.connect(module)
    module.trainer = trainer
    state.fn, state.status = TrainerFn.FITTING, TrainerStatus.RUNNING
    trainer.training = True
    try:
        yield
    finally:
        state.fn, state.stage, state.status = held_state
        connector._datahook_selector, trainer.datamodule = held_data  # type: ignore[attr-defined]
        module.trainer = previous
        vars(strategy).update(held)


@contextmanager
def _held_parameters(module: nn.Module) -> Iterator[None]:
    """While active, parameters may be moved, converted and written to."""
    held = [(p, p.data) for p in module.parameters()]
    copies = [data.clone() for _, data in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for (p, data), copy in zip(held, copies, strict=True):
                p.grad = None  # of another dtype or device, perhaps
                p.data = data
                if not torch.equal(data, copy):
                    p.copy_(copy)


@contextmanager
def _without_announcements() -> Iterator[None]:
    """While active, Lightning does not say which devices it found."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
