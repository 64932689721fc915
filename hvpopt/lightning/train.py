"""The task `train`: fit, test, and a short table of what came out."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hvpopt.lightning.results import hyperparameters, log_results
from hvpopt.lightning.resume import check_checkpoint

__all__ = ["checked_trainer", "train"]

log = logging.getLogger(__name__)


def train(
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    trainer: Callable[..., lightning.Trainer],
    callbacks: Mapping[str, lightning.Callback | None] | None = None,
    logger: Logger | None = None,
    ckpt_path: str | Path | None = None,
    output_dir: str | Path = ".",
    choices: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Results of a training run: test metrics, `seconds`, `steps`, `products`, `output_dir`.

    Fits the module, tests the best checkpoint (the last weights where none is kept), writes the
    results to `summary.json` in the output directory, logs them as a table, and gives them to the
    logger beside the choices and the optimizer's options (HPARAMS in TensorBoard). The seconds are
    those of `fit`; the products are the optimizer's own count, None for one that computes none.

    Args:
        module: what to train.
        data: its data.
        trainer: makes the Trainer from `callbacks` and `logger`, as
            `functools.partial(lightning.Trainer, max_epochs=10)`.
        callbacks: by name; None switches one off.
        logger: where metrics go; None for nowhere.
        ckpt_path: a checkpoint to resume from.
        output_dir: where the run writes.
        choices: names and values that distinguish the run from others, for the logger.

    Raises:
        FileNotFoundError, ValueError: before any data are loaded: if the optimizer or the Trainer
            refuses its arguments, the network does not accept the data's images, or the checkpoint
            cannot be resumed from.
    """
    fitter = checked_trainer(module, data, trainer, callbacks or {}, logger, ckpt_path)

    with _quiet_lightning():
        start = time.perf_counter()
        # weights_only: wherever the file came from, loading it runs no code
        fitter.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        seconds = time.perf_counter() - start
        optimizer = fitter.optimizers[0]
        metrics = _test(fitter, module, data)
    results = {
        **metrics,
        "seconds": seconds,
        "steps": fitter.global_step,
        "products": getattr(optimizer, "num_products", None),
        "output_dir": str(output_dir),
    }
    if fitter.is_global_zero:
        Path(output_dir, "summary.json").write_text(json.dumps(results, indent=2) + "\n")
        settings = hyperparameters(optimizer, choices or {})
        log_results(fitter.loggers, results, settings, fitter.global_step)
        log.info("\n%s", _table(results, type(optimizer).__name__, fitter.loggers))
    return results


def checked_trainer(
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    trainer: Callable[..., lightning.Trainer],
    callbacks: Mapping[str, lightning.Callback | None],
    logger: Logger | None,
    ckpt_path: str | Path | None,
) -> lightning.Trainer:
    """The Trainer, after all checks that need no data; the arguments are those of `train`.

    Raises:
        FileNotFoundError, ValueError: as `train`.
    """
    _check_optimizer(module)
    _check_shapes(module, data)
    fitter = _make_trainer(trainer, callbacks, logger)
    if ckpt_path is not None:
        check_checkpoint(ckpt_path, module, fitter.max_epochs)
        if fitter.is_global_zero:
            log.info("Resuming from %s; the best of the epochs to come is tested.", ckpt_path)
    return fitter


def _check_optimizer(module: lightning.LightningModule) -> None:
    make_optimizer = getattr(module, "make_optimizer", None)
    if make_optimizer is None:
        return
    try:
        make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        name = getattr(make_optimizer, "func", make_optimizer).__name__
        raise ValueError(f"optimizer ({name}): {error}") from error


def _make_trainer(
    trainer: Callable[..., lightning.Trainer],
    callbacks: Mapping[str, lightning.Callback | None],
    logger: Logger | None,
) -> lightning.Trainer:
    try:
        return trainer(
            callbacks=[callback for callback in callbacks.values() if callback is not None],
            logger=False if logger is None else logger,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Hides two of Lightning's warnings that ask nothing of the user."""
    with warnings.catch_warnings():
        # said in our words: a resumed run has a folder of its own
        warnings.filterwarnings("ignore", message="The dirpath has changed", category=UserWarning)
        # Lightning's own use of a function of torch
        warnings.filterwarnings(
            "ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning
        )
        yield


def _check_shapes(module: lightning.LightningModule, data: lightning.LightningDataModule) -> None:
    shape = getattr(data, "image_shape", None)
    if shape is None:
        return
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            module(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise ValueError(
            f"The network does not accept {type(data).__name__}'s images of shape {list(shape)}: "
            f"{str(error).splitlines()[0]}. Set model.net.image_shape={list(shape)} to match."
        ) from error
    finally:
        module.train(was_training)


def _test(
    trainer: lightning.Trainer,
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
) -> dict[str, float]:
    checkpoint = trainer.checkpoint_callback
    best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
    metrics = trainer.test(module, datamodule=data, ckpt_path=best or None, verbose=False)
    return {name: float(value) for name, value in metrics[0].items()} if metrics else {}


def _table(results: dict[str, Any], optimizer: str, loggers: list[Logger]) -> str:
    rows = [("optimizer", optimizer)]
    for name, value in results.items():
        if name.startswith("test/"):
            rows.append((name.replace("/", " ").replace("_", " "), f"{value:.4f}"))
    products = results["products"]
    rows += [
        ("seconds", f"{results['seconds']:.1f}"),
        ("steps", str(results["steps"])),
        ("products", "–" if products is None else str(products)),
        ("outputs", results["output_dir"]),
    ]
    rows += [
        ("curves", f"tensorboard --logdir {Path(logger.log_dir)}")
        for logger in loggers
        if isinstance(logger, TensorBoardLogger)
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)
