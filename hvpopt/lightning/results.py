"""A run's results for its loggers: hyper-parameters with the final metrics, and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from hvpopt.lightning.monitors.base import table

__all__ = ["hyperparameters", "log_results"]


def hyperparameters(
    optimizer: torch.optim.Optimizer, choices: Mapping[str, Any]
) -> dict[str, bool | int | float | str]:
    """What distinguishes a run: the choices, and the optimizer with its options.

    Options are those of the optimizer's groups that are numbers, words or switches, as
    ``optimizer/lr``; a choice of the same name goes first.

    Args:
        optimizer: that trained.
        choices: names and values, such as the options of a configuration's groups.
    """
    options = {f"optimizer/{name}": value for name, value in optimizer.defaults.items()}
    found = {"optimizer": type(optimizer).__name__, **options, **choices}
    return {
        name: value for name, value in found.items() if isinstance(value, (bool, int, float, str))
    }


def log_results(
    loggers: Sequence[Logger],
    results: Mapping[str, Any],
    settings: Mapping[str, bool | int | float | str],
    step: int,
) -> None:
    """Logs the numbers among the results, as ``results/NAME``, beside the settings.

    TensorBoard shows them under HPARAMS, where runs are compared, and in the text
    ``report/results``; other loggers get both in their own ways.

    Args:
        loggers: to log to.
        results: names and values; those that are no numbers are left out.
        settings: see `hyperparameters`.
        step: of the training's end.
    """
    numbers = {
        f"results/{name.replace('/', '_')}": float(value)
        for name, value in results.items()
        if isinstance(value, (int, float))
    }
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(settings), numbers, step)
            logger.experiment.add_text("report/results", _text(numbers, settings), step)
        else:
            logger.log_hyperparams(dict(settings))
            logger.log_metrics(numbers, step)
        logger.finalize("success")


def _text(numbers: Mapping[str, float], settings: Mapping[str, Any]) -> str:
    results = {name.removeprefix("results/"): f"{x:.6g}" for name, x in numbers.items()}
    chosen = {name: str(value) for name, value in settings.items()}
    return f"{table(results, ('result', 'value'))}\n\n{table(chosen, ('setting', 'value'))}"
