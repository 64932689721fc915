"""Sweeps (`hvpopt -m ...`): the table at their end, and what they cannot run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from hvpopt.cli.errors import UserError

__all__ = ["SweepSummary", "refuse_relaunch", "sweep_table"]


class SweepSummary(Callback):
    """Prints one line a run when a sweep has ended, from the files that the runs have left."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table, if any run has left results."""
        table = sweep_table(Path(config.hydra.sweep.dir))
        if table:
            sys.stdout.write(f"\n{table}\n")


def sweep_table(folder: Path) -> str:
    """One line a run of the sweep in `folder`: what distinguishes it, test metrics, seconds
    and folder."""
    rows: list[dict[str, str]] = []
    runs: list[list[str]] = []
    for path in sorted(folder.glob("*/summary.json"), key=_job_number):
        results = json.loads(path.read_text())
        overrides = OmegaConf.load(path.parent / ".hydra" / "overrides.yaml")
        runs.append([str(override) for override in overrides])
        metrics = {name: f"{value:.4f}" for name, value in results.items() if "test/" in name}
        rows.append(
            {
                "run": "",
                **metrics,
                "seconds": f"{results['seconds']:.1f}",
                "outputs": str(path.parent),
            }
        )
    for row, texts in zip(rows, runs, strict=True):
        row["run"] = " ".join(text for text in texts if any(text not in run for run in runs))
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "outputs"))
    columns.append("outputs")
    table = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )
    return "\n".join(lines) if rows else ""


def _job_number(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return (int(name), "") if name.isdigit() else (sys.maxsize, name)


def refuse_relaunch(trainer: DictConfig) -> None:
    """Refuses a trainer that would start its other ranks by running the whole command again.

    Raises:
        UserError: if it would.
    """
    strategy = str(trainer.get("strategy", "auto"))
    forks = any(word in strategy for word in ("spawn", "fork", "notebook"))
    if forks or _num_devices(trainer.get("devices", "auto"), trainer) < 2:
        return
    raise UserError(
        "A sweep cannot run with data parallelism over several processes, because each of them "
        "would start the sweep again: set trainer.devices=1 (or trainer.strategy=ddp_spawn), or "
        "start the runs one by one without -m."
    )


def _num_devices(devices: Any, trainer: DictConfig) -> int:
    if isinstance(devices, ListConfig):
        return len(devices)
    text = str(devices)
    if text not in ("auto", "-1"):
        return int(text) if text.isdigit() else text.count(",") + 1
    import torch

    if trainer.get("accelerator", "auto") == "cpu":
        return 1
    return torch.accelerator.device_count()
