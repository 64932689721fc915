"""The monitor of an optimizer's reports."""

import dataclasses
from collections import Counter
from enum import Enum
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from hvpopt.lightning.monitors.base import Monitor, current_step, table, writers
from hvpopt.optim.report import StepReport
from hvpopt.options import check_count


class OptimizerMonitor(Monitor):
    """Logs every step's report of hvpopt's optimizers, to all loggers.

    Every number of a report becomes ``optimizer/FIELD`` (``optimizer_0/FIELD``, ... where there
    are several optimizers), with the names of the report's class: `hvpopt.optim.report`,
    `hvpopt.optim.smd`, `hvpopt.optim.sophia`. What ends in words (why CG ended, how the step
    ended) becomes ``optimizer/FIELD/WORD``, 1 in the steps that ended so and 0 in the others, for
    each word that has been met: smoothed, it is a share. TensorBoard shows them in a custom
    layout, counts them in the text ``report/training``, and shows the gains of SMD as the
    histogram ``optimizer/log_gain``.

    The figures that matter most (damping and CG steps of Newton-CG) also show in the progress
    bar. Each kind of failed step is warned of once, with its sentence. Optimizers without a
    report are left alone.

    Args:
        every_n_steps: logs the first report, and then each so many-th; all are counted.
        histogram_every_n_steps: the same of the histogram of gains, which looks at all of them.

    Raises:
        ValueError: for an argument that is no whole number above zero.
    """

    def __init__(self, every_n_steps: int = 1, *, histogram_every_n_steps: int = 20) -> None:
        super().__init__()
        self._every = check_count("every_n_steps", every_n_steps)
        self._histogram_every = check_count("histogram_every_n_steps", histogram_every_n_steps)
        self._seen: dict[int, StepReport] = {}
        self._warned: set[str] = set()
        self._totals: dict[str, Counter[str]] = {}

    def watch(self, trainer: L.Trainer, module: L.LightningModule, was_trained: bool) -> None:
        """Logs the reports of the steps that a batch has ended."""
        for index, optimizer in enumerate(trainer.optimizers):
            report = getattr(optimizer, "last_report", None)
            if isinstance(report, StepReport) and self._seen.get(index) is not report:
                self._seen[index] = report
                prefix = "optimizer" if len(trainer.optimizers) == 1 else f"optimizer_{index}"
                self._take(trainer, module, optimizer, report, prefix)

    def _take(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
        report: StepReport,
        prefix: str,
    ) -> None:
        total = self._totals.setdefault(prefix, Counter())
        num_steps = total["num_steps"]
        metrics = report.metrics()
        words = _words(report)
        total.update(num_steps=1, **words)
        total.update(num_products=report.num_products, num_closure_runs=report.num_closure_runs)
        if num_steps % self._every == 0:
            shown = {name: float(name in words) for name in total if "/" in name}
            self.publish(
                trainer, {f"{prefix}/{name}": x for name, x in {**metrics, **shown}.items()}
            )
        if num_steps % self._histogram_every == 0:
            _log_gains(trainer, optimizer, f"{prefix}/log_gain")
        for name in report.progress_fields:
            if name in metrics:
                module.log(name, metrics[name], prog_bar=True, logger=False, on_step=True)
        if report.outcome.failed and report.outcome.name not in self._warned:
            self._warned.add(report.outcome.name)
            rank_zero_warn(f"Step {trainer.global_step} failed. {report.outcome.value}")

    def section(self, trainer: L.Trainer) -> str:
        """How many steps ended how, of each optimizer."""
        parts = []
        for index, (prefix, total) in enumerate(self._totals.items()):
            optimizer = trainer.optimizers[min(index, len(trainer.optimizers) - 1)]
            sentences = _sentences(self._seen.get(index))
            counts = {n: str(c) for n, c in total.items() if "/" not in n}
            ends = {
                f"{name} {sentences.get(name, '')}".strip(): str(count)
                for name, count in sorted(total.items())
                if "/" in name
            }
            title = f"### {type(optimizer).__name__} (`{prefix}/...`)"
            parts.append(f"{title}\n\n{table(counts | ends, ('over the whole run', 'count'))}")
        return "\n\n".join(parts)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers."""
        return {
            "totals": {prefix: dict(total) for prefix, total in self._totals.items()},
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._totals = {prefix: Counter(t) for prefix, t in state_dict["totals"].items()}
        self._warned = set(state_dict["warned"])


def _members(report: StepReport) -> dict[str, Enum]:
    pairs = ((f.name, getattr(report, f.name)) for f in dataclasses.fields(report))
    return {name: value for name, value in pairs if isinstance(value, Enum)}


def _words(report: StepReport) -> dict[str, int]:
    """How the step ended, as FIELD/WORD."""
    return {f"{name}/{value.name.lower()}": 1 for name, value in _members(report).items()}


def _sentences(report: StepReport | None) -> dict[str, str]:
    """What each FIELD/WORD means."""
    kinds = {} if report is None else {n: type(v) for n, v in _members(report).items()}
    return {
        f"{name}/{member.name.lower()}": f"({member.value})"
        for name, kind in kinds.items()
        for member in kind
    }


def _log_gains(trainer: L.Trainer, optimizer: torch.optim.Optimizer, tag: str) -> None:
    states = optimizer.state.values()
    gains = [s["gain"].reshape(-1) for s in states if isinstance(s.get("gain"), Tensor)]
    targets = writers(trainer)
    if gains and targets:
        values = torch.cat([gain.float().cpu() for gain in gains]).log()
        for writer in targets:
            writer.add_histogram(tag, values, current_step(trainer))
