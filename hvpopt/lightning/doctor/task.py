"""The task `doctor`: an examination of what the configuration would train."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning

from hvpopt.lightning.doctor.examination import doctor
from hvpopt.lightning.doctor.report import DoctorReport
from hvpopt.lightning.train import checked_trainer

log = logging.getLogger(__name__)


class CannotTrainError(RuntimeError):
    """Raised where something was found that prevents training.

    Attributes:
        report: what was found.
    """

    def __init__(self, report: DoctorReport) -> None:
        super().__init__(
            "; ".join(f"{f.subject}: {f.text}".rstrip(".") for f in report.failures) + "."
        )
        self.report = report


def run(
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    trainer: Callable[..., lightning.Trainer],
    callbacks: Mapping[str, lightning.Callback | None] | None = None,
    output_dir: str | Path = ".",
    *,
    seconds: float = 0.5,
) -> DoctorReport:
    """The report on the first training batch; logs its table and writes ``doctor.json``.

    Args:
        module: what is to be trained.
        data: its data.
        trainer: makes the Trainer, as for `hvpopt.lightning.train.train`.
        callbacks: by name; None switches one off.
        output_dir: where ``doctor.json`` goes.
        seconds: for timing each engine and matrix.

    Raises:
        CannotTrainError: where something was found that prevents training, after the table.
        ValueError: if the optimizer, the Trainer or the network refuses the configuration, or
            there is no batch.
    """
    fitter = checked_trainer(module, data, trainer, callbacks or {}, None, None)
    fitter._data_connector.attach_data(module, datamodule=data)  # as trainer.fit does first
    data.prepare_data()
    data.setup("fit")
    module.configure_model()
    module.setup("fit")
    batch = next(iter(data.train_dataloader()), None)
    if batch is None:
        raise ValueError(f"{type(data).__name__}.train_dataloader() yields no batch.")
    report = doctor(module, batch, trainer=fitter, seconds=seconds)
    if fitter.is_global_zero:
        content = json.dumps(_plain(dataclasses.asdict(report)), indent=2, ensure_ascii=False)
        Path(output_dir, "doctor.json").write_text(content + "\n")
        log.info("\n%s\n", report)
    if not report.can_train:
        raise CannotTrainError(report)
    return report


def _plain(value: Any) -> Any:
    """The value in JSON's types; null for what is not a finite number."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
